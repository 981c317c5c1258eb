"""Images in folders, one for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import setting_error
from mim.data.images.decode import UnreadableImage, check_header, decode, decoding
from mim.data.images.transforms import Picture
from mim.data.places.listing import list_images
from mim.data.places.names import VAL_NAMES
from mim.data.sources.base import IMAGENET, SOURCES, ImageSource, Split
from mim.data.unreadable import Fault, Ledger

# Reading so many headers takes a second or two; above that a bad file shows when it is decoded.
HEADERS_CHECKED = 20_000
"""Files of which a source reads the headers when it is opened; of more, none."""


def _folders(path: Path) -> list[str]:
    """Names of the visible sub-folders, sorted."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


class Files(ImageSource):
    """Images that are files below one folder; ids come from their paths relative to it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean, std = IMAGENET
    setting = "data.path"
    """What messages call the folder."""

    def __init__(self, config: DataConfig) -> None:
        if config.path is None:
            raise setting_error(self.setting, None, f"is needed by data.source={config.source}")
        self.root = Path(config.path)
        if not self.root.is_dir():
            raise setting_error(self.setting, config.path, "is not a folder")
        self.name = config.source
        self._given = config.path
        self._max_pixels = config.max_pixels
        self._decoder = config.decode
        self._keeps_list = config.index_cache

    def _find(self, part: str, folders: Sequence[str]) -> Tensor:
        """Takes the images below folders of a part; returns how many lie below each."""
        listing = list_images(self.root, part, folders, keep=self._keeps_list)
        self._names, self.sample_ids = listing.names, listing.ids
        return listing.counts

    def describe(self, index: int) -> str:
        return self._names[index]

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / self._names[index]

    def encoded(self, index: int) -> bytes:
        """The content of an image's file."""
        with decoding(self.describe(index)):
            return self.path(index).read_bytes()

    def image(self, index: int) -> Picture:
        return decode(self.encoded(index), self.describe(index), self._max_pixels, self._decoder)

    def check(self, indices: Tensor | None = None) -> list[Fault]:
        """Reads the header of each file, if they are 20,000 at most."""
        if (len(self) if indices is None else len(indices)) > HEADERS_CHECKED:
            return []
        faults = []
        for index in range(len(self)) if indices is None else indices.tolist():
            name = self.describe(index)
            try:
                with decoding(name):
                    check_header(self.path(index), name, self._max_pixels)
            except UnreadableImage as error:
                faults.append(Fault(error.name, error.reason))
        return faults


@SOURCES.register("imagefolder")
class ImageFolder(Files):
    """Images in one folder a class: ``data.path/train/CLASS/...`` and ``data.path/val/CLASS/...``.

    ``valid/`` or ``test/`` stand in for a missing ``val/``; with neither, or with the class folders
    directly in ``data.path``, a share of the images is held out. Ids come from the paths relative
    to ``data.path``, with forward slashes.
    """

    def __init__(self, config: DataConfig, split: Split) -> None:
        super().__init__(config)
        try:
            train, part = self._divide(split)
            self.classes = self._class_folders(train)
            if part != train:
                self._check_classes(part)
            self.labels = self._list(part)
        except (OSError, UnicodeEncodeError) as error:
            raise setting_error(self.setting, config.path, f"cannot be read: {error}") from error

    def _divide(self, split: Split) -> tuple[str, str]:
        """Folders, relative to the root, of the training images and of the wanted ones."""
        if not (self.root / "train").is_dir():
            folders = _folders(self.root)
            if folders and set(folders) <= set(VAL_NAMES):
                raise setting_error(self.setting, self._given, f"has {folders[0]}/ but no train/")
            self.has_val = False
            return ".", "."
        for name in VAL_NAMES:
            if (self.root / name).is_dir():
                return "train", "train" if split == "train" else name
        self.has_val = False
        return "train", "train"

    def _class_folders(self, part: str) -> list[str]:
        classes = _folders(self.root / part)
        if not classes:
            reason = f"has no class sub-folders in {(self.root / part).as_posix()}"
            raise setting_error(self.setting, self._given, reason)
        return classes

    def _check_classes(self, part: str) -> None:
        unknown = sorted(set(self._class_folders(part)) - set(self.classes))
        if unknown:
            reason = f"has the class {unknown[0]!r} in {part} but not in train"
            raise setting_error(self.setting, self._given, reason)

    def _list(self, part: str) -> Tensor:
        """Takes the files of one part; returns the position of each one's class."""
        folders = [name if part == "." else f"{part}/{name}" for name in self.classes]
        # A class may be missing in val.
        there = [label for label, name in enumerate(folders) if (self.root / name).is_dir()]
        counts = self._find(part, [folders[label] for label in there])
        for label, count in zip(there, counts.tolist(), strict=True):
            if not count:
                where = (self.root / folders[label]).as_posix()
                reason = f"has an empty class: no image in {where}"
                raise setting_error(self.setting, self._given, reason)
        return torch.tensor(there, dtype=torch.int64).repeat_interleave(counts)


class ClassFolders(ImageFolder):
    """All images of ``path/CLASS/...``, undivided.

    Args:
        path: the folder.
        config: how images are read; ``max_unreadable`` of them at most may be unreadable.
        setting: what messages call the folder.
        mean: of each channel, by which the images are normalised.
        std: likewise.

    Raises:
        UserError: if it is no folder, has no class, or one without an image.
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

    If it holds ``train/``, training images are those below, and ``val/``, ``valid/`` or ``test/``
    holds the val images; else a share is held out. Ids are as those of ``imagefolder``.
    """

    labels = None

    def __init__(self, config: DataConfig, split: Split) -> None:
        super().__init__(config)
        self.classes = []
        try:
            folders = _folders(self.root)
            val = next((name for name in VAL_NAMES if name in folders), None)
            part = "."
            if "train" in folders:
                part = val if split == "val" and val is not None else "train"
            self.has_val = part != "." and val is not None
            self._find(part, [part])
        except (OSError, UnicodeEncodeError) as error:
            raise setting_error(self.setting, config.path, f"cannot be read: {error}") from error
