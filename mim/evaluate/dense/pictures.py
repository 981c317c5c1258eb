"""Pictures of what a dense evaluation predicts, beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mim.data import ImageSource, Picture
from mim.evaluate.dense.views import stack_pixels
from mim.training.checkpoint import write_atomic
from mim.training.pictures import as_rgb, shown_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VOID_COLOUR = (0.85, 0.85, 0.85)
_WIDTH = 3.2  # inches of an image


def class_colours(count: int) -> NDArray[np.float64]:
    """(count, 3), well apart for the first 20, then evenly around the circle of hues."""
    from matplotlib import colormaps

    if count <= 20:
        # The saturated half of the palette first, so that few classes differ the most.
        order = [*range(0, 20, 2), *range(1, 20, 2)]
        colours = np.asarray(colormaps["tab20"].colors)[order][:count]  # type: ignore[attr-defined]
        return np.asarray(colours, dtype=np.float64)
    return np.asarray(colormaps["hsv"](np.arange(count) / count))[:, :3]


def shown(image: Picture, source: ImageSource) -> NDArray[np.uint8]:
    """(H, W, 3) of an image of a source, its contrast stretched where it has more than 8 bits."""
    return as_rgb(shown_pixels(stack_pixels([np.asarray(image)]), source))[0]


def paint(labels: NDArray[Any], colours: NDArray[np.float64]) -> NDArray[np.float64]:
    """(H, W) labels -> (H, W, 3); what is no class is gray."""
    known = (labels >= 0) & (labels < len(colours))
    painted = colours[np.where(known, labels, 0).astype(np.int64)]
    painted[~known] = _VOID_COLOUR
    return painted


def _grid(images: Sequence[NDArray[np.uint8]], titles: Sequence[str]) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    tallest = max(image.shape[0] / image.shape[1] for image in images)
    size = (_WIDTH * len(titles), (_WIDTH * tallest + 0.1) * len(images) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    return figure, axes


def _finish(
    figure: Figure, classes: Sequence[str], colours: NDArray[np.float64], path: Path, void: bool
) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=tuple(c), label=n) for n, c in zip(classes, colours, strict=True)]
    if void:
        patches.append(Patch(facecolor=_VOID_COLOUR, label="void"))
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 7))
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def segmentation_picture(
    rows: Sequence[tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Writes a PNG: a row an image; image, truth, prediction; below, the classes' colours.

    Args:
        rows: image (H, W, 3), true labels and predicted labels (H, W); a label that is no class is
            void.
        classes: their names.
        path: of the file; its folder is made.
    """
    colours = class_colours(len(classes))
    figure, axes = _grid([row[0] for row in rows], ("image", "truth", "prediction"))
    for line, (image, truth, predicted) in zip(axes, rows, strict=True):
        line[0].imshow(image)
        line[1].imshow(paint(truth, colours), interpolation="nearest")
        line[2].imshow(paint(predicted, colours), interpolation="nearest")
    used = [row[1] for row in rows]
    _finish(figure, classes, colours, path, void=any((labels < 0).any() for labels in used))


def detection_picture(
    rows: Sequence[tuple[NDArray[np.uint8], dict[str, NDArray[Any]], dict[str, Any]]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """Writes a PNG: a row an image; the true boxes and the predicted ones; the classes' colours.

    Args:
        rows: image (H, W, 3), truth and prediction, each ``boxes`` (n, 4) and ``labels`` (n,) from
            0, the prediction with ``scores`` (n,); ``masks`` (n, H, W) where there are any.
        classes: their names.
        path: of the file; its folder is made.
    """
    from matplotlib.patches import Rectangle

    colours = class_colours(len(classes))
    figure, axes = _grid([row[0] for row in rows], ("truth", "prediction"))
    for line, (image, *marked) in zip(axes, rows, strict=True):
        for axis, objects in zip(line, marked, strict=True):
            axis.imshow(image)
            for number, (box, label) in enumerate(
                zip(objects["boxes"].tolist(), objects["labels"].tolist(), strict=True)
            ):
                left, top, right, bottom = box
                colour = tuple(colours[label])
                frame = (left, top), right - left, bottom - top
                axis.add_patch(Rectangle(*frame, fill=False, edgecolor=colour, linewidth=1.2))
                if "scores" in objects:
                    text = f"{objects['scores'][number]:.2f}"
                    axis.text(left, top, text, fontsize=5, color="white", backgroundcolor=colour)
                if "masks" in objects:
                    shade = np.zeros((*objects["masks"].shape[1:], 4))
                    shade[objects["masks"][number] > 0] = (*colour, 0.4)
                    axis.imshow(shade)
    _finish(figure, classes, colours, path, void=False)
