"""Images in folders, one for each class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mim.config import DataConfig
from mim.data.decode import DECODE_ERRORS, EXTENSIONS
from mim.data.sources import IMAGENET, SOURCES, ImageSource, Split
from mim.errors import UserError, setting_error
from mim.keys import name_to_int

# Reading so many headers takes a second or two; above that a bad file shows when it is decoded.
_HEADERS_CHECKED = 20_000


def _folders(path: Path) -> list[str]:
    """Names of the visible sub-folders, sorted."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _raise(error: OSError) -> None:
    """For os.walk, which would pass over a folder that it may not read."""
    raise error


def _files(root: Path, folder: str) -> list[str]:
    """POSIX paths, relative to ``root``, of the images anywhere below ``root/folder``, sorted."""
    found = []
    for place, folders, names in os.walk(root / folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(place).relative_to(root).as_posix()
        found += [
            f"{relative}/{name}"
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


@SOURCES.register("imagefolder")
class ImageFolder(ImageSource):
    """Images in one folder a class: ``data.path/train/CLASS/...`` and ``data.path/val/CLASS/...``.

    ``valid/`` or ``test/`` stand in for a missing ``val/``; with neither, or with the class folders
    directly in ``data.path``, a share of the images is held out. Ids come from the paths relative
    to ``data.path``, with forward slashes.
    """

    mean, std = IMAGENET

    def __init__(self, config: DataConfig, split: Split) -> None:
        if config.path is None:
            raise setting_error("data.path", None, "is needed by data.source=imagefolder")
        self.root = Path(config.path)
        if not self.root.is_dir():
            raise setting_error("data.path", config.path, "is not a folder")
        self.name = "imagefolder"
        self._given = config.path
        try:
            train, part = self._divide(split)
            self.classes = self._class_folders(train)
            if part != train:
                self._check_classes(part)
            files, labels = self._list(part)
            ids = [name_to_int(file) for file in files]
        except (OSError, UnicodeEncodeError) as error:
            raise setting_error("data.path", config.path, f"cannot be read: {error}") from error
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.sample_ids = torch.tensor(ids, dtype=torch.int64)
        # One array: a list of a million strings is copied into every worker, page by page.
        self._paths = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)

    def _divide(self, split: Split) -> tuple[str, str]:
        """Folders, relative to the root, of the training images and of the wanted ones."""
        if not (self.root / "train").is_dir():
            folders = _folders(self.root)
            if folders and set(folders) <= {"val", "valid", "test"}:
                raise setting_error("data.path", self._given, f"has {folders[0]}/ but no train/")
            self.has_val = False
            return ".", "."
        for name in ("val", "valid", "test"):
            if (self.root / name).is_dir():
                return "train", "train" if split == "train" else name
        self.has_val = False
        return "train", "train"

    def _class_folders(self, part: str) -> list[str]:
        classes = _folders(self.root / part)
        if not classes:
            reason = f"has no class sub-folders in {(self.root / part).as_posix()}"
            raise setting_error("data.path", self._given, reason)
        return classes

    def _check_classes(self, part: str) -> None:
        unknown = sorted(set(self._class_folders(part)) - set(self.classes))
        if unknown:
            reason = f"has the class {unknown[0]!r} in {part} but not in train"
            raise setting_error("data.path", self._given, reason)

    def _list(self, part: str) -> tuple[list[str], list[int]]:
        """Files of one part and the position of each one's class."""
        files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            folder = name if part == "." else f"{part}/{name}"
            if not (self.root / folder).is_dir():  # a class may be missing in val
                continue
            found = _files(self.root, folder)
            if not found:
                reason = f"has an empty class: no image in {(self.root / folder).as_posix()}"
                raise setting_error("data.path", self._given, reason)
            files += found
            labels += [label] * len(found)
        return files, labels

    def describe(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.root / os.fsdecode(self._paths[index])

    def _unreadable(self, index: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        path = self.path(index)
        return setting_error("data.path", self._given, f"has an unreadable image {path}: {reason}")

    def image(self, index: int) -> Image.Image:
        try:
            with Image.open(self.path(index)) as image:
                image.load()
        except DECODE_ERRORS as error:
            raise self._unreadable(index, error) from error
        return image

    def check(self, indices: Tensor | None = None) -> None:
        """Reads the header of each file, if they are 20,000 at most."""
        chosen = range(len(self)) if indices is None else indices.tolist()
        if len(chosen) > _HEADERS_CHECKED:
            return
        for index in chosen:
            try:
                with Image.open(self.path(index)):
                    pass
            except DECODE_ERRORS as error:
                raise self._unreadable(index, error) from error
