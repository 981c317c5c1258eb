"""What was chosen for each group before the comparison, and by what: ``tune.json``."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mim.core.errors import UserError
from mim.report.charts import Chart, Line, styles
from mim.report.collect import Comparison, axis_labels, group_label, show_value
from mim.report.measures import MISSING
from mim.report.tables import Cell, Column, Row, Table, text_columns


def read_tuning(comparison: Comparison) -> dict[str, Any]:
    """The content of ``tune.json``; empty where nothing was tuned.

    Raises:
        UserError: if it cannot be read.
    """
    path = comparison.folder / "tune.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return content


def tuning_table(comparison: Comparison) -> Table:
    """Every candidate of every group, how long it was tried and what it reached."""
    tuning = read_tuning(comparison)
    labels, rows = axis_labels(comparison.axes), []
    for group in tuning.get("groups", ()):
        name = group_label(group["axes"], labels) or "all groups"
        ends = group.get("ends")
        for number, rung in enumerate(group["rungs"], start=1):
            for tried in rung["tried"]:
                known = [value for value in tried["values"] if value is not None]
                mean = float(np.mean(known)) if known else None
                last = number == len(group["rungs"]) and tried["settings"] == group["chosen"]
                settings = ", ".join(f"{k} {show_value(v)}" for k, v in tried["settings"].items())
                note = f"chosen; the end of what was tried: {', '.join(ends)}" if ends else "chosen"
                cells = [
                    Cell(name),
                    Cell(settings, note if last else "", strong=last),
                    Cell(f"{rung['length']:.3g}", value=rung["length"]),
                    Cell(str(rung["seeds"]), value=rung["seeds"]),
                    Cell(MISSING if mean is None else f"{mean:.4g}", value=mean),
                ]
                rows.append(Row(cells))
    numbers = [Column(head) for head in ("length", "seeds", str(tuning.get("by", "")))]
    caption = (
        "What each group's settings were chosen by: runs on seeds of their own, measured on a part "
        "of the training images; length is the share of the comparison's steps"
    )
    return Table(caption, [*text_columns("Encoder", "Candidate"), *numbers], rows, "tuning")


def tuning_charts(comparison: Comparison) -> list[Chart]:
    """What all candidates reached in the first rung, where one number is tuned."""
    tuning, look = read_tuning(comparison), styles(comparison)
    labels, lines, key = axis_labels(comparison.axes), [], ""
    for group in tuning.get("groups", ()):
        tried = group["rungs"][0]["tried"]
        (key, *more), points = list(group["chosen"]), []
        for each in tried:
            values = [v for v in each["values"] if v is not None]
            if values and isinstance(each["settings"][key], (int, float)):
                points.append((each["settings"][key], values))
        if more or len(points) < 2:
            continue
        points.sort()
        own = group["axes"].items()
        same = next((g for g in comparison.groups if all(g.axes.get(k) == v for k, v in own)), None)
        if same is None or same.label not in look:
            continue
        name = group_label(group["axes"], labels) or "all groups"
        label = f"{name}: {show_value(group['chosen'][key])}"
        x = np.array([x for x, _ in points], dtype=np.float64)
        mean = np.array([np.mean(values) for _, values in points])
        lines.append(Line(label, look[same.label], x, mean, None, len(points[0][1])))
    if not lines:
        return []
    name, by = key.rpartition(".")[2].replace("_", " "), tuning["by"]
    length = tuning["groups"][0]["rungs"][0]["length"]
    title = f"Tuning: {by} against {name}"
    alt = f"{title}, on training images held out. Chosen: {'; '.join(li.label for li in lines)}."
    return [
        Chart(
            "tuning",
            f"{title}, first rung ({length:.3g} of the length); the legend names what was chosen",
            name,
            f"{by} on held-out training images",
            alt,
            lines=tuple(lines),
            x_log=bool(min(line.x[0] for line in lines) > 0),
        )
    ]
