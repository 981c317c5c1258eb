"""What a folder of images is, for ``data.source=auto``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mim.core.errors import UserError, setting_error
from mim.core.files import IMAGE_EXTENSIONS, is_folder, is_hidden, walk
from mim.data.places.fetch import is_url
from mim.data.places.splits import find_splits, split_of
from mim.data.storage.packed import MANIFEST

FOLDERS = ("auto", "imagefolder", "flat")
"""Sources that may read images in a folder."""


def detect(path: str | None) -> tuple[str, str]:
    """The source that reads a path, and what was seen there, in words.

    A folder with split or class folders is ``imagefolder``: sub-folders with images, two at least,
    and no images beside them. One with tar files is ``shards``, with parquet files
    ``huggingface``, with a manifest of ``mim data pack`` ``packed``; any other is ``flat``.

    Raises:
        UserError: if there is no path, or nothing there that is known.
    """
    if path is None:
        raise setting_error("data.path", None, "is needed by data.source=auto")
    folder = Path(path)
    if not folder.is_dir():
        for source, ending in (("shards", ".tar"), ("huggingface", ".parquet")):
            if path.rstrip("}").endswith(ending):
                return source, f"{ending.removeprefix('.')} files"
        reason = "is neither a folder nor .tar or .parquet files"
        reason = "is a URL of no .tar or .parquet files" if is_url(path) else reason
        raise setting_error("data.path", path, f"{reason}, which data.source=auto knows")
    if (folder / MANIFEST).is_file():
        return "packed", "a set written by mim data pack"
    try:
        return _folder(folder)
    except OSError as error:
        raise setting_error("data.path", path, f"cannot be read: {error}") from error


def _folder(folder: Path) -> tuple[str, str]:
    names = [entry.name for entry in os.scandir(folder) if not is_hidden(entry.name)]
    below = sorted(name for name in names if (folder / name).is_dir())
    try:
        train, val = find_splits(below)
    except UserError:  # the source says what is wrong with the folders
        train, val = None, None
    root = folder if train is None else folder / train
    if not _has(root, IMAGE_EXTENSIONS):
        for source, ending in (("shards", ".tar"), ("huggingface", ".parquet")):
            if _has(folder, (ending,)):
                return source, f"{ending.removeprefix('.')} files"
    said = "" if train is None else f"{train}/" + (f" and {val}/, in them " if val else ", in it ")
    classes = [
        name
        for name in (below if train is None else _folders(root))
        if _has(root / name, IMAGE_EXTENSIONS)
    ]
    beside = any(name.lower().endswith(IMAGE_EXTENSIONS) for name in os.listdir(root))
    if beside or len(classes) < 2:
        kind = "images beside folders" if beside and classes else "images without class folders"
        return "flat", f"{said}{kind}: no labels{_parent(folder) if root is folder else ''}"
    return "imagefolder", f"{said}{len(classes)} folders of images, taken for classes"


def keep_outside(setting: str, output: Path, root: str | None, divided: bool = True) -> None:
    """Refuse to write among images, where a picture or an array would be an image next time.

    Args:
        setting: what messages call the output.
        output: a file, or a folder of files.
        root: a folder of images.
        divided: whether what stands beside its ``train/`` and ``val/`` is not read.

    Raises:
        UserError: if it lies there.
    """
    if root is None or not Path(root).is_dir() or output.suffix in (".csv", ".json", ".parquet"):
        return
    images, place = Path(root).resolve(), output.resolve()
    if not place.is_relative_to(images):
        return
    parts = place.relative_to(images).parts
    try:
        train, val = find_splits(_folders(images)) if divided else (None, None)
    except UserError:  # the source says what is wrong with the folders
        train, val = None, None
    is_beside = train is not None and parts[:1] not in ((train,), (val,))
    if not is_beside and not any(map(is_hidden, parts)):
        reason = f"lies among the images of {root}, and what is written there would be taken for "
        raise setting_error(setting, str(output), reason + "images; choose a place outside")


def _parent(folder: Path) -> str:
    """Words that name the folder above where this one seems to be one class of several."""
    place = folder.resolve()
    try:
        others = (n for n in _folders(place.parent) if n != place.name and _holds(place.parent / n))
        beside = next(others, None) if _holds(place) and split_of(place.name) is None else None
    except OSError:  # nothing can be said of what lies beside it
        beside = None
    return f"; if it is one class beside {beside}, give {folder.parent}" if beside else ""


def _holds(folder: Path) -> bool:
    """Whether images lie directly in a folder."""
    return any(name.lower().endswith(IMAGE_EXTENSIONS) for name in os.listdir(folder))


def _folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if is_folder(e) and not is_hidden(e.name))


def _files(root: Path) -> Iterator[str]:
    for folder in islice(walk(root), 10_000):  # a set of more folders has shown what it is
        yield from folder.files


def _has(root: Path, endings: tuple[str, ...]) -> bool:
    return any(name.lower().endswith(endings) for name in _files(root))
