"""Figures that other verbs left in the run folders, attention and analyses above all."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from mim.errors import UserError
from mim.report.collect import Comparison, Run
from mim.report.figures import Picture, data_uri

_NAMED = ("attention.png", "masks.png", "algebra.png", "reconstruct.png")
_SIDE = 1100
_BYTES = 1_500_000
"""What all of them may add to a page; the rest is named, with where it lies."""


def gallery(comparison: Comparison) -> tuple[list[tuple[str, Picture]], list[Path]]:
    """Pictures of ``mim visualize`` and of ``figures/`` in the run folders.

    Returns:
        (caption, picture) of those that the page holds, and the paths of those it has no room for.

    Raises:
        UserError: if one is no picture.
    """
    shown: list[tuple[str, Picture]] = []
    left: list[Path] = []
    size = 0
    for run, path in _files(comparison):
        content = _shrunk(path)
        if size + len(content) > _BYTES:
            left.append(path)
            continue
        size += len(content)
        what = path.stem.replace("_", " ")
        caption = f"{run.name}: {what}"
        picture = Picture(data_uri("image/png", content), f"Figure {what} of the run {run.name}")
        shown.append((caption, picture))
    return shown, left


def _files(comparison: Comparison) -> list[tuple[Run, Path]]:
    found = []
    for run in comparison.runs:
        paths = [run.folder / name for name in _NAMED]
        paths += sorted((run.folder / "figures").glob("*.png"))
        found += [(run, path) for path in paths if path.is_file()]
    return found


def _shrunk(path: Path) -> bytes:
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: is no picture ({error})") from error
    image.thumbnail((_SIDE, 4 * _SIDE))
    # Few colours are enough for a plot and spare most of the bytes.
    image = image.quantize(256, kmeans=1, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
