"""Whether what one axis does depends on another: differences of differences of the primary measure.

For two axes, and their first values as base, a field of the map holds ``(here - base row) in this
column`` minus ``the same in the base column``. Over further axes it is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mim.compare.statistics import Difference, Family, Places, interaction
from mim.report.charts import HeatMap
from mim.report.collect import Comparison, axis_labels, show_value, without_seed
from mim.report.measures import Measure
from mim.report.statistics import Analysis
from mim.report.tables import Cell, Row, Table, text_columns

_MOST = 12
"""Values of an axis that a map has room for."""


@dataclass(frozen=True)
class Interaction:
    """Two axes, and a contrast for every pair of their values but the first ones."""

    measure: Measure
    margin: float
    """In stored units."""
    axes: tuple[str, str]
    """As tables call them."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    base: tuple[str, str]
    found: tuple[tuple[Difference | None, ...], ...]


def interactions(comparison: Comparison, analyses: Sequence[Analysis]) -> list[Interaction]:
    """All pairs of axes; none where nothing decides or there is one axis.

    Nor where seeds are added until decided: intervals for a fixed number do not hold then.
    """
    primary = next((each for each in analyses if each.primary and not each.mixed), None)
    axes = without_seed(comparison.axes)
    keys = [key for key, values in axes.items() if 2 <= len(values) <= _MOST]
    if primary is None or comparison.rules.get("seeds"):
        return []
    found = [_interaction(comparison, primary, *pair) for pair in combinations(keys, 2)]
    return [each for each in found if any(cell for row in each.found for cell in row)]


def _interaction(comparison: Comparison, primary: Analysis, one: str, other: str) -> Interaction:
    labels, axes = axis_labels(without_seed(comparison.axes)), comparison.axes
    rows, columns = ([show_value(value) for value in axes[key]] for key in (one, other))
    places: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for group in comparison.groups:
        rest = str([v for k, v in group.axes.items() if k not in (one, other)])
        here = (show_value(group.axes.get(one)), show_value(group.axes.get(other)))
        if values := group.values(primary.measure.key):
            places.setdefault(here, {})[rest] = values

    def cells(*four: tuple[str, str]) -> list[Places]:
        """The four cells at the places that all of them have."""
        own = [places.get(cell, {}) for cell in four]
        shared = [rest for rest in own[0] if all(rest in cell for cell in own)]
        return [[cell[rest] for rest in shared] for cell in own]

    family = Family("separate", count=max((len(rows) - 1) * (len(columns) - 1), 1))
    found = []
    for row in rows[1:]:
        fields = []
        for column in columns[1:]:
            four = cells((row, column), (rows[0], column), (row, columns[0]), (rows[0], columns[0]))
            first, second, third, fourth = four
            fields.append(
                interaction(first, second, third, fourth, family, primary.spread) if first else None
            )
        found.append(tuple(fields))
    named = (labels[one], labels[other])
    base = (rows[0], columns[0])
    shown = (tuple(rows[1:]), tuple(columns[1:]), base, tuple(found))
    return Interaction(primary.measure, primary.margin, named, *shown)


def interaction_maps(comparison: Comparison, analyses: Sequence[Analysis]) -> list[HeatMap]:
    """A map for each pair of axes.

    Its deepest colour is that of the largest number, of twice the largest half width or of the
    margin, so that what is not shown stays pale.
    """
    maps = []
    for number, each in enumerate(interactions(comparison, analyses)):
        measure, (rows, columns), (row, column) = each.measure, each.axes, each.base
        ends = measure.scale * np.array(
            [[(f.low, f.high) if f else (None, None) for f in line] for line in each.found],
            dtype=np.float64,
        )  # (rows, columns, 2)
        values, widths = ends.mean(2), np.ptp(ends, axis=2)
        least = max(measure.scale * each.margin, 1e-12)
        title = f"{measure.plain}: {rows} by {columns}, against {row} and {column}"
        maps.append(
            HeatMap(
                key=f"interaction_{number}",
                title=f"{title}; 95% intervals for all fields at once, bold: without 0",
                alt=f"{title}. {'; '.join(f'{name}: {value}' for name, value in _named(each))}.",
                rows=each.rows,
                columns=each.columns,
                values=values,
                reach=float(np.nan_to_num([abs(values), widths]).max(initial=least)),
                texts=tuple(tuple(_text(f, measure, "\n") for f in row) for row in each.found),
                bold=tuple(tuple(bool(f and f.shown) for f in row) for row in each.found),
                x_label=columns,
                y_label=rows,
            )
        )
    return maps


def _text(found: Difference | None, measure: Measure, between: str = " ") -> str:
    if found is None:
        return ""
    text = measure.number(found.mean, sign=True)
    if found.low is None:
        return text
    return f"{text}{between}({measure.interval(found.low, found.high)})"


def _named(each: Interaction) -> list[tuple[str, str]]:
    """(contrast, its number and interval) of every field."""
    (row, column) = each.base
    return [
        (f"({a} \u2212 {row}) at {b} \u2212 at {column}", _text(found, each.measure))
        for a, line in zip(each.rows, each.found, strict=True)
        for b, found in zip(each.columns, line, strict=True)
        if found is not None
    ]


def interaction_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """Every contrast with its interval."""
    rows = [
        Row([Cell(" by ".join(each.axes)), Cell(name), Cell(text)])
        for each in interactions(comparison, analyses)
        for name, text in _named(each)
    ]
    caption = (
        "Differences of differences with their 95% intervals, for all fields of two axes at once "
        "(Bonferroni); exploratory beside the primary measure's own differences"
    )
    return Table(caption, text_columns("Axes", "Contrast", "Value"), rows, "interactions")
