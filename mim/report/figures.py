"""The figures of a report, as data URIs: nothing to load, nothing to run.

Colours are those of Okabe and Ito (2008), "Color Universal Design", which people with any common
colour blindness tell apart; line styles and markers say the same again.
"""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from mim.errors import UserError
from mim.report.collect import (
    REFERENCES,
    Comparison,
    Group,
    Run,
    read_metrics,
    show_value,
)
from mim.report.statistics import summarize
from mim.report.tables import Measure, evaluation_measures, time_unit

_KNOWN_COLOURS = {"drop": "#0072B2", "zero": "#D55E00", "token": "#009E73"}
_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#5D3A9B", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_REFERENCE_LINES = {
    "untrained": ("#6B6B6B", "--"),
    "pixels": ("#000000", ":"),
    "given": ("#6B6B6B", "-."),
}
_TILE = 112
"""Pixels that a small image is enlarged to at least; twice this bounds a large one."""
_IMAGES = 8
"""How many images the reconstructions show."""
_RC: Any = {
    "text.parse_math": False,  # a name with dollar signs is a name
    "svg.fonttype": "path",  # looks the same without the font
    "svg.hashsalt": "mim",  # the same report gives the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Style:
    """How a group is drawn, the same in every figure."""

    colour: str
    line: str
    marker: str


@dataclass(frozen=True)
class Picture:
    """An image inside the page."""

    source: str
    """Data URI."""
    alt: str
    small: bool = False
    """Whether pixels were enlarged and must stay sharp."""


@dataclass(frozen=True)
class TileGroup:
    """A heading above some columns of reconstructions."""

    label: str
    colour: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Tiles:
    """Reconstructions: rows are images, columns stand under the headings of ``groups``."""

    groups: tuple[TileGroup, ...]
    rows: tuple[tuple[Picture, ...], ...]
    caption: str

    @property
    def starts(self) -> set[int]:
        """Indices of the columns that open a group, except the first: a gap stands before them."""
        return set(accumulate(len(group.columns) for group in self.groups[:-1]))


def styles(comparison: Comparison) -> dict[str, Style]:
    """Label of a group -> its style.

    The regime sets the colour (without one, the first axis); the other axes set line and marker.
    """
    axes = [key for key in comparison.axes if key != "seed"]
    regime = [key for key in axes if key.endswith("regime.name")]
    main = (regime or axes or [""])[0]
    colours: dict[str, str] = {}
    variants: dict[str, int] = {}
    found = {}
    for group in comparison.groups:
        value = show_value(group.axes[main]) if main in group.axes else group.label
        unused = [colour for colour in _COLOURS if colour not in colours.values()]
        fallback = unused[0] if unused else _COLOURS[len(colours) % len(_COLOURS)]
        colour = colours.setdefault(value, _KNOWN_COLOURS.get(value, fallback))
        rest = str([show_value(group.axes[key]) for key in group.axes if key != main])
        variant = variants.setdefault(rest, len(variants))
        # With a single variant the marker repeats the colour; otherwise it tells variants apart.
        single = len(comparison.groups) == len(colours)
        marker = _MARKERS[(len(colours) - 1 if single else variant) % len(_MARKERS)]
        found[group.label] = Style(colour, _LINES[variant % len(_LINES)], marker)
    return found


def loss_curves(comparison: Comparison) -> list[Picture]:
    """Training and held-out loss over epochs: mean over seeds, band of one standard deviation."""
    look = styles(comparison)
    pictures = []
    for key, name in (("loss", "Training loss"), ("val_loss", "Held-out loss")):
        curves = {
            group.label: curve for group in comparison.groups if (curve := mean_curve(group, key))
        }
        if not curves:
            continue
        with _figure(len(curves)) as (figure, axes):
            for label, (epochs, mean, spread, _) in curves.items():
                style = look[label]
                marker = style.marker if len(epochs) <= 15 else None
                axes.plot(
                    epochs, mean, style.line, color=style.colour, marker=marker, markersize=4,
                    linewidth=1.6, label=_shown(label),
                )  # fmt: skip
                if spread is not None:
                    low, high = mean - spread, mean + spread
                    axes.fill_between(epochs, low, high, color=style.colour, alpha=0.18, lw=0)
            axes.set(xlabel="epoch", ylabel=name.lower())
            ends = [
                f"{label} ends at {mean[-1]:.4g} (n = {n})"
                for label, (_, mean, _, n) in curves.items()
            ]
            alt = f"{name} against epoch. {'; '.join(ends)}."
            pictures.append(_svg(figure, axes, alt))
    return pictures


def mean_curve(
    group: Group, key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None, int] | None:
    """Mean of a metric over the finished runs of a group, at the steps that all of them logged.

    Returns:
        (epochs, mean, standard deviation or none with one run, number of runs); none without data.
    """
    curves: list[dict[int, tuple[float, float]]] = []
    for run in group.finished:
        # A resumed run may log a step twice: the later line counts.
        points = {
            int(line["step"]): (line["epoch"], line[key])
            for line in read_metrics(run)
            if line.get(key) is not None
        }
        if points:
            curves.append(points)
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return None
    epochs = np.array([curves[0][step][0] for step in steps], dtype=np.float64)
    values = np.array([[curve[step][1] for step in steps] for curve in curves], dtype=np.float64)
    spread = values.std(axis=0, ddof=1) if len(curves) > 1 else None
    return epochs, values.mean(axis=0), spread, len(curves)


def quality_against_compute(comparison: Comparison) -> list[Picture]:
    """Each evaluation's first measure over training FLOPs and over wall time."""
    first: dict[str, Measure] = {}
    for measure in evaluation_measures(comparison):
        first.setdefault(measure.section, measure)
    pictures = []
    for measure in first.values():
        for key, name in (("train_flops", "training compute"), ("wall_seconds", "wall time")):
            picture = _quality(comparison, measure, key, name)
            if picture:
                pictures.append(picture)
    return pictures


def _quality(comparison: Comparison, measure: Measure, key: str, name: str) -> Picture | None:
    look = styles(comparison)
    points = {}
    for group in comparison.groups:
        costs, values = group.values(key), group.values(measure.key)
        seeds = sorted(costs.keys() & values.keys())
        if seeds:
            points[group.label] = ([costs[s] for s in seeds], [values[s] for s in seeds])
    if not points:
        return None
    largest = max(max(spent) for spent, _ in points.values())
    per_unit, unit = time_unit(largest) if key == "wall_seconds" else _flops_unit(largest)
    levels = []
    for reference in comparison.references:
        summary = summarize(reference.values(measure.key).values())
        if summary:
            levels.append((reference, summary.mean * measure.scale))
    with _figure(len(points) + len(levels)) as (figure, axes):
        said = []
        for label, (spent, reached) in points.items():
            style = look[label]
            xs = np.array(spent) / per_unit
            ys = np.array(reached) * measure.scale
            spread = summarize(ys)
            axes.scatter(xs, ys, s=14, color=style.colour, alpha=0.35, lw=0)
            axes.errorbar(
                xs.mean(), ys.mean(), yerr=spread.sd if spread else None, color=style.colour,
                marker=style.marker, markersize=7, capsize=3, linestyle="none",
                label=_shown(label),
            )  # fmt: skip
            said.append(f"{label}: {ys.mean():.4g} at {xs.mean():.3g} {unit}")
        for reference, level in levels:
            colour, line = _REFERENCE_LINES[reference.kind]
            axes.axhline(level, color=colour, linestyle=line, lw=1.2, label=_shown(reference.label))
            said.append(f"{reference.label}: {level:.4g}")
        axes.set_xlim(0, largest / per_unit * 1.1)
        axes.margins(y=0.12)
        axes.set(xlabel=f"{name} ({unit})", ylabel=measure.title)
        return _svg(figure, axes, f"{measure.title} against {name}. {'; '.join(said)}.")


def reconstructions(comparison: Comparison) -> Tiles | None:
    """The same images under the same masks in every group, side by side.

    What the groups share (originals, masked images) stands once; what they do not, under each.
    Every group shows its run with the first seed that all groups have.
    """
    available = {
        group.label: {run.seed: run for run in group.finished if _pictures_of(run).is_file()}
        for group in comparison.groups
    }
    available = {label: runs for label, runs in available.items() if runs}
    if not available:
        return None
    shared = set.intersection(*(set(runs) for runs in available.values()))
    shown = {label: runs[min(shared) if shared else min(runs)] for label, runs in available.items()}
    arrays = {label: _load(run) for label, run in shown.items()}
    look = styles(comparison)
    first = next(iter(arrays.values()))
    common = [
        key
        for key in ("original", "masked")
        if all(np.array_equal(first[key], other[key]) for other in arrays.values())
    ]
    own = [key for key in ("original", "masked", "prediction", "composite") if key not in common]
    names = {"composite": "with visible patches"}
    columns: list[tuple[str, str]] = [("", key) for key in common]
    groups = [TileGroup("", "transparent", tuple(common))] if common else []
    for label in arrays:
        columns += [(label, key) for key in own]
        heads = tuple(names.get(key, key) for key in own)
        groups.append(TileGroup(label, look[label].colour, heads))
    count = min(_IMAGES, *(len(array["original"]) for array in arrays.values()))
    rows = []
    for index in range(count):
        row = []
        for label, key in columns:
            image = (arrays[label] if label else first)[key][index]
            alt = f"Image {index + 1}, {f'{label}, ' if label else ''}{names.get(key, key)}"
            row.append(_tile(image, alt))
        rows.append(tuple(row))
    same = len(common) == 2
    what = "The same images under the same masks" if same else "Masks or images differ by group"
    seeds = sorted({run.seed for run in shown.values()})
    plural = "seed" if len(seeds) == 1 else "seeds"
    caption = (
        f"{what}; {plural} {', '.join(map(str, seeds))}. Prediction: what the decoder "
        "says of every patch. With visible patches: the hidden patches predicted, the others given."
    )
    return Tiles(tuple(groups), tuple(rows), caption)


def _pictures_of(run: Run) -> Path:
    return run.folder / "reconstructions.npz"


def _load(run: Run) -> Mapping[str, NDArray[np.uint8]]:
    path = _pictures_of(run)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in ("original", "masked", "prediction", "composite")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as reconstructions ({error})") from error


def _tile(array: NDArray[np.uint8], alt: str) -> Picture:
    """One image as PNG: (H, W, C) with 1 channel gray, with 3 colour, otherwise the first."""
    height, width, channels = array.shape
    pixels = array if channels == 3 else array[..., 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    side = max(height, width)
    small = side < _TILE
    if small:
        factor = -(-_TILE // side)
        image = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    elif side > 2 * _TILE:
        factor = 2 * _TILE / side
        size = (max(round(width * factor), 1), max(round(height * factor), 1))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Picture(_data_uri("image/png", buffer.getvalue()), alt, small)


@contextmanager
def _figure(entries: int) -> Iterator[tuple[Figure, Axes]]:
    """A panel with room for a legend of so many entries below it."""
    with mpl.rc_context(_RC):
        rows = -(-entries // _legend_columns(entries))
        figure = Figure(figsize=(4.6, 3.1 + 0.2 * rows), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _legend_columns(entries: int) -> int:
    return 3 if entries <= 6 else 2


def _svg(figure: Figure, axes: Axes, alt: str) -> Picture:
    # Groups first, then the references: matplotlib would list lines before points.
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    references = [label for label in entries if label.startswith(tuple(REFERENCES.values()))]
    ordered = [label for label in entries if label not in references] + references
    figure.legend(
        [entries[label] for label in ordered],
        ordered,
        loc="outside lower center",
        ncols=_legend_columns(len(ordered)),
        fontsize=9,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(_data_uri("image/svg+xml", buffer.getvalue()), alt)


def _shown(label: str) -> str:
    """A label that matplotlib does not hide: it leaves out those with a leading underscore."""
    return f" {label}" if label.startswith("_") else label


def _flops_unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e18, "EFLOPs"), (1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs")):
        if largest >= scale:
            return scale, unit
    return 1e6, "MFLOPs"


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
