"""Packed sets: a folder of few large files instead of many small ones.

``pixels`` holds decoded images as bytes in memory-mapped files: nothing is left to decode.
``shards`` holds the image files as they are, in tar files that WebDataset reads too. Both keep
labels, sample ids and class names, so that a packed set gives the masks and the augmentation of its
source::

    OUT/manifest.json         format, kind, classes, and size and BLAKE2 digest of every part
    OUT/train.npy             one row an image: id, label, part, offset, bytes, height, width
    OUT/train-00000.bin       or train-00000.tar

Parts are written atomically, so that a packing that was killed resumes where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.core.files import write_atomic, write_bytes_atomic, write_json_atomic
from mim.core.signals import end_at_once, start_server
from mim.data.images.decode import UnreadableImage, decode, decoding, is_deep, stored_values
from mim.data.images.deep import Depth, depth_of
from mim.data.images.deep import Pixels as Values
from mim.data.images.transforms import Picture, Pixels, cover, prepare, resize
from mim.data.sources.base import SOURCES, ImageSource, Split, some_bytes

FORMAT = 1
MANIFEST = "manifest.json"
_BLOCK = 1 << 24  # bytes hashed at once
_READER = 2  # raised where images are read differently, so that nothing stored is reused
_AHEAD = 64  # images of a source far away fetched at once
ROW = np.dtype(
    [
        *(("id", "<i8"), ("label", "<i8"), ("part", "<i4"), ("offset", "<i8"), ("bytes", "<i8")),
        *(("height", "<i4"), ("width", "<i4")),
    ]
)
"""An image in ``train.npy``; label -1 is none, 0 bytes are an image that could not be read."""


@dataclass(frozen=True)
class Recipe:
    """How images are packed."""

    kind: str = "pixels"
    """pixels or shards."""
    channels: int = 3
    """Of pixels."""
    size: int | None = None
    """Pixels: the shorter side is brought down to it; None keeps images as they are."""
    square: bool = False
    """Pixels: whether the longer side is cut down to the same, about the centre."""
    part_images: int = 512
    """Images in one file."""

    def __post_init__(self) -> None:
        if self.kind not in ("pixels", "shards"):
            raise setting_error("--kind", self.kind, "is not one of pixels, shards")
        if self.kind == "shards" and (self.size is not None or self.square):
            raise UserError("--size: shards hold the files as they are; pack pixels instead")
        if self.square and self.size is None:
            raise UserError("--square: needs --size")
        if self.size is not None and self.size < 1:
            raise setting_error("--size", self.size, "must be at least 1")

    def pixels(self, image: Picture) -> Pixels:
        """(h, w, C): the image as it is packed, float32 where it has more than 8 bits."""
        upright = prepare(image, self.channels)
        if self.size is not None:
            height, width = np.asarray(upright).shape[:2]
            scale = min(1.0, self.size / min(height, width))
            if self.square:
                upright = cover(upright, (self.size, self.size), "torch")
            else:
                upright = resize(upright, (round(height * scale), round(width * scale)), "torch")
        values = np.asarray(upright)
        return np.ascontiguousarray(values if values.ndim == 3 else values[:, :, None])


_worker: tuple[ImageSource, Recipe] | None = None


def _start_worker(source: ImageSource, recipe: Recipe) -> None:
    global _worker
    end_at_once()
    _worker = source, recipe
    torch.set_num_threads(1)


def _read_in_worker(span: range) -> tuple[bytes, NDArray[Any], list[tuple[str, str]]]:
    assert _worker is not None
    return read_span(*_worker, span)


def _encoded(source: ImageSource, index: int) -> bytes:
    """The file of an image as it is, or a PNG of its pixels; checked to be readable."""
    data = source.encoded(index)
    if data is not None:
        decode(data, source.describe(index), 1 << 62, depth=Depth("percentile"))
        return data
    picture = source.image(index)
    if isinstance(picture, np.ndarray):
        if picture.dtype == np.float32 or picture.shape[2] not in (1, 3):
            file = io.BytesIO()
            np.save(file, picture)
            return file.getvalue()
        picture = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def read_span(
    source: ImageSource, recipe: Recipe, span: range
) -> tuple[bytes, NDArray[Any], list[tuple[str, str]]]:
    """One part: its bytes, its rows of the index, and (name, reason) of unreadable images."""
    rows = np.zeros(len(span), dtype=ROW)
    rows["id"] = source.sample_ids[span.start : span.stop].numpy()
    rows["label"] = -1
    if source.labels is not None:
        rows["label"] = source.labels[span.start : span.stop].numpy()
    out = io.BytesIO()
    faults = []
    with contextlib.ExitStack() as stack:
        tar = None
        if recipe.kind == "shards":
            tar = stack.enter_context(tarfile.open(fileobj=out, mode="w"))
        for row, index in zip(rows, span, strict=True):
            if (index - span.start) % _AHEAD == 0:
                source.ahead(torch.arange(index, min(index + _AHEAD, span.stop)))
            try:
                if tar is None:
                    values = recipe.pixels(source.image(index))
                    row["height"], row["width"] = values.shape[:2]
                    row["offset"], row["bytes"] = out.tell(), values.nbytes
                    out.write(values)
                else:
                    data = _encoded(source, index)
                    row["offset"] = _add(tar, row, data, source.describe(index))
                    row["bytes"] = len(data)
            except UnreadableImage as error:
                faults.append((error.name, error.reason))
    return out.getvalue(), rows, faults


_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"\x93N": "npy", b"GI": "gif", b"BM": "bmp"}


def _add(tar: tarfile.TarFile, row: Any, data: bytes, name: str) -> int:
    """Adds an image as WebDataset names its files; returns where its bytes begin."""
    key = f"{int(row['id']) & (2**64 - 1):016x}"
    description = json.dumps(
        {"id": int(row["id"]), "label": int(row["label"]), "name": name}
    ).encode()
    members = [("json", description)]
    if row["label"] >= 0:
        members.append(("cls", str(int(row["label"])).encode()))
    members.append((_SUFFIXES.get(data[:2], "img"), data))  # last: its place is known then
    for suffix, content in members:
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(content)
        assert tar.fileobj is not None
        begin = tar.fileobj.tell()
        tar.addfile(info, io.BytesIO(content))
    return begin + tarfile.BLOCKSIZE


def read_spans(
    source: ImageSource, recipe: Recipe, spans: list[range], workers: int
) -> Iterator[tuple[bytes, NDArray[Any], list[tuple[str, str]]]]:
    """:func:`read_span` of each, in order, by ``workers`` processes; 0 reads in this one."""
    if workers < 2 or len(spans) < 2:
        for span in spans:
            yield read_span(source, recipe, span)
        return
    context = get_context("forkserver")  # a fork of a process with threads may hang
    start_server()
    with ProcessPoolExecutor(
        min(workers, len(spans)), context, initializer=_start_worker, initargs=(source, recipe)
    ) as pool:
        waiting = []
        for span in spans:  # never more at once than processes: parts are large
            waiting.append(pool.submit(_read_in_worker, span))
            if len(waiting) > workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def content_key(source: ImageSource, recipe: Recipe, config: DataConfig) -> str:
    """Digest of everything that the stored bytes follow from: images, recipe, how they are read."""
    parts = [source.stamps(), recipe, config.max_pixels, config.decode, _READER]
    if source.has_deep():
        parts.append(depth_of(config))
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def spans_of(source: ImageSource, recipe: Recipe) -> list[range]:
    """The images of each part."""
    starts = range(0, len(source), recipe.part_images)
    return [range(at, min(at + recipe.part_images, len(source))) for at in starts]


def pack_split(
    source: ImageSource, folder: Path, split: str, recipe: Recipe, workers: int, key: str
) -> dict[str, Any]:
    """Pack one split, without the parts that are there; returns its entry in the manifest.

    Args:
        source: the images.
        folder: where they go.
        split: the prefix of the files' names.
        recipe: what is stored of them.
        workers: processes that read.
        key: of :func:`content_key`; parts with another one are written again.
    """
    spans = spans_of(source, recipe)
    suffix = "bin" if recipe.kind == "pixels" else "tar"
    notes = [folder / f"{split}-{number:05d}.json" for number in range(len(spans))]
    missing = [n for n, note in enumerate(notes) if not _is_done(note, key)]
    parts = read_spans(source, recipe, [spans[n] for n in missing], workers)
    for number, (data, rows, faults) in zip(missing, parts, strict=True):
        rows["part"] = number
        path = folder / f"{split}-{number:05d}.{suffix}"
        write_bytes_atomic(path, data)
        write_atomic(path.with_suffix(".rows"), partial(_save, rows))
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        entry = {"name": path.name, "images": len(rows), "bytes": len(data), "blake2b": digest}
        # The note comes last: a part without one is written again.
        write_json_atomic(notes[number], {"key": key, "entry": entry, "unreadable": faults})
    written = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
    rows = np.concatenate([np.load(note.with_suffix(".rows")) for note in notes])
    write_atomic(folder / f"{split}.npy", partial(_save, rows))
    return {
        "images": len(source),
        "source": source.fingerprint(),
        "key": key,
        "parts": [note["entry"] for note in written],
        "unreadable": [fault for note in written for fault in note["unreadable"]],
        "rows": _digest(folder / f"{split}.npy"),
    }


def _save(rows: NDArray[Any], file: Path) -> None:
    with file.open("wb") as opened:
        np.save(opened, rows)


def _is_done(note: Path, key: str) -> bool:
    """Whether a part is there, whole, and of the same images and recipe."""
    if not note.is_file() or not note.with_suffix(".rows").is_file():
        return False
    try:
        stored = json.loads(note.read_text(encoding="utf-8"))
        path = note.parent / stored["entry"]["name"]
    except (ValueError, KeyError, TypeError):
        return False
    return (
        stored["key"] == key
        and path.is_file()
        and path.stat().st_size == stored["entry"]["bytes"]
        and _digest(path) == stored["entry"]["blake2b"]
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a packed set.

    Raises:
        UserError: if there is none, or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        begun = any(folder.glob("*-00000.json")) if folder.is_dir() else False
        why = (
            "its packing has not ended: call mim data pack again" if begun else f"has no {MANIFEST}"
        )
        raise setting_error("data.path", str(folder), f"is no packed set: {why}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        reason = f"is a packed set of format {found.get('format')}, not {FORMAT}"
        raise setting_error("data.path", str(folder), reason)
    return found


def verify(folder: Path) -> None:
    """Check all of a packed set against its digests.

    Raises:
        UserError: for the first file that is missing or differs.
    """
    for split, entry in read_manifest(folder)["splits"].items():
        expected = {part["name"]: part["blake2b"] for part in entry["parts"]}
        for name, digest in {f"{split}.npy": entry["rows"], **expected}.items():
            path = folder / name
            if not path.is_file() or _digest(path) != digest:
                what = "is damaged" if path.is_file() else "is missing"
                raise UserError(f"{path} {what}: delete {MANIFEST} and call mim data pack again")


def as_pixels(data: NDArray[np.uint8], height: int, width: int, channels: int) -> Pixels:
    """The stored bytes of an image as (height, width, channels), uint8 or float32."""
    if data.size == height * width * channels:
        return data.reshape(height, width, channels)
    return np.require(data, requirements="A").view(np.float32).reshape(height, width, channels)


class Packed(ImageSource):
    """Images of one split in the files ``parts`` of a folder, with ``rows`` as their index."""

    def __init__(
        self, folder: Path, rows: NDArray[Any], parts: list[str], kind: str, channels: int
    ) -> None:
        self.name = "packed"
        self.folder, self.parts, self.kind, self.channels = folder, parts, kind, channels
        self.rows = rows
        self.sample_ids = torch.from_numpy(rows["id"].astype(np.int64))
        labels = torch.from_numpy(rows["label"].astype(np.int64))
        self.labels = None if len(labels) and int(labels.min()) < 0 else labels
        self.classes: list[str] = []
        self._max_pixels, self._decoder, self._depth = 1 << 62, "auto", depth_of(DataConfig())
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # each process maps the files for itself

    def describe(self, index: int) -> str:
        row = self.rows[index]
        return f"{self.parts[row['part']]} image {int(row['id'])}"

    def stored(self, index: int) -> NDArray[np.uint8]:
        """The bytes of an image as they stand in the set."""
        row = self.rows[index]
        part = int(row["part"])
        if part not in self._open:
            path = self.folder / self.parts[part]
            self._open[part] = np.memmap(path, dtype=np.uint8, mode="r")
        begin = int(row["offset"])
        return self._open[part][begin : begin + int(row["bytes"])]

    def glance(self, index: int) -> bytes:
        with decoding(self.describe(index)):
            data = self.stored(index)
        return some_bytes(len(data), lambda offset, size: data[offset : offset + size].tobytes())

    def file_sizes(self) -> Sequence[int]:
        sizes: list[int] = self.rows["bytes"].tolist()
        return sizes

    def image(self, index: int) -> Picture:
        row, name = self.rows[index], self.describe(index)
        if not row["bytes"]:
            raise UnreadableImage(name, "it could not be read when the set was packed")
        with decoding(name):
            data = self.stored(index)
        if self.kind == "shards":
            return decode(data.tobytes(), name, self._max_pixels, self._decoder, self._depth)
        return as_pixels(data, int(row["height"]), int(row["width"]), self.channels)

    def is_deep(self, index: int) -> bool:
        row = self.rows[index]
        if self.kind == "pixels":
            return bool(row["bytes"] > row["height"] * row["width"] * self.channels)
        name = self.describe(index)
        with contextlib.suppress(UnreadableImage):
            return is_deep(self.stored(index).tobytes(), name, self._max_pixels, self._depth)
        return False

    def raw(self, index: int) -> Values | None:
        if self.kind == "pixels" or self._depth is None:
            return None
        name, data = self.describe(index), self.stored(index).tobytes()
        return stored_values(data, name, self._max_pixels, self._depth)


@SOURCES.register("packed")
class PackedSet(Packed):
    """What ``mim data pack`` wrote: ``data.path`` is its folder."""

    def __init__(self, config: DataConfig, split: Split) -> None:
        if config.path is None:
            raise setting_error("data.path", None, "is needed by data.source=packed")
        folder = Path(config.path)
        manifest = read_manifest(folder)
        entry = manifest["splits"][split]
        for part in entry["parts"]:
            path = folder / part["name"]
            if not path.is_file() or path.stat().st_size != part["bytes"]:
                what = "has not its size" if path.is_file() else "is missing"
                raise setting_error("data.path", config.path, f"is damaged: {part['name']} {what}")
        rows = np.load(folder / f"{split}.npy", mmap_mode="r")
        parts = [part["name"] for part in entry["parts"]]
        super().__init__(folder, rows, parts, manifest["kind"], manifest["channels"])
        self._digests = [part["blake2b"] for part in entry["parts"]]
        self.classes = manifest["classes"]
        self.mean, self.std = tuple(manifest["mean"]), tuple(manifest["std"])
        self._max_pixels, self._decoder = config.max_pixels, config.decode
        self._depth = depth_of(config)

    def stamp(self, index: int) -> str:
        row = self.rows[index]
        return f"{self._digests[row['part']]}/{row['offset']}/{row['bytes']}"
