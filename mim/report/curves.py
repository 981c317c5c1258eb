"""Quality against what it cost and against what was varied: frontiers, scaling, tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mim.report.charts import (
    REFERENCE_LINES,
    Chart,
    Cloud,
    Level,
    Line,
    Style,
    styles,
)
from mim.report.collect import Comparison, Group, axis_labels, group_label, without_seed
from mim.report.measures import Measure, evaluation_measures, flops_unit, summarize, time_unit
from mim.report.statistics import Analysis

LENGTHS = ("train.epochs", "train.max_steps")
"""Axes along which a run gets longer."""
_COSTS = (("train_flops", "training compute"), ("wall_seconds", "wall time"))
_LEAST = 3
"""Values of an axis from which a curve is drawn over it."""
_WIDE = 8
"""Where the largest value is that many times the smallest, the axis is logarithmic."""


def frontier_charts(comparison: Comparison, analyses: Sequence[Analysis]) -> list[Chart]:
    """The primary measure over compute and time, a curve over the lengths that were trained."""
    measure, length = _primary(analyses), _length_axis(comparison)
    if measure is None or length is None:
        return []
    return [
        chart
        for key, name in _COSTS
        if (chart := _frontier(comparison, measure, length, key, name)) is not None
    ]


def _frontier(
    comparison: Comparison, measure: Measure, length: str, key: str, name: str
) -> Chart | None:
    costs = [value for group in comparison.groups for value in group.values(key).values()]
    if not costs:
        return None
    per_unit, unit = _unit(key, max(costs))

    def cost(group: Group) -> float | None:
        found = summarize(group.values(key).values())
        return found.mean / per_unit if found else None

    return _curve(comparison, measure, length, cost, name, f"{name} ({unit})", f"frontier_{key}")


def scaling_charts(comparison: Comparison, analyses: Sequence[Analysis]) -> list[Chart]:
    """The primary measure over each axis of numbers: share of the data, width, mask ratio."""
    measure, found = _primary(analyses), []
    labels = axis_labels(without_seed(comparison.axes))
    for key, values in without_seed(comparison.axes).items() if measure else ():
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        if key in LENGTHS or not len(values) == len(numbers) >= _LEAST:
            continue

        def value(group: Group, key: str = key) -> float | None:
            return float(group.axes[key]) if key in group.axes else None

        assert measure is not None
        file = f"scaling_{key}".replace(".", "_")
        found.append(_curve(comparison, measure, key, value, labels[key], labels[key], file))
    return [chart for chart in found if chart is not None]


def _primary(analyses: Sequence[Analysis]) -> Measure | None:
    return next((each.measure for each in analyses if each.primary and not each.mixed), None)


def _length_axis(comparison: Comparison) -> str | None:
    return next((k for k, v in comparison.axes.items() if k in LENGTHS and len(v) > 1), None)


def _unit(key: str, largest: float) -> tuple[float, str]:
    return time_unit(largest) if key == "wall_seconds" else flops_unit(largest)


def _curve(
    comparison: Comparison,
    measure: Measure,
    axis: str,
    x_of: Callable[[Group], float | None],
    name: str,
    x_label: str,
    file: str,
) -> Chart | None:
    """A line for each place on the other axes, over ``x_of`` its groups."""
    labels, look = axis_labels(without_seed(comparison.axes)), styles(comparison)
    series: dict[str, list[tuple[float, Group]]] = {}
    for group in comparison.groups:
        x = x_of(group)
        if x is not None and group.values(measure.key):
            rest = {key: value for key, value in group.axes.items() if key != axis}
            series.setdefault(group_label(rest, labels) or measure.label, []).append((x, group))
    lines = []
    for label, points in series.items():
        points.sort(key=lambda point: point[0])
        summaries = [summarize(group.values(measure.key).values()) for _, group in points]
        known = [summary for summary in summaries if summary is not None]
        x_values = np.array([x for x, _ in points])
        mean = measure.scale * np.array([summary.mean for summary in known])
        sds = [summary.sd for summary in known if summary.sd is not None]
        spread = measure.scale * np.array(sds) if len(sds) == len(known) else None
        style = look[points[0][1].label]
        lines.append(Line(label, style, x_values, mean, spread, min(s.n for s in known)))
    if not lines or max(len(line.x) for line in lines) < 2:
        return None
    low = min((line.mean - (0 if line.spread is None else line.spread)).min() for line in lines)
    high = max((line.mean + (0 if line.spread is None else line.spread)).max() for line in lines)
    levels, limits = _levels(comparison, measure, float(low), float(high))
    x_all = np.concatenate([line.x for line in lines])
    said = [f"{line.label}: {line.mean[0]:.4g} to {line.mean[-1]:.4g}" for line in lines]
    return Chart(
        key=file,
        title=f"{measure.title} against {name}",
        x_label=x_label,
        y_label=measure.title,
        alt=f"{measure.title} against {name}. {'; '.join(said)}.",
        lines=tuple(lines),
        levels=levels,
        x_log=bool(x_all.min() > 0 and x_all.max() >= _WIDE * x_all.min()),
        y_limits=limits,
    )


def _levels(
    comparison: Comparison, measure: Measure, low: float, high: float
) -> tuple[tuple[Level, ...], tuple[float, float]]:
    """The references as lines, and an axis that holds the groups and the references near them."""
    room = max(high - low, 1e-3 * abs(high), 1e-9)
    limits = (low - 0.25 * room, high + 0.25 * room)
    levels = []
    for reference in comparison.references:
        summary = summarize(reference.values(measure.key).values())
        if summary is None:
            continue
        y, label = summary.mean * measure.scale, reference.label
        if limits[0] - room <= y <= limits[1] + room:  # near enough to be drawn
            limits = (min(limits[0], y - 0.1 * room), max(limits[1], y + 0.1 * room))
        else:
            where = "above" if y > limits[1] else "below"
            label = f"{label}: {measure.number(summary.mean)} ({where})"
        levels.append(Level(label, Style(*REFERENCE_LINES[reference.kind], ""), y))
    return tuple(levels), limits


def quality_charts(comparison: Comparison) -> list[Chart]:
    """Each evaluation's first measure over training FLOPs and over wall time."""
    first: dict[str, Measure] = {}
    for measure in evaluation_measures(comparison):
        first.setdefault(measure.section, measure)
    charts = [_quality(comparison, measure, *cost) for measure in first.values() for cost in _COSTS]
    return [chart for chart in charts if chart is not None]


def _quality(comparison: Comparison, measure: Measure, key: str, name: str) -> Chart | None:
    look = styles(comparison)
    points = {}
    for group in comparison.groups:
        costs, values = group.values(key), group.values(measure.key)
        seeds = sorted(costs.keys() & values.keys())
        if seeds:
            points[group.label] = (seeds, [costs[s] for s in seeds], [values[s] for s in seeds])
    if not points:
        return None
    largest = max(max(spent) for _, spent, _ in points.values())
    per_unit, unit = _unit(key, largest)
    clouds = [
        Cloud(
            label, look[label], seeds, np.array(spent) / per_unit, np.array(reached) * measure.scale
        )
        for label, (seeds, spent, reached) in points.items()
    ]
    low, high = min(c.y.min() for c in clouds), max(c.y.max() for c in clouds)
    levels, limits = _levels(comparison, measure, float(low), float(high))
    said = [f"{c.label}: {c.y.mean():.4g} at {c.x.mean():.3g} {unit}" for c in clouds]
    said += [f"{level.label}: {level.y:.4g}" for level in levels]
    return Chart(
        key=f"{measure.key}_against_{key}".replace(".", "_"),
        title=f"{measure.title} against {name}",
        x_label=f"{name} ({unit})",
        y_label=measure.title,
        alt=f"{measure.title} against {name}. {'; '.join(said)}.",
        clouds=tuple(clouds),
        levels=levels,
        x_limit=largest / per_unit * 1.1,
        y_limits=limits,
    )
