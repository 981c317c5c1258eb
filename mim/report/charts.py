"""What the charts of a report show, as plain arrays that every renderer draws.

Colours are those of Okabe and Ito (2008), "Color Universal Design", which people with any common
colour blindness tell apart; line styles and markers say the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mim.report.collect import Comparison, Group, read_metrics, show_value
from mim.report.measures import Measure
from mim.report.statistics import Analysis, Verdict
from mim.report.tables import VERDICTS, pair_name

REGIME_COLOURS = {"drop": "#0072B2", "zero": "#D55E00", "token": "#009E73"}
_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#5D3A9B", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
REFERENCE_LINES = {
    "untrained": ("#6B6B6B", "--"),
    "pixels": ("#000000", ":"),
    "given": ("#6B6B6B", "-."),
}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Style:
    """How a group is drawn, the same in every figure; in matplotlib's words."""

    colour: str
    line: str
    marker: str


@dataclass(frozen=True)
class Line:
    """A curve: the mean over seeds, and its spread where there are several."""

    label: str
    style: Style
    x: Floats
    mean: Floats
    spread: Floats | None
    n: int


@dataclass(frozen=True)
class Cloud:
    """Points of one group, one a seed, with their mean."""

    label: str
    style: Style
    seeds: list[int]
    x: Floats
    y: Floats

    @property
    def sd(self) -> float | None:
        """Sample standard deviation of the heights; none with one seed."""
        return float(self.y.std(ddof=1)) if len(self.y) > 1 else None


@dataclass(frozen=True)
class Level:
    """A horizontal line: a reference, which costs no training."""

    label: str
    style: Style
    y: float


@dataclass(frozen=True)
class Chart:
    """One chart; ``key`` names its files."""

    key: str
    title: str
    x_label: str
    y_label: str
    alt: str
    lines: tuple[Line, ...] = ()
    clouds: tuple[Cloud, ...] = ()
    levels: tuple[Level, ...] = ()
    x_limit: float | None = None
    """Right end of an x axis that begins at 0; None lets the data decide both."""
    x_log: bool = False
    """Whether the x axis is logarithmic."""
    y_limits: tuple[float, float] | None = None
    """Ends of the y axis; a level beyond them is named in the legend alone."""

    def is_inside(self, level: Level) -> bool:
        """Whether a level lies on the axis."""
        return self.y_limits is None or self.y_limits[0] <= level.y <= self.y_limits[1]


@dataclass(frozen=True)
class ForestRow:
    """A difference with its intervals; without one where there were too few seeds."""

    label: str
    mean: float
    interval: tuple[float, float] | None
    wide: tuple[float, float] | None
    text: str
    """The numbers."""
    verdict: str


@dataclass(frozen=True)
class Forest:
    """Differences one below the other, with 0 and the margin; in printed units."""

    key: str
    title: str
    x_label: str
    alt: str
    rows: tuple[ForestRow, ...]
    margin: float = 0.0


@dataclass(frozen=True)
class HeatMap:
    """Numbers on two axes; in printed units."""

    key: str
    title: str
    alt: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    """(rows, columns); NaN where there is none, or no interval."""
    reach: float
    """What has the deepest colour."""
    texts: tuple[tuple[str, ...], ...]
    bold: tuple[tuple[bool, ...], ...]
    x_label: str = ""
    y_label: str = ""


Drawing = Chart | Forest | HeatMap
"""All that is drawn."""

_MOST_ROWS = 21


def forests(comparison: Comparison, analyses: Sequence[Analysis]) -> list[Forest]:
    """The differences of every measure that has any, the primary one's first."""
    found = []
    for analysis in analyses:
        measure, verdicts = analysis.measure, analysis.verdicts
        if len(verdicts) > _MOST_ROWS:
            verdicts = analysis.best[:_MOST_ROWS]
        rows = tuple(_forest_row(comparison, measure, verdict) for verdict in verdicts)
        if not rows:
            continue
        said = "; ".join(f"{row.label}: {row.text}, {row.verdict}" for row in rows)
        unit = measure.points.strip() or measure.label
        better = "right" if measure.higher else "left"
        forest = Forest(
            key=f"forest_{measure.key}".replace(".", "_"),
            title=measure.plain,
            x_label=f"difference ({unit}); better to the {better}",
            alt=f"Differences by {measure.plain} with their 95% intervals. {said}.",
            rows=rows,
            margin=analysis.margin * measure.scale if analysis.primary else 0.0,
        )
        found.append(forest)
    return found


def _forest_row(comparison: Comparison, measure: Measure, verdict: Verdict) -> ForestRow:
    found, scale = verdict.found, measure.scale
    text = measure.number(found.mean, sign=True)
    interval = None
    if found.low is not None and found.high is not None:
        interval = (found.low * scale, found.high * scale)
        text += f" ({measure.interval(found.low, found.high)})"
    wide = (found.wide[0] * scale, found.wide[1] * scale) if found.wide else None
    name = pair_name(comparison, verdict)
    return ForestRow(name, found.mean * scale, interval, wide, text, VERDICTS[verdict.kind])


def styles(comparison: Comparison) -> dict[str, Style]:
    """Label of a group -> its style.

    The regime sets the colour (without one, the first axis); the other axes set line and marker.
    """
    axes = [key for key in comparison.axes if key != "seed"]
    regime = [key for key in axes if key.endswith("regime.name")]
    main = (regime or axes or [""])[0]

    def value_of(group: Group) -> str:
        return show_value(group.axes[main]) if main in group.axes else group.label

    values = {value: n for n, value in enumerate(dict.fromkeys(map(value_of, comparison.groups)))}
    unknown = (value for value in values if value not in REGIME_COLOURS)
    others = {value: place for place, value in enumerate(unknown)}
    # With a single variant the marker repeats the colour; otherwise it tells variants apart.
    single = len(comparison.groups) == len(values)
    variants: dict[tuple[int, str], int] = {}
    found = {}
    for group in comparison.groups:
        value = value_of(group)
        # Where colours come a second time, lines and markers are other ones.
        turn, place = divmod(others.get(value, 0), len(_COLOURS))
        colour = REGIME_COLOURS.get(value, _COLOURS[place])
        rest = str([show_value(group.axes[key]) for key in group.axes if key != main])
        variant = variants.setdefault((turn, rest), len(variants))
        marker = values[value] if single else variant
        found[group.label] = Style(
            colour, _LINES[variant % len(_LINES)], _MARKERS[marker % len(_MARKERS)]
        )
    return found


def style_of(group: Group, look: dict[str, Style]) -> Style:
    """The style of a group, or that of its kind of reference."""
    return look.get(group.label) or Style(*REFERENCE_LINES[group.kind], "o")


_CURVES = {
    "loss": "Training loss",
    "val_loss": "Held-out loss",
    "effective_rank": "Effective rank",
    "cluster_perplexity": "Clusters in use",
}
"""Metrics that have a chart where a run logged them."""


def loss_charts(comparison: Comparison) -> list[Chart]:
    """Losses, and what targets measure, over epochs: mean over seeds, band of one deviation."""
    look = styles(comparison)
    charts = []
    for key, name in _CURVES.items():
        lines = []
        for group in comparison.groups:
            curve = mean_curve(group, key)
            if curve is not None:
                lines.append(Line(group.label, look[group.label], *curve))
        if not lines:
            continue
        ends = [f"{line.label} ends at {line.mean[-1]:.4g} (n = {line.n})" for line in lines]
        alt = f"{name} against epoch. {'; '.join(ends)}."
        file = name.lower().replace(" ", "_").replace("-", "_")
        charts.append(Chart(file, name, "epoch", name.lower(), alt, lines=tuple(lines)))
    return charts


def mean_curve(group: Group, key: str) -> tuple[Floats, Floats, Floats | None, int] | None:
    """Mean of a metric over the runs of a group, at the steps that all of them logged.

    Runs that have finished count; while none has, those that are on their way.

    Returns:
        (epochs, mean, standard deviation or none with one run, number of runs); none without data.
    """
    curves: list[dict[int, tuple[float, float]]] = []
    for run in group.finished or group.runs:
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
    return epochs, *mean_and_spread(values), len(curves)


def mean_and_spread(values: Floats) -> tuple[Floats, Floats | None]:
    """(seeds, n) -> mean and sample standard deviation over seeds; none with one seed."""
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else None
    return values.mean(axis=0), spread
