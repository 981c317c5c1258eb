"""Robustness in a report: the errors of each encoder under each corruption and severity."""

from __future__ import annotations

import math
import re

import numpy as np

from mim.report.charts import Chart, Line, mean_and_spread, style_of, styles
from mim.report.collect import Comparison, Group
from mim.report.measures import MISSING, summarize
from mim.report.tables import Cell, Column, Row, Table, text_columns

_ERROR = re.compile(r"robustness\.error_(\w+)_severity_(\d+)")


def _errors(comparison: Comparison) -> tuple[list[str], list[int]]:
    """The corruptions and the severities that were measured."""
    found = [m for key in comparison.evaluation_keys if (m := _ERROR.fullmatch(key))]
    return list(dict.fromkeys(m[1] for m in found)), sorted({int(m[2]) for m in found})


def robustness_table(comparison: Comparison) -> Table:
    """A row for each encoder and corruption, the mean over seeds."""
    corruptions, severities = _errors(comparison)
    relative = any(f"robustness.ce_{name}" in comparison.evaluation_keys for name in corruptions)
    rows = []
    for name in corruptions:
        for group in (*comparison.groups, *comparison.references):
            cells = [_per_cent(group, f"robustness.error_{name}_severity_{s}") for s in severities]
            cells.append(_per_cent(group, f"robustness.error_{name}"))
            if relative:
                cells.append(_per_cent(group, f"robustness.ce_{name}"))
            if any(cell.text != MISSING for cell in cells):
                heads = [Cell(name.replace("_", " ")), Cell(group.label)]
                rows.append(Row([*heads, *cells], group.kind))
    columns = text_columns("Corruption", "Encoder")
    columns += [Column(str(severity), "Error (%) at severity") for severity in severities]
    columns.append(Column("mean error (%)"))
    if relative:
        columns.append(Column("CE (%)"))
    return Table("Error under each corruption, the mean over seeds", columns, rows, "robustness")


def _per_cent(group: Group, key: str) -> Cell:
    summary = summarize(group.values(key).values())
    if summary is None:
        return Cell(MISSING)
    return Cell(f"{100 * summary.mean:.1f}", value=summary.mean)


def robustness_charts(comparison: Comparison) -> list[Chart]:
    """Error against severity of the corruptions, the mean over them; 0 is without any."""
    corruptions, severities = _errors(comparison)
    if not severities:
        return []
    look = styles(comparison)
    x = np.array([0, *severities], dtype=np.float64)
    lines = []
    for group in (*comparison.groups, *comparison.references):
        curves = []
        for seed, accuracy in group.values("robustness.clean_accuracy").items():
            curve = [1 - accuracy]
            for severity in severities:
                keys = [f"robustness.error_{name}_severity_{severity}" for name in corruptions]
                known = [group.values(key)[seed] for key in keys if seed in group.values(key)]
                curve.append(float(np.mean(known)) if known else math.nan)
            curves.append(curve)
        if curves:
            spread = mean_and_spread(100 * np.array(curves, dtype=np.float64))
            lines.append(Line(group.label, style_of(group, look), x, *spread, len(curves)))
    ends = [f"{line.label} {line.mean[0]:.3g} to {line.mean[-1]:.3g}" for line in lines]
    title = "Error under corruptions"
    alt = f"{title} against severity, in per cent. {'; '.join(ends)}."
    return [Chart("robustness", title, "severity (0: none)", "error (%)", alt, lines=tuple(lines))]
