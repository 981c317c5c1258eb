"""Images in tar files: WebDataset shards, or a folder of images packed as it is.

One scan of the headers makes an index (name, offset, size), which is kept; then any image is one
read at its offset. So shards have the same order, the same batches and the same exact resume as
a folder, and nothing is read through. With ``data.streaming`` the same holds by URL: a read is a
range request, and nothing is kept on disk but the index.

What a shard may hold:

- ``train/CLASS/NAME.jpg`` or ``CLASS/NAME.jpg``: the label is the class folder, as in
  ``imagefolder``, and a packed image folder gives the same ids, labels and order as the folder;
- WebDataset samples: ``KEY.jpg`` with ``KEY.cls`` (the label as a number) or ``KEY.json`` with
  ``{"label": number}``; ``classes.txt`` beside the shards names the classes, one a line;
- ``KEY.jpg`` alone: no labels.

A key may contain dots (``photo_1.0.jpg``). A companion that a word tells from the image of the same
key is left out: ``KEY.seg.png`` beside ``KEY.jpg``, or ``KEY.depth.png`` beside ``KEY.image.png``
and ``KEY.cls``. A link is the member that it leads to.

The id of an image is that of its name in the shard; where two shards hold the same name, that of
``SHARD/NAME``. A shard that ends early is refused with the place where it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import tarfile
import urllib.parse
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim.core.config import DataConfig
from mim.core.errors import UserError, blaming, setting_error
from mim.core.files import decode_text, is_hidden
from mim.core.rng import name_to_int
from mim.data.images.decode import EXTENSIONS, check_size, decoding, open_regular
from mim.data.labels import label_table
from mim.data.places.fetch import text_at
from mim.data.places.kept import keep, recall, shown, version_of
from mim.data.places.listing import ending_left_out, tell_left_out
from mim.data.places.names import Names
from mim.data.places.places import Place, divide
from mim.data.places.remote import RemoteFile, in_parallel
from mim.data.places.splits import find_splits, split_of
from mim.data.sources.base import SOURCES, EncodedSource, Split, required_path, some_bytes

_OPEN_SHARDS = 64
_BLOCK = 512  # bytes of a tar block
_NO_LABEL = np.iinfo(np.int64).min
_SPARSE = -1  # offset of a sparse file, whose bytes are not those that it stands for
_MOST_NOTE = 1 << 24  # bytes of a .cls or .json
_NOTES = (".cls", ".json")
_IMAGES = ("image", "img", "input", "rgb", "photo")  # what tells the image of a sample from others
_INDEX = "3"
_IMAGE = tuple(ending for ending in EXTENSIONS if ending != ".npz")  # often a companion


@dataclass
class ShardIndex:
    """The images of one shard."""

    names: NDArray[np.bytes_]
    """(n,) names of the members."""
    offsets: NDArray[np.int64]
    """(n,) where the bytes of each begin."""
    sizes: NDArray[np.int64]
    """(n,) how many there are."""
    labels: NDArray[np.int64]
    """(n,) of .cls or .json, the least int64 without."""
    left_out: NDArray[np.str_]
    """0-d, JSON: what is left out -> how many."""


def _stem(name: str) -> str:
    """A path without its last ending."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.rpartition('.')[0] or base}"


def _keys(stem: str) -> Iterator[tuple[str, str]]:
    """Keys of samples that an image may belong to, less one word each, and the words."""
    folder, slash, base = stem.rpartition("/")
    while True:
        base, dot, word = base.rpartition(".")
        if not dot or not base or not word[:1].isalpha():
            return
        yield f"{folder}{slash}{base}", word


class _Scan:
    """The members of one tar file, as they come."""

    def __init__(self, called: str) -> None:
        self.called = called
        self.images: dict[str, tuple[int, int]] = {}
        self.twice: list[tuple[str, tuple[int, int]]] = []
        self.labels: dict[str, int | None] = {}
        self.links: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()

    def add(self, member: tarfile.TarInfo, file: IO[bytes]) -> None:
        """Add a member.

        Raises:
            UserError: if it points out of the archive, or holds no label where one should be.
        """
        name = posixpath.normpath(member.name)
        if name.startswith("/") or ".." in member.name.split("/"):
            reason = "which points out of the folder it would be unpacked into"
            raise UserError(f"{self.called} has a member {member.name!r}, {reason}")
        if member.isdir() or any(map(is_hidden, name.split("/"))):
            return
        ending = PurePosixPath(name).suffix.lower()
        if member.islnk() or member.issym():
            base = "" if member.islnk() else posixpath.dirname(name)
            if ending in (*_IMAGE, *_NOTES):
                self.links[name] = posixpath.normpath(posixpath.join(base, member.linkname))
            else:
                self.left_out["links to folders"] += 1
        elif ending in _IMAGE:
            if not member.isfile():
                self.left_out["pipes and devices"] += 1
                return
            place = _SPARSE if member.issparse() else member.offset_data, member.size
            if name in self.images:
                self.twice.append((name, place))
            else:
                self.images[name] = place
        elif ending in _NOTES and member.isfile():
            if member.size > _MOST_NOTE:
                raise UserError(f"{self.called}: {name} holds no label: {member.size:,} bytes")
            file.seek(member.offset_data)
            self.labels[name] = _read_label(file.read(member.size), f"{self.called}: {name}")
        elif (other := ending_left_out(name)) is not None:
            self.left_out[other] += 1

    def _follow(self, name: str) -> str:
        """Where a chain of links ends."""
        seen = set()
        while name in self.links and name not in seen:
            seen.add(name)
            name = self.links[name]
        return name

    def index(self) -> ShardIndex:
        """The images with their labels.

        Raises:
            UserError: if a sample holds several images, of which none is the one.
        """
        for name in self.links:
            target = self._follow(name)
            if name.lower().endswith(_NOTES):
                self.labels[name] = self.labels.get(target)
            elif target in self.images:
                self.images[name] = self.images[target]
            else:
                self.left_out["links to what is not in the shard"] += 1
        found = self._labelled()
        images = [(name, *self.images[name], label) for name, label in found.items()]
        images += [(name, *place, found.get(name, _NO_LABEL)) for name, place in self.twice]
        return ShardIndex(
            names=np.array([os.fsencode(image[0]) for image in images], dtype=np.bytes_),
            offsets=np.array([image[1] for image in images], dtype=np.int64),
            sizes=np.array([image[2] for image in images], dtype=np.int64),
            labels=np.array([image[3] for image in images], dtype=np.int64),
            left_out=np.array(json.dumps(self.left_out)),
        )

    def _labelled(self) -> dict[str, int]:
        """The label of each image, ``_NO_LABEL`` without; companions are left out."""
        labels = {_stem(name): label for name, label in self.labels.items() if label is not None}
        stems = Counter(map(_stem, self.images))
        if len(stems) > 1 and min(stems.values()) > 1:
            one, other = [name for name in self.images if _stem(name) == next(iter(stems))][:2]
            reason = "in each sample: nothing tells the image from its mask"
            raise UserError(f"{self.called} has two images such as {one} and {other} {reason}")
        found: dict[str, int] = {}
        named: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for name in self.images:
            stem = _stem(name)
            if stem in labels:
                found[name] = labels[stem]
                continue
            keys = list(_keys(stem))
            if any(key in stems for key, _ in keys):
                self.left_out["companions of images"] += 1
                continue
            key, word = next(((k, w) for k, w in keys if k in labels), (stem, ""))
            found[name] = labels.get(key, _NO_LABEL)
            if word:
                named[key].append((name, word.lower()))
        for key, members in named.items():
            if len(members) == 1:
                continue
            usual = [name for name, word in members if word in _IMAGES]
            if len(usual) != 1:
                which = ", ".join(name for name, _ in members)
                reason = f"which of {which} is the image of the sample {key}?"
                raise UserError(f"{self.called}: {reason}")
            self.left_out["companions of images"] += len(members) - 1
            for name, _ in members:
                if name not in usual:
                    del found[name]
        return found


def scan(place: Place) -> ShardIndex:
    """Read the headers of a tar file, on disk or by URL.

    Raises:
        UserError: if it is compressed, damaged or ends early.
    """
    called = f"shard {shown(place)!r}"
    found = _Scan(called)
    try:
        with contextlib.ExitStack() as stack:
            opened = place.open() if isinstance(place, RemoteFile) else open_regular(place)
            file = stack.enter_context(opened)
            if file.read(2) == b"\x1f\x8b":
                reason = "is compressed, and images in it cannot be reached: unpack it with gunzip"
                raise UserError(f"{called} {reason}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps a million
                    found.add(member, file)
                file.seek(tar.offset)
                # tarfile takes a cut between members, or in a header, for the end.
                if file.read(_BLOCK) != bytes(_BLOCK):
                    raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(place, Path) and not place.is_file():
            raise UserError(f"{called} is missing") from error
        reason = f"ends early or is damaged, after {len(found.images)} whole images ({error})"
        raise UserError(f"{called} {reason}: fetch or write it again") from error
    return found.index()


def _read_label(text: bytes, name: str) -> int | None:
    """The label in a .cls or .json; None where the latter has none."""
    try:
        content = decode_text(text)
        label = int(content) if name.lower().endswith(".cls") else json.loads(content).get("label")
        if label is None:
            return None
        number = int(label)
        if isinstance(label, bool) or (isinstance(label, float) and number != label):
            raise ValueError(f"{label} is no number of a class")
        if abs(number) >= 1 << 63:
            raise ValueError(f"{number} is no number of a class")
        return number
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{name} holds no label: {error}") from error


def read_index(place: Place) -> ShardIndex:
    """The index of a shard, from an earlier scan of the same file or a new one."""
    if (known := recall(place, _INDEX)) is not None:
        return ShardIndex(**known)
    index = scan(place)
    keep(place, _INDEX, vars(index))
    return index


@SOURCES.register("shards")
class Shards(EncodedSource):
    """Images in tar files, local or by URL, see the top of this file.

    ``data.path`` is a file, a folder, a pattern with ``*`` or ``{000..146}``, or a URL with braces;
    ``data.val_path`` likewise for val. Without it, shards whose names say val or test are val, as
    are such folders around or inside the tars; without those some images are held out.
    """

    def __init__(self, config: DataConfig, split: Split) -> None:
        super().__init__(config)
        self.name = "shards"
        self._given = required_path(config)
        train, val = divide(config, ".tar")
        self._shards = [*train, *val]
        self._select(in_parallel(read_index, self._shards), len(train), split)
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._ahead: dict[int, bytes] = {}
        self._versions: dict[int, str] = {}

    def _select(self, indices: list[ShardIndex], trains: int, split: Split) -> None:
        """Set names, labels and ids of one split; classes are those of train."""
        shard = np.concatenate([np.full(len(x.names), i) for i, x in enumerate(indices)])
        if not len(shard):
            raise setting_error("data.path", self._given, "has no images in its shards")
        names = np.concatenate([x.names for x in indices])
        given = np.concatenate([x.labels for x in indices])
        folders: dict[str, int] = {}  # -> a number, which costs less than a string for each image
        codes = (
            folders.setdefault(os.fsdecode(name).rpartition("/")[0], len(folders)) for name in names
        )
        code = np.fromiter(codes, dtype=np.int64, count=len(names))
        splits, classes = self._divide_folders(list(folders), apart=trains < len(indices))
        if trains < len(indices):
            in_val, in_train = shard >= trains, shard < trains
        else:
            in_val = np.array([part == "val" for part in splits])[code]
            in_train = np.array([part == "train" for part in splits])[code]
        self.has_val = bool(in_val.any())
        chosen = in_val if self.has_val and split == "val" else in_train
        labels = self._label(given, classes, code, in_train, chosen)
        keys: list[Any] = [] if labels is None else [labels]
        # By label and name, as a folder is listed: how images were packed does not matter.
        rank = np.lexsort((shard[chosen], names[chosen], *keys))
        order = np.flatnonzero(chosen)[rank]
        self._names = Names.of(os.fsdecode(name) for name in names[order])
        self._shard = shard[order].astype(np.int32)
        self._offset = np.concatenate([x.offsets for x in indices])[order]
        self._size = np.concatenate([x.sizes for x in indices])[order]
        self.labels = None if labels is None else torch.from_numpy(labels[rank])
        self.sample_ids = self._ids(names, shard, order)
        left_out: Counter[str] = Counter()
        for index in indices:
            left_out.update(json.loads(str(index.left_out)))
        self.left_out = dict(left_out)
        tell_left_out(self._given, left_out)

    def _divide_folders(
        self, folders: Sequence[str], apart: bool
    ) -> tuple[list[str | None], list[str]]:
        """Split and class, empty for none, of each folder; ``apart``: val has its own shards."""
        parts = [tuple(folder.split("/")) if folder else () for folder in folders]
        tops = {part[:1] for part in parts}
        if len(tops) == 1 and any(split_of(part[1]) == "train" for part in parts if len(part) > 1):
            parts = [part[1:] for part in parts]  # a folder was packed with its own name
        if apart:
            rest = [part[1:] if part and split_of(part[0]) else part for part in parts]
            return [None] * len(parts), [part[0] if part else "" for part in rest]
        with blaming("data.path", self._given):
            train, val = find_splits(sorted({part[0] for part in parts if part}))
        if train is None:
            return ["train"] * len(parts), [part[0] if part else "" for part in parts]
        names: dict[tuple[str | None, ...], str] = {(train,): "train", (val,): "val"}
        splits = [names.get(part[:1]) for part in parts]
        return splits, [part[1] if len(part) > 1 else "" for part in parts]

    def _label(
        self,
        given: NDArray[np.int64],
        classes: Sequence[str],
        code: NDArray[np.int64],
        train: NDArray[np.bool_],
        chosen: NDArray[np.bool_],
    ) -> NDArray[np.int64] | None:
        """Labels of the chosen images, of .cls or .json, else of their folders, else None.

        Args:
            given: (n,) of all images.
            classes: of each folder.
            code: (n,) the folder of each.
            train: (n,) which are of train.
            chosen: (n,) which to label.
        """
        used = train | chosen
        missing = given[used] == _NO_LABEL
        self.classes = []
        with blaming("data.path", self._given):
            if not missing.all():
                if missing.any():
                    count = int(missing.sum())
                    reason = f"has {count} images without .cls or .json, and {len(missing) - count}"
                    raise UserError(f"{reason} with")
                labels, self.classes = label_table(given[chosen], given[train], self._class_names())
                return None if labels is None else labels.numpy()
            if not all(classes[number] for number in np.unique(code[used])):
                return None
            there = np.unique(code[chosen])
            of_train = [classes[number] for number in np.unique(code[train])]
            labels, self.classes = label_table([classes[number] for number in there], of_train)
            assert labels is not None
            return labels.numpy()[np.searchsorted(there, code[chosen])]

    def _class_names(self) -> list[str] | None:
        """The lines of ``classes.txt`` beside the shards; None without it."""
        first, name = self._shards[0], "classes.txt"
        if isinstance(first, RemoteFile):
            text = text_at(urllib.parse.urljoin(first.url, name))
        else:
            path = first.parent / name
            text = decode_text(path.read_bytes()) if path.is_file() else None
        names = None if text is None else text.replace("\r\n", "\n").split("\n")
        return names[:-1] if names and names[-1] == "" else names

    def _ids(
        self, names: NDArray[np.bytes_], shard: NDArray[np.int64], order: NDArray[np.int64]
    ) -> torch.Tensor:
        if len(np.unique(names)) == len(names):
            whole: Iterator[str] = map(os.fsdecode, names[order])
        else:
            tars = [place.name for place in self._shards]
            if len(set(zip((tars[s] for s in shard), names, strict=True))) < len(names):
                reason = "holds an image twice under one name"
                raise setting_error("data.path", self._given, reason)
            whole = (f"{tars[shard[i]]}/{os.fsdecode(names[i])}" for i in order)
        return torch.from_numpy(np.fromiter(map(name_to_int, whole), np.int64, len(order)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict(), "_ahead": {}}  # a worker opens its own

    def describe(self, index: int) -> str:
        return self._names[index]

    def _where(self, index: int) -> tuple[int, int, int]:
        """The shard of an image, where its bytes begin, and how many there are."""
        return int(self._shard[index]), int(self._offset[index]), int(self._size[index])

    def ahead(self, indices: torch.Tensor) -> None:
        reads = {}
        for index in indices.tolist():
            shard, offset, size = self._where(index)
            if isinstance(place := self._shards[shard], RemoteFile) and offset != _SPARSE:
                reads[index] = partial(place.read, offset, size)
        found = in_parallel(lambda read: read(), list(reads.values()))
        self._ahead = dict(zip(reads, found, strict=True))

    def _bytes(self, index: int, begin: int, size: int) -> bytes:
        """``size`` bytes of an image's file from ``begin`` on."""
        shard, offset, whole = self._where(index)
        if offset == _SPARSE:
            raise OSError("it is a sparse file in its shard")
        check_size(whole)
        place = self._shards[shard]
        if isinstance(place, RemoteFile):
            data = self._ahead.pop(index, None) if size == whole else None
            return data or place.read(offset + begin, size)
        handle = self._handles.pop(shard, None)
        if handle is None:
            handle = os.open(place, os.O_RDONLY)
        self._handles[shard] = handle  # the newest stands last
        if len(self._handles) > _OPEN_SHARDS:
            os.close(self._handles.popitem(last=False)[1])
        data = os.pread(handle, size, offset + begin)
        if len(data) < size:
            raise OSError(f"shard {place.name} ends after {len(data)} of {size} bytes of the image")
        return data

    def read(self, index: int) -> bytes:
        return self._bytes(index, 0, self._where(index)[2])

    def glance(self, index: int) -> bytes:
        with decoding(self.describe(index)):
            return some_bytes(self._where(index)[2], partial(self._bytes, index))

    def file_sizes(self) -> Sequence[int]:
        sizes: list[int] = self._size.tolist()
        return sizes

    def stamp(self, index: int) -> str:
        shard, offset, size = self._where(index)
        if shard not in self._versions:
            self._versions[shard] = version_of(self._shards[shard]) or ""
        return f"{self._versions[shard]}/{offset}/{size}"


@SOURCES.register("flat_shards")
class FlatShards(Shards):
    """As ``shards``, but labels are not read, whatever is wrong with them."""

    def _label(self, *of_images: Any) -> None:
        self.classes = []
