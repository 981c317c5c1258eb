"""Figures that other verbs left in the run folders: attention, analyses, segmentations, ..."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from mim.core.errors import UserError
from mim.report.collect import Comparison, Run
from mim.report.figures import Picture, data_uri

_PATTERNS = (
    "attention.png", "masks.png", "algebra.png", "reconstruct.png",
    "analysis/*.png", "pictures/segment.png", "pictures/detect.png", "figures/*.png",
)  # fmt: skip
"""In a run folder: what verbs and evaluations draw, and in ``figures/`` what users add."""
_CAPTIONS = {
    "attention": "what its tokens attend to",
    "layers": "what each layer holds",
    "segment": "segmentation",
    "detect": "detection",
    "reconstruct": "reconstructions",
}
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
        kind, content = _shrunk(path)
        if size + len(content) > _BYTES:
            left.append(path)
            continue
        size += len(content)
        what = _CAPTIONS.get(path.stem, path.stem.replace("_", " "))
        caption = f"{run.name}: {what}"
        picture = Picture(data_uri(kind, content), f"Figure of the run {run.name}: {what}")
        shown.append((caption, picture))
    return shown, left


def _files(comparison: Comparison) -> list[tuple[Run, Path]]:
    found = []
    # The first seed of every encoder before the second of any: the room may end.
    for run in sorted(comparison.runs, key=lambda run: run.seed):
        for pattern in _PATTERNS:
            found += [(run, path) for path in sorted(run.folder.glob(pattern))]
    return found


def _shrunk(path: Path) -> tuple[str, bytes]:
    """(media type, content): a plot is smaller as PNG of few colours, photographs as JPEG."""
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: is no picture ({error})") from error
    image.thumbnail((_SIDE, 4 * _SIDE))
    forms = []
    plain = image.quantize(256, kmeans=1, dither=Image.Dither.NONE)
    for form, picture in (("PNG", plain), ("JPEG", image)):
        buffer = io.BytesIO()
        picture.save(buffer, format=form, optimize=True, quality=85)
        forms.append((f"image/{form.lower()}", buffer.getvalue()))
    return min(forms, key=lambda form: len(form[1]))
