"""Charts drawn by matplotlib: inside the page as SVG, beside it as PNG and PDF."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mim.report.charts import Chart, Drawing, Forest, HeatMap
from mim.report.collect import REFERENCES

FORMATS = ("svg", "png", "pdf")
_RC: Any = {
    "text.parse_math": False,  # a name with dollar signs is a name
    "svg.fonttype": "path",  # looks the same without the font
    "svg.hashsalt": "mim",  # the same report gives the same bytes
    "pdf.fonttype": 42,  # journals refuse Type 3 fonts
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
class Picture:
    """An image inside the page."""

    source: str
    """Data URI."""
    alt: str
    small: bool = False
    """Whether its pixels are shown enlarged and must stay sharp."""


def draw(drawing: Drawing, forms: tuple[str, ...]) -> dict[str, bytes]:
    """What is drawn as svg, png (200 dots an inch) and pdf; the same gives the same bytes."""
    if isinstance(drawing, Forest):
        return _draw_forest(drawing, forms)
    if isinstance(drawing, HeatMap):
        return _draw_heat_map(drawing, forms)
    return _draw_chart(drawing, forms)


def _draw_chart(chart: Chart, forms: tuple[str, ...]) -> dict[str, bytes]:
    entries = len(chart.lines) + len(chart.clouds) + len(chart.levels)
    with _figure(_panel_size(entries)) as (figure, axes):
        for line in chart.lines:
            style = line.style
            axes.plot(
                line.x, line.mean, style.line, color=style.colour, markersize=4, linewidth=1.6,
                marker=style.marker if len(line.x) <= 15 else None, label=_shown(line.label),
            )  # fmt: skip
            if line.spread is not None:
                low, high = line.mean - line.spread, line.mean + line.spread
                axes.fill_between(line.x, low, high, color=style.colour, alpha=0.18, lw=0)
        for cloud in chart.clouds:
            style = cloud.style
            axes.scatter(cloud.x, cloud.y, s=14, color=style.colour, alpha=0.35, lw=0)
            axes.errorbar(
                cloud.x.mean(), cloud.y.mean(), yerr=cloud.sd, color=style.colour,
                marker=style.marker, markersize=7, capsize=3, linestyle="none",
                label=_shown(cloud.label),
            )  # fmt: skip
        for level in chart.levels:
            style, label = level.style, _shown(level.label)
            look: Any = {"color": style.colour, "linestyle": style.line, "lw": 1.2, "label": label}
            if chart.is_inside(level):
                axes.axhline(level.y, **look)
            else:
                axes.plot([], [], **look)
        if chart.x_log:
            axes.set_xscale("log")
        if chart.x_limit is not None:
            axes.set_xlim(0, chart.x_limit)
        if chart.y_limits is not None:
            axes.set_ylim(*chart.y_limits)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        _legend(figure, axes)
        return _saved(figure, forms)


_DIVERGING = LinearSegmentedColormap.from_list("mim", ("#E69F00", "#FFFFFF", "#56B4E9"))
_VERDICT_COLOURS = {"different": "#0072B2", "as good": "#009E73"}


def _draw_forest(forest: Forest, forms: tuple[str, ...]) -> dict[str, bytes]:
    """Differences as dots with intervals, the numbers and the verdict beside each.

    Thick: the interval over seeds on these test images. Thin: the one for new images. Shaded: the
    margin within which two groups are as good as each other.
    """
    count = len(forest.rows)
    longest = max(len(row.label) for row in forest.rows)
    with _figure(size=(6.4 + 0.055 * longest, 0.95 + 0.34 * count)) as (figure, axes):
        if forest.margin:
            axes.axvspan(-forest.margin, forest.margin, color="#009E73", alpha=0.1, lw=0)
        axes.axvline(0, color="#1c1e21", lw=1)
        for place, row in enumerate(forest.rows):
            colour = _VERDICT_COLOURS.get(row.verdict, "#6B6B6B")
            if row.wide:
                axes.plot(row.wide, (place, place), color=colour, lw=1.1)
            if row.interval:
                axes.plot(row.interval, (place, place), color=colour, lw=3.4)
            axes.plot(row.mean, place, "o", color=colour, markersize=7, mec="white", mew=0.8)
            where: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
            axes.text(1.02, place, f"{row.text}  {row.verdict}", color=colour, **where)
        key = [f"shaded: as good within {forest.margin:g}"] if forest.margin else []
        key += ["thin line: for new images"] if any(row.wide for row in forest.rows) else []
        label = "\n".join(filter(None, (forest.x_label, "; ".join(key))))
        axes.set(xlabel=label, ylim=(count - 0.4, -0.6))
        axes.set_yticks(range(count), [_shown(row.label) for row in forest.rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        return _saved(figure, forms)


def _draw_heat_map(heat: HeatMap, forms: tuple[str, ...]) -> dict[str, bytes]:
    """Numbers as colours, orange below 0 and blue above, each written into its field."""
    size = (1.6 + 1.35 * len(heat.columns), 1.0 + 0.62 * len(heat.rows))
    with _figure(size) as (figure, axes):
        reach = float(np.nanmax(np.abs(heat.values), initial=1e-12))
        axes.imshow(heat.values, cmap=_DIVERGING, vmin=-reach, vmax=reach, aspect="auto")
        for row, texts in enumerate(heat.texts):
            for column, text in enumerate(texts):
                weight: Any = "bold" if heat.bold[row][column] else "normal"
                place: Any = {"ha": "center", "va": "center", "fontsize": 8, "color": "black"}
                axes.text(column, row, text, weight=weight, **place)
        axes.set_xticks(range(len(heat.columns)), [_shown(text) for text in heat.columns])
        axes.set_yticks(range(len(heat.rows)), [_shown(text) for text in heat.rows])
        axes.set(xlabel=heat.x_label, ylabel=heat.y_label)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _saved(figure, forms)


def _saved(figure: Figure, forms: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    dates = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
    for form in forms:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=200, metadata=dates.get(form))
        found[form] = buffer.getvalue()
    return found


def _panel_size(entries: int) -> tuple[float, float]:
    """Width and height in inches, with room for a legend of ``entries`` below."""
    return 4.6, 3.1 + 0.2 * -(-entries // _legend_columns(entries))


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _legend_columns(entries: int) -> int:
    return 3 if entries <= 6 else 2


def _legend(figure: Figure, axes: Axes) -> None:
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


def _shown(label: str) -> str:
    """A label that matplotlib does not hide: it leaves out those with a leading underscore."""
    return f" {label}" if label.startswith("_") else label


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as a URI that loads nothing."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
