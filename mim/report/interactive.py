"""Charts for plotly.js, as the plain JSON it reads, and the library itself for the page."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np

from mim.report.charts import Chart, Cloud, Floats, Level, Line

_DASH = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}
_SYMBOL = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond",
    "v": "triangle-down", "P": "cross", "X": "x",
}  # fmt: skip


def plotly_script() -> str:
    """plotly.js as its Python package carries it."""
    from plotly.offline import get_plotlyjs  # slow to import

    # Inside a script element only this sequence would end it early.
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def plotly_figure(chart: Chart) -> dict[str, Any]:
    """``data`` and ``layout`` of a chart; the page's script adds the colours of its theme."""
    data: list[dict[str, Any]] = []
    for line in chart.lines:
        data += _line(line, chart.x_label)
    for cloud in chart.clouds:
        data += _cloud(cloud)
    ends = [0.0, chart.x_limit or 1.0]
    if chart.x_limit is None and chart.lines:
        x = np.concatenate([line.x for line in chart.lines])
        ends = [float(x.min()), float(x.max())]
    for level in chart.levels:
        data.append(_level(level, ends))
    x_axis: dict[str, Any] = {"title": {"text": _text(chart.x_label)}}
    if chart.x_log:
        x_axis["type"] = "log"
    if chart.x_limit is not None:
        x_axis["range"] = [0, chart.x_limit]
    y_axis: dict[str, Any] = {"title": {"text": _text(chart.y_label)}}
    if chart.y_limits is not None:
        y_axis["range"] = list(chart.y_limits)
    return {"data": data, "layout": {"xaxis": x_axis, "yaxis": y_axis}}


def _line(line: Line, x_label: str) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    if line.spread is not None:
        low, high = line.mean - line.spread, line.mean + line.spread
        band = {
            "x": _numbers(np.concatenate([line.x, line.x[::-1]])),
            "y": _numbers(np.concatenate([high, low[::-1]])),
            "fill": "toself", "fillcolor": f"{line.style.colour}2E", "line": {"width": 0},
            "mode": "lines", "hoverinfo": "skip", "showlegend": False,
            "legendgroup": _text(line.label), "name": _text(line.label),
        }  # fmt: skip
        traces.append(band)
    spread = f", n = {line.n}"
    trace = {
        "x": _numbers(line.x), "y": _numbers(line.mean), "name": _text(line.label),
        "legendgroup": _text(line.label),
        "mode": "lines+markers" if len(line.x) <= 15 else "lines",
        "line": {"color": line.style.colour, "dash": _DASH[line.style.line], "width": 2},
        "marker": {"symbol": _SYMBOL[line.style.marker], "size": 6},
        "hovertemplate": f"%{{y:.4g}} at {_text(x_label.partition(' (')[0])} %{{x:.3g}}{spread}",
    }  # fmt: skip
    return [*traces, trace]


def _cloud(cloud: Cloud) -> list[dict[str, Any]]:
    name, colour = _text(cloud.label), cloud.style.colour
    seeds = {
        "x": _numbers(cloud.x), "y": _numbers(cloud.y), "mode": "markers", "name": name,
        "marker": {"color": colour, "opacity": 0.4, "size": 6},
        "customdata": cloud.seeds, "legendgroup": name, "showlegend": False,
        "hovertemplate": "seed %{customdata}: %{y:.4g} at %{x:.3g}",
    }  # fmt: skip
    mean = {
        "x": [float(cloud.x.mean())], "y": [float(cloud.y.mean())], "mode": "markers",
        "name": name, "legendgroup": name,
        "marker": {"color": colour, "size": 11, "symbol": _SYMBOL[cloud.style.marker]},
        "hovertemplate": f"mean of {len(cloud.seeds)}: %{{y:.4g}} at %{{x:.3g}}",
    }  # fmt: skip
    if cloud.sd is not None:
        mean["error_y"] = {"array": [cloud.sd], "color": colour, "thickness": 1.4}
    return [seeds, mean]


def _level(level: Level, ends: list[float]) -> dict[str, Any]:
    return {
        "x": ends, "y": [level.y, level.y], "mode": "lines", "name": _text(level.label),
        "line": {"color": level.style.colour, "dash": _DASH[level.style.line], "width": 1.5},
        "hovertemplate": "%{y:.4g}",
    }  # fmt: skip


def _text(text: str) -> str:
    """Plain text: plotly would read tags and entities."""
    return html.escape(text, quote=False)


def _numbers(values: Floats) -> list[float | None]:
    """JSON has no word for what is not finite."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
