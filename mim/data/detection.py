"""What a folder of images is, for ``data.source=auto``."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from mim.core.errors import UserError, setting_error
from mim.core.files import IMAGE_EXTENSIONS, is_hidden, walk
from mim.data.places.fetch import is_url
from mim.data.places.splits import find_splits, split_of
from mim.data.sources.folder import folders_in, holds_images
from mim.data.storage.packed import MANIFEST

FOLDERS = ("auto", "imagefolder", "flat")
"""Sources that may read images in a folder."""
_ENDINGS = {".tar": "shards", ".parquet": "huggingface"}


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
        for ending, source in _ENDINGS.items():
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
    below = folders_in(folder)
    train, val = _splits(below)
    root = folder if train is None else folder / train
    if not _has(root, IMAGE_EXTENSIONS):
        for ending, source in _ENDINGS.items():
            if _has(folder, (ending,)):
                return source, f"{ending.removeprefix('.')} files"
    said = "" if train is None else f"{train}/" + (f" and {val}/, in them " if val else ", in it ")
    classes = [
        name
        for name in (below if train is None else folders_in(root))
        if _has(root / name, IMAGE_EXTENSIONS)
    ]
    beside = holds_images(root)
    if beside or len(classes) < 2:
        kind = "images beside folders" if beside and classes else "images without class folders"
        return "flat", f"{said}{kind}: no labels{_parent(folder) if root is folder else ''}"
    return "imagefolder", f"{said}{len(classes)} folders of images, taken for classes"


def _splits(folders: list[str]) -> tuple[str | None, str | None]:
    try:
        return find_splits(folders)
    except UserError:  # the source says what is wrong with the folders
        return None, None


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
    train, val = _splits(folders_in(images)) if divided else (None, None)
    is_beside = train is not None and parts[:1] not in ((train,), (val,))
    if not is_beside and not any(map(is_hidden, parts)):
        reason = f"lies among the images of {root}, and what is written there would be taken for "
        raise setting_error(setting, str(output), reason + "images; choose a place outside")


def _parent(folder: Path) -> str:
    """Words that name the folder above where this one seems to be one class of several."""
    place = folder.resolve()
    try:
        if split_of(place.name) is not None or not holds_images(place):
            return ""
        others = (name for name in folders_in(place.parent) if name != place.name)
        beside = next((name for name in others if holds_images(place.parent / name)), None)
    except OSError:  # nothing can be said of what lies beside it
        return ""
    return f"; if it is one class beside {beside}, give {folder.parent}" if beside else ""


def _has(root: Path, endings: tuple[str, ...]) -> bool:
    few = islice(walk(root), 10_000)  # a set of more folders has shown what it is
    return any(name.lower().endswith(endings) for folder in few for name in folder.files)
