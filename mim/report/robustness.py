"""The errors of each encoder's classifier under each corruption and severity."""

from __future__ import annotations

import re

from mim.report.collect import Comparison, Group
from mim.report.measures import MISSING, summarize
from mim.report.tables import Cell, Column, Row, Table

_ERROR = re.compile(r"robustness\.error_(\w+)_severity_(\d+)")


def robustness_table(comparison: Comparison) -> Table | None:
    """A row for each encoder and corruption, the mean over seeds; None without the evaluation."""
    found = [m for key in comparison.evaluation_keys if (m := _ERROR.fullmatch(key))]
    if not found:
        return None
    severities = sorted({int(m[2]) for m in found})
    corruptions = list(dict.fromkeys(m[1] for m in found))
    relative = any(f"robustness.ce_{name}" in comparison.evaluation_keys for name in corruptions)
    rows = []
    for name in corruptions:
        for group in (*comparison.groups, *comparison.references):
            cells = [_per_cent(group, f"robustness.error_{name}_severity_{s}") for s in severities]
            cells.append(_per_cent(group, f"robustness.error_{name}"))
            if relative:
                cells.append(_per_cent(group, f"robustness.ce_{name}"))
            if any(cell.text != MISSING for cell in cells):
                heads = (Cell(name.replace("_", " ")), Cell(group.label))
                rows.append(Row((*heads, *cells), group.kind))
    columns = [Column("Corruption", numeric=False), Column("Encoder", numeric=False)]
    columns += [Column(str(severity), "Error (%) at severity") for severity in severities]
    columns.append(Column("mean error (%)"))
    if relative:
        columns.append(Column("CE (%)"))
    caption = "Error under each corruption, the mean over seeds"
    return Table(caption, tuple(columns), tuple(rows), "robustness")


def _per_cent(group: Group, key: str) -> Cell:
    summary = summarize(group.values(key).values())
    if summary is None:
        return Cell(MISSING)
    return Cell(f"{100 * summary.mean:.1f}", value=summary.mean)
