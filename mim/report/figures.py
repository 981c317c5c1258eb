"""Charts drawn by matplotlib: inside the page as SVG, beside it as PNG and PDF."""

from __future__ import annotations

import base64
import io
import textwrap
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
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from mim.report.charts import Chart, Cloud, Drawing, Forest, HeatMap, Level, Line

FORMATS = ("svg", "png", "pdf")
_WIDTH = 4.6
"""Inches of a chart, or more where its legend needs them."""
_Y_LETTERS = 32
"""Of a line of a label beside a chart."""
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
    entries: list[Line | Cloud | Level] = [*chart.lines, *chart.clouds, *chart.levels]
    labels = [_shown(entry.label) for entry in entries]
    columns, width = _legend_room(labels)
    size = (max(_WIDTH, width), 3.1 + 0.2 * -(-len(labels) // columns))
    with _figure(size) as (figure, axes):
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
            _set_log(axes, np.unique([x for line in chart.lines for x in line.x]))
        if chart.x_limit is not None:
            axes.set_xlim(0, chart.x_limit)
        if chart.y_limits is not None:
            axes.set_ylim(*chart.y_limits)
        axes.set(xlabel=chart.x_label, ylabel=textwrap.fill(chart.y_label, _Y_LETTERS))
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        ordered = {label: handles[label] for label in labels if label in handles}
        figure.legend(
            ordered.values(), ordered, loc="outside lower center", ncols=columns, fontsize=9
        )
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
        reach = heat.reach
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
            spine.set(visible=True, color="#E3E3E3")
        return _saved(figure, forms)


def _saved(figure: Figure, forms: tuple[str, ...]) -> dict[str, bytes]:
    found = {}
    dates = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
    for form in forms:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=200, metadata=dates.get(form))
        found[form] = buffer.getvalue()
    return found


def _legend_room(labels: list[str]) -> tuple[int, float]:
    """Columns of a legend, three at the most, and the inches that they take."""
    for columns in (3, 2, 1):
        letters = sum(max(map(len, part), default=0) for part in np.array_split(labels, columns))
        width = 0.6 * columns + 0.064 * letters
        if width <= _WIDTH:
            break
    return columns, width


def _set_log(axes: Axes, values: NDArray[np.float64]) -> None:
    """Make the x axis logarithmic, with ticks at ``values`` where these are few round numbers."""
    axes.set_xscale("log")
    texts, span = [f"{x:g}" for x in values], np.log10(values[-1] / values[0])
    room = 38 * np.diff(np.log10(values)).min(initial=span) / max(span, 1e-12)  # letters
    if [*map(float, texts)] == values.tolist() and room > max(map(len, texts)):
        axes.xaxis.set_major_locator(FixedLocator(values.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 2 else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _shown(label: str) -> str:
    """A label that matplotlib does not hide: it leaves out those with a leading underscore."""
    return f" {label}" if label.startswith("_") else label


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as a URI that loads nothing."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
