"""Images in folders, one for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import blaming, setting_error
from mim.core.files import IMAGE_EXTENSIONS, is_folder, is_hidden
from mim.core.rng import name_to_int
from mim.data.images.decode import (
    UnreadableImage,
    check_header,
    decode,
    decoding,
    open_regular,
    pages_of,
    read_file,
    stored_values,
)
from mim.data.images.deep import Depth, Pixels
from mim.data.images.transforms import Picture
from mim.data.labels import label_table
from mim.data.places.listing import list_images, tell_left_out
from mim.data.places.names import Names
from mim.data.places.splits import find_splits
from mim.data.sources.base import SOURCES, EncodedSource, Split, required_path, some_bytes
from mim.data.unreadable import Fault, Ledger

_SHOWN = 5  # empty classes in a message
HEADERS_CHECKED = 20_000
"""The most files whose headers are read when a source is opened, which takes a second or two; with
more, a bad file shows when it is decoded."""


def folders_in(path: Path) -> list[str]:
    """Names of the visible sub-folders, sorted, without links to a folder above."""
    real = path.resolve()
    with os.scandir(path) as entries:
        return sorted(
            entry.name
            for entry in entries
            if is_folder(entry)
            and not is_hidden(entry.name)
            and not (entry.is_symlink() and real.is_relative_to(Path(entry.path).resolve()))
        )


def holds_images(folder: Path) -> bool:
    """Whether images lie directly in a folder."""
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for name in os.listdir(folder))


class Files(EncodedSource):
    """Images that are files below one folder; ids come from their paths relative to it."""

    setting = "data.path"
    """What messages call the folder."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self._given = required_path(config)
        self.root = Path(self._given)
        if not self.root.is_dir():
            raise setting_error(self.setting, config.path, "is not a folder")
        self.name = config.source
        self._resolved = self.root.resolve()
        self._keeps_list = config.index_cache
        self._pages_are_images = config.pages == "images" and self._depth is not None
        self._page_of: list[int] | None = None
        self._found_deep = False

    def _find(self, part: str, folders: Sequence[str]) -> Tensor:
        """Find the images below folders of a part; returns how many each holds."""
        listing = list_images(self.root, part, folders, keep=self._keeps_list)
        self._names, self.sample_ids = listing.names, listing.ids
        self.left_out = listing.left_out
        tell_left_out((self.root / part).as_posix(), listing.left_out)
        if self._pages_are_images:
            return self._open_pages(listing.counts)
        return listing.counts

    def _open_pages(self, counts: Tensor) -> Tensor:
        """Make each page of the files an image, ``FILE#PAGE``; returns how many each folder has."""
        files = [self._names[index] for index in range(len(self.sample_ids))]
        pages = [pages_of(self.root / name, name) for name in files]
        names = [
            name if count == 1 else f"{name}#{page}"
            for name, count in zip(files, pages, strict=True)
            for page in range(count)
        ]
        self._page_of = [page for count in pages for page in range(count)]
        self._names = Names.of(iter(names))
        self.sample_ids = torch.tensor([name_to_int(name) for name in names], dtype=torch.int64)
        parts = torch.tensor(pages).split(counts.tolist())
        return torch.stack([part.sum() for part in parts])

    def _splits(self) -> tuple[str | None, str | None]:
        """The folders of train and val below the root, see :func:`find_splits`."""
        with blaming(self.setting, self._given):
            return find_splits(folders_in(self.root))

    def describe(self, index: int) -> str:
        return self._names[index]

    def path(self, index: int) -> Path:
        """The file of an image."""
        name = self._names[index]
        if self._page_of is not None and name.endswith(f"#{self._page_of[index]}"):
            name = name.rpartition("#")[0]
        return self.root / name

    def image(self, index: int) -> Picture:
        if self._page_of is None:
            return super().image(index)
        name, depth = self.describe(index), self._at(index)
        return decode(self.encoded(index), name, self._max_pixels, self._decoder, depth)

    def raw(self, index: int) -> Pixels | None:
        if (depth := self._at(index)) is None:
            return None
        return stored_values(self.encoded(index), self.describe(index), self._max_pixels, depth)

    def _at(self, index: int) -> Depth | None:
        """How an image is read, which may be a page of its file."""
        if self._page_of is None or self._depth is None:
            return self._depth
        return replace(self._depth, page=self._page_of[index])

    def has_deep(self) -> bool:
        return self._found_deep or super().has_deep()

    def is_deep(self, index: int) -> bool:
        name = self.describe(index)
        try:
            return check_header(self.path(index), name, self._max_pixels, self._depth)
        except UnreadableImage:
            return False

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def glance(self, index: int) -> bytes:
        with decoding(self.describe(index)), open_regular(self.path(index)) as file:

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            return some_bytes(os.fstat(file.fileno()).st_size, read)

    def file_sizes(self) -> Sequence[int] | None:
        if len(self) > HEADERS_CHECKED:
            return None
        stats = (self._stat(index) for index in range(len(self)))
        return [0 if stat is None else stat.st_size for stat in stats]

    def stamp(self, index: int) -> str:
        if (stat := self._stat(index)) is None:
            return ""
        return f"{self._resolved}/{self._names[index]}/{stat.st_size}/{stat.st_mtime_ns}"

    def _stat(self, index: int) -> os.stat_result | None:
        try:
            return self.path(index).stat()
        except OSError:
            return None

    def check(self, indices: Tensor | None = None) -> list[Fault]:
        """Read the header of each file, of 20,000 files at most."""
        positions = range(len(self)) if indices is None else indices.tolist()
        if len(positions) > HEADERS_CHECKED:
            return []
        faults = []
        for index in positions:
            name = self.describe(index)
            try:
                path = self.path(index)
                self._found_deep |= check_header(path, name, self._max_pixels, self._depth)
            except UnreadableImage as error:
                faults.append(Fault(error.name, error.reason))
        return faults


@SOURCES.register("imagefolder")
class ImageFolder(Files):
    """Images in one folder a class: ``data.path/train/CLASS/...`` and ``data.path/val/CLASS/...``.

    ``training/``, ``valid/`` and ``validation/`` are other names of these, in any case; ``test/``
    or ``testing/`` stand in for a missing ``val/``. Without either, or with the class folders
    directly in ``data.path``, some images are held out. Ids come from the paths relative to
    ``data.path``, with forward slashes.
    """

    def __init__(self, config: DataConfig, split: Split) -> None:
        super().__init__(config)
        try:
            train, part = self._divide(split)
            folders = self._class_folders(part)
            names = folders if part == train else self._class_folders(train)
            with blaming(self.setting, config.path):
                labels, self.classes = label_table(folders, names)
            assert labels is not None
            self.labels = self._list(part, folders, labels)
        except (OSError, UnicodeEncodeError) as error:
            raise setting_error(self.setting, config.path, f"cannot be read: {error}") from error

    def _divide(self, split: Split) -> tuple[str, str]:
        """Folders, relative to the root, of the training images and of those of the split."""
        train, val = self._splits()
        self.has_val = val is not None
        return train or ".", (train if split == "train" else val) or train or "."

    def _class_folders(self, part: str) -> list[str]:
        classes = folders_in(self.root / part)
        if not classes:
            reason = f"has no class sub-folders in {(self.root / part).as_posix()}"
            beside = [] if part != "." else folders_in(self.root.resolve().parent)
            if len(beside) > 1 and holds_images(self.root):
                reason += (
                    f", but images: it looks like one class of {self.root.resolve().parent}. Name "
                    "that folder, or set data.source=flat for images without labels"
                )
            raise setting_error(self.setting, self._given, reason)
        return classes

    def _list(self, part: str, folders: Sequence[str], labels: Tensor) -> Tensor:
        """Find the files of the class folders of one part; returns the label (n,) of each."""
        order = torch.argsort(labels, stable=True)
        paths = [name if part == "." else f"{part}/{name}" for name in folders]
        chosen = [paths[place] for place in order.tolist()]
        counts = self._find(part, chosen)
        empty = [p for p, count in zip(chosen, counts.tolist(), strict=True) if not count]
        if empty:
            names = ", ".join((self.root / path).as_posix() for path in empty[:_SHOWN])
            more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
            many = "an empty class" if len(empty) == 1 else f"{len(empty)} empty classes"
            reason = f"has {many}: no image in {names}{more}"
            raise setting_error(self.setting, self._given, reason)
        return labels[order].repeat_interleave(counts)


class ClassFolders(ImageFolder):
    """All images of ``path/CLASS/...``, undivided; ``setting`` is what messages call the path.

    Raises:
        UserError: if it is not a folder, has no class, or one without an image.
    """

    def __init__(
        self,
        path: str,
        config: DataConfig,
        setting: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.setting = setting
        super().__init__(replace(config, source="imagefolder", path=path), "val")
        self.mean, self.std = mean, std
        self.ledger = Ledger("val", len(self), config.max_unreadable)
        self.ledger.add(self.check())

    def _divide(self, split: Split) -> tuple[str, str]:
        return ".", "."


@SOURCES.register("flat")
class FlatFolder(Files):
    """Unlabelled images at any depth below ``data.path``.

    ``train/`` and ``val/`` divide them, under the names that ``imagefolder`` knows; without them
    some images are held out. Ids are those of ``imagefolder``.
    """

    labels = None

    def __init__(self, config: DataConfig, split: Split) -> None:
        super().__init__(config)
        self.classes = []
        try:
            train, val = self._splits()
            self.has_val = val is not None
            part = (train if split == "train" else val) or train or "."
            self._find(part, [part])
        except (OSError, UnicodeEncodeError) as error:
            raise setting_error(self.setting, config.path, f"cannot be read: {error}") from error
