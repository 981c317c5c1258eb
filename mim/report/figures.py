"""Charts drawn by matplotlib: inside the page as SVG, beside it as PNG and PDF."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mim.report.charts import Chart
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


def draw(chart: Chart, forms: tuple[str, ...]) -> dict[str, bytes]:
    """A chart as svg, png (200 dots an inch) and pdf; the same chart gives the same bytes."""
    entries = len(chart.lines) + len(chart.clouds) + len(chart.levels)
    with _figure(entries) as (figure, axes):
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
            style = level.style
            axes.axhline(
                level.y, color=style.colour, linestyle=style.line, lw=1.2, label=_shown(level.label)
            )
        if chart.x_limit is not None:
            axes.set_xlim(0, chart.x_limit)
            axes.margins(y=0.12)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        _legend(figure, axes)
        found = {}
        dates = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
        for form in forms:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, dpi=200, metadata=dates.get(form))
            found[form] = buffer.getvalue()
        return found


@contextmanager
def _figure(entries: int) -> Iterator[tuple[Figure, Axes]]:
    """A panel with room for a legend of so many entries below it."""
    with mpl.rc_context(_RC):
        rows = -(-entries // _legend_columns(entries))
        figure = Figure(figsize=(4.6, 3.1 + 0.2 * rows), layout="constrained")
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
