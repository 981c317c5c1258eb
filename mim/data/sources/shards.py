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

The id of an image is that of its name in the shard; where two shards hold the same name, that of
``SHARD/NAME``. A shard that ends early is refused with the place where it ends.
"""

from __future__ import annotations

import json
import os
import tarfile
import urllib.parse
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.core.keys import name_to_int
from mim.data.images.decode import EXTENSIONS, decode, decoding
from mim.data.images.transforms import Picture
from mim.data.places.fetch import text_at
from mim.data.places.kept import keep, recall, shown
from mim.data.places.names import VAL_NAMES, Names
from mim.data.places.places import Place, divide
from mim.data.places.remote import RemoteFile, in_parallel
from mim.data.sources.base import IMAGENET, SOURCES, ImageSource, Split

_OPEN_SHARDS = 64
_BLOCK = 512  # bytes of a tar block
_NO_LABEL = -1
_INDEX = "1"


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
    """(n,) of .cls or .json, -1 without."""


def _stem(name: str) -> str:
    """What the members of one WebDataset sample share: the path up to the first dot of its name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def scan(place: Place) -> ShardIndex:
    """Reads the headers of a tar file, on disk or by URL.

    Raises:
        UserError: if it is compressed, damaged or ends early.
    """
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    called = f"shard {shown(place)!r}"
    try:
        with place.open() if isinstance(place, RemoteFile) else place.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                reason = "is compressed, and images in it cannot be reached: unpack it with gunzip"
                raise UserError(f"{called} {reason}")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps a million
                    name = member.name.removeprefix("./")
                    base = name.rpartition("/")[2]
                    if not member.isfile() or base.startswith("."):
                        continue
                    if name.startswith("/") or ".." in name.split("/"):
                        reason = "which points out of the folder it would be unpacked into"
                        raise UserError(f"{called} has a member {name!r}, {reason}")
                    if base.lower().endswith(EXTENSIONS):
                        images.append((name, member.offset_data, member.size))
                    elif base.endswith((".cls", ".json")):
                        file.seek(member.offset_data)
                        text = file.read(member.size)
                        found = _read_label(text, base, f"{called}: {name}")
                        if found is not None:
                            labels[_stem(name)] = found
                file.seek(tar.offset)
                # tarfile takes a cut between members, or in a header, for the end.
                if file.read(_BLOCK) != bytes(_BLOCK):
                    raise tarfile.ReadError(f"no end mark at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        if isinstance(place, Path) and not place.is_file():
            raise UserError(f"{called} is missing") from error
        reason = f"ends early or is damaged, after {len(images)} whole images ({error})"
        raise UserError(f"{called} {reason}: fetch or write it again") from error
    return ShardIndex(
        names=np.array([os.fsencode(name) for name, _, _ in images], dtype=np.bytes_),
        offsets=np.array([offset for _, offset, _ in images], dtype=np.int64),
        sizes=np.array([size for _, _, size in images], dtype=np.int64),
        labels=np.array([labels.get(_stem(n), _NO_LABEL) for n, _, _ in images], dtype=np.int64),
    )


def _read_label(text: bytes, name: str, shown: str) -> int | None:
    try:
        if name.endswith(".cls"):
            return int(text)
        label = json.loads(text).get("label")
        return None if label is None else int(label)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{shown} holds no label: {error}") from error


def read_index(place: Place) -> ShardIndex:
    """The index of a shard: kept from an earlier scan of the same file, or of a new one.

    Raises:
        UserError: see :func:`scan`.
    """
    if (known := recall(place, _INDEX)) is not None:
        return ShardIndex(**known)
    index = scan(place)
    keep(place, _INDEX, vars(index))
    return index


@SOURCES.register("shards")
class Shards(ImageSource):
    """Images in tar files, local or by URL; see the head of this file.

    ``data.path`` is a file, a folder, a pattern with ``*`` or ``{000..146}``, or a URL with braces;
    ``data.val_path`` likewise for val. Without it, shards in a folder whose names begin with val,
    valid or test are val, as are such folders inside the tars; else a share is held out.
    """

    mean, std = IMAGENET

    def __init__(self, config: DataConfig, split: Split) -> None:
        if config.path is None:
            raise setting_error("data.path", None, "is needed by data.source=shards")
        self.name = "shards"
        self._max_pixels = config.max_pixels
        self._decoder = config.decode
        self._given = config.path
        train, val = divide(config, ".tar")
        everything = self._gather([*train, *val])
        self._take(everything, len(train), split)
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._ahead: dict[int, bytes] = {}

    def _gather(self, places: list[Place]) -> list[ShardIndex]:
        self._shards = places
        return in_parallel(read_index, places)

    def _take(self, indices: list[ShardIndex], trains: int, split: Split) -> None:
        """Sets names, labels and ids of one split; classes are those of train."""
        shard = np.concatenate([np.full(len(x.names), i) for i, x in enumerate(indices)])
        if not len(shard):
            raise setting_error("data.path", self._given, "has no images in its shards")
        names = np.concatenate([x.names for x in indices])
        given = np.concatenate([x.labels for x in indices])
        place = {
            "shard": shard.astype(np.int32),
            "offset": np.concatenate([x.offsets for x in indices]),
            "size": np.concatenate([x.sizes for x in indices]),
        }
        known: dict[tuple[str, str], int] = {}  # folders -> a number: never a string an image
        codes = (known.setdefault(_folders(os.fsdecode(name)), len(known)) for name in names)
        code = np.fromiter(codes, dtype=np.int64, count=len(names))
        in_val = np.array([part in VAL_NAMES for part, _ in known])[code]
        in_train = np.array([part == "train" for part, _ in known])[code]
        if trains < len(indices):
            is_val = shard >= trains
            self.has_val = True
        else:
            is_val = in_val & in_train.any()
            self.has_val = bool(is_val.any())
        labels = self._label(given, [name for _, name in known], code, is_val)
        chosen = is_val if self.has_val and split == "val" else ~is_val
        keys: list[Any] = [] if labels is None else [labels[chosen]]
        # By label and name, as a folder is listed: how images were packed does not matter.
        order = np.flatnonzero(chosen)[np.lexsort((shard[chosen], names[chosen], *keys))]
        self._names = Names.of(os.fsdecode(name) for name in names[order])
        self._place = {key: values[order] for key, values in place.items()}
        self.labels = None if labels is None else torch.from_numpy(labels[order])
        self.sample_ids = self._ids(names, shard, order)

    def _label(
        self,
        given: NDArray[np.int64],
        folders: Sequence[str],
        code: NDArray[np.int64],
        is_val: NDArray[np.bool_],
    ) -> NDArray[np.int64] | None:
        """(n,) labels, of .cls or .json, else of class folders ``folders[code]``, else None."""
        if (given != _NO_LABEL).any():
            if (given == _NO_LABEL).any():
                count = int((given == _NO_LABEL).sum())
                reason = f"has {count} images without .cls or .json, and {len(given) - count} with"
                raise setting_error("data.path", self._given, reason)
            self.classes = self._class_names(int(given.max()) + 1)
            return given
        if not all(folders):
            self.classes = []
            return None
        self.classes = sorted({folders[number] for number in np.unique(code[~is_val])})
        position = {name: label for label, name in enumerate(self.classes)}
        unknown = sorted(set(folders) - set(position))
        if unknown:
            reason = f"has the class {unknown[0]!r} in val but not in train"
            raise setting_error("data.path", self._given, reason)
        return np.array([position[name] for name in folders], dtype=np.int64)[code]

    def _class_names(self, least: int) -> list[str]:
        text = _beside(self._shards[0], "classes.txt")
        if text is None:
            return [str(label) for label in range(least)]
        names = text.split("\n")
        names = names[:-1] if names[-1] == "" else names
        if len(names) < least:
            reason = f"names {len(names)} classes, and there are labels up to {least - 1}"
            raise setting_error("data.path", self._given, f"has a classes.txt that {reason}")
        return names

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
        shard, offset, size = (int(self._place[key][index]) for key in ("shard", "offset", "size"))
        return shard, offset, size

    def ahead(self, indices: torch.Tensor) -> None:
        wanted = {}
        for index in indices.tolist():
            shard, offset, size = self._where(index)
            if isinstance(place := self._shards[shard], RemoteFile):
                wanted[index] = place, offset, size
        self._ahead = dict(zip(wanted, in_parallel(_read, list(wanted.values())), strict=True))

    def read(self, index: int) -> bytes:
        """The bytes of an image's file."""
        shard, offset, size = self._where(index)
        place = self._shards[shard]
        if isinstance(place, RemoteFile):
            return self._ahead.pop(index, None) or place.read(offset, size)
        handle = self._handles.pop(shard, None)
        if handle is None:
            handle = os.open(place, os.O_RDONLY)
        self._handles[shard] = handle  # the newest stands last
        if len(self._handles) > _OPEN_SHARDS:
            os.close(self._handles.popitem(last=False)[1])
        data = os.pread(handle, size, offset)
        if len(data) < size:
            raise OSError(f"shard {place.name} ends after {len(data)} of {size} bytes of the image")
        return data

    def encoded(self, index: int) -> bytes:
        """:meth:`read`, where an image that cannot be read is one."""
        with decoding(self.describe(index)):
            return self.read(index)

    def image(self, index: int) -> Picture:
        data = self.encoded(index)
        return decode(data, self.describe(index), self._max_pixels, self._decoder)


def _read(place: tuple[RemoteFile, int, int]) -> bytes:
    file, offset, size = place
    return file.read(offset, size)


def _beside(place: Place, name: str) -> str | None:
    """The text of a file in the same folder, if there is one."""
    if isinstance(place, RemoteFile):
        return text_at(urllib.parse.urljoin(place.url, name))
    path = place.parent / name
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _folders(name: str) -> tuple[str, str]:
    """The split folder and the class folder of a member; empty where there is none."""
    parts = name.split("/")[:-1]
    split = parts[0] if parts and parts[0] in ("train", *VAL_NAMES) else ""
    rest = parts[1:] if split else parts
    return split, rest[0] if rest else ""
