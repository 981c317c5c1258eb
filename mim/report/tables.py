"""The tables of a report, as plain cells that HTML and Markdown both print, and the CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mim.core.progress import clock
from mim.report.collect import (
    COSTS,
    GIVEN,
    LOSSES,
    REFERENCES,
    Comparison,
    Group,
    axis_labels,
    flatten,
    same_task,
    show_value,
)
from mim.report.statistics import Paired, Summary, paired_difference, summarize
from mim.report.status import UNREADABLE

MISSING = "\u2013"
# How an evaluation names what it chose or checked, as against what it found.
_CHOSEN = ("chosen_", "converged", "mean_k_", "mean_strength_", "mean_temperature_")
# What has no place among the results: the same quality of each class, layer or corruption.
_EACH = ("iou_", "map_class_", "mask_map_class_", "mended_", "layer_", "error_", "ce_")
# Measures between 0 and 1 that papers print in per cent.
_SHARES = re.compile(
    r"accuracy|(pixel|class|clean)_accuracy|miou$|mce$|mean_error$|(mask_)?(map|mar)(_|$)"
)
_WORDS = {"miou": "mIoU", "map": "mAP", "mce": "mCE"}
# Sections whose measures need no section to be understood.
_PLAIN = ("", "Loss", "Per image", "On this machine")
_EVALUATIONS = {
    "linear": "Linear probe",
    "linear_grid": "Linear probe (grid)",
    "linear_mae": "Linear probe (MAE)",
    "linear_online": "Linear probe (online)",
    "analysis": "Layers",
    "knn": "k-NN",
    "attentive": "Attentive probe",
    "finetune": "Fine-tuning",
    "robustness": "Robustness",
    "segment": "Segmentation",
    "detect": "Detection",
}


@dataclass(frozen=True)
class Measure:
    """How one measure is printed."""

    key: str
    section: str
    label: str
    scale: float = 1.0
    """Printed number over stored number."""
    unit: str = ""
    decimals: int = 1
    higher: bool = True
    """Whether more is better."""
    exact: bool = False
    """Whether seeds cannot change it, so that a spread of 0 says nothing."""

    @property
    def title(self) -> str:
        """Name that stands by itself: "Linear probe, accuracy (%)"."""
        return self.head if self.section in _PLAIN else f"{self.section}, {self.head}"

    @property
    def head(self) -> str:
        """Name under its section's heading."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def plain(self) -> str:
        """The title without its unit, for sentences."""
        return self.label if self.section in _PLAIN else f"{self.section}, {self.label}"

    def number(self, value: float | None, *, sign: bool = False) -> str:
        """A stored value as printed, without its unit."""
        if value is None:
            return MISSING
        scaled = round(value * self.scale, self.decimals) + 0.0  # + 0.0 turns -0.0 into 0.0
        text = f"{scaled:{'+' if sign else ''},.{self.decimals}f}".replace(",", "\u202f")
        return text.replace("-", "\u2212")

    def summary(self, summary: Summary | None) -> str:
        """ "93.1 ± 0.4"; a dash without values."""
        if summary is None:
            return MISSING
        if summary.sd is None or (self.exact and summary.sd == 0):
            return self.number(summary.mean)
        return f"{self.number(summary.mean)}\u00a0±\u00a0{self.number(summary.sd)}"

    def interval(self, paired: Paired) -> str:
        """ "0.4 to 2.0"; a dash where there is none.

        An end that would be printed as 0 and is not gets more decimals: whether the interval
        leaves out 0 is what it is read for.
        """
        ends = [end for end in (paired.low, paired.high) if end is not None]
        if len(ends) < 2:
            return MISSING
        fine = self
        for decimals in range(self.decimals, self.decimals + 4):
            fine = replace(self, decimals=decimals)
            if all(end == 0 or round(end * self.scale, decimals) for end in ends):
                break
        return " to ".join(map(fine.number, ends))


@dataclass(frozen=True)
class Column:
    """Head of a column; neighbours with the same section share a heading."""

    label: str
    section: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    note: str = ""
    """Second line, smaller."""
    strong: bool = False
    value: float | None = None
    """What the column is sorted by; None sorts by the text, and a dash last."""


@dataclass(frozen=True)
class Row:
    """One row; ``kind`` tells a reference from a run."""

    cells: tuple[Cell, ...]
    kind: str = "run"


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    key: str = ""
    """Names its files."""

    @property
    def heads(self) -> list[str]:
        """A name for each column that stands by itself."""
        return [
            column.label if column.section in _PLAIN else f"{column.section}: {column.label}"
            for column in self.columns
        ]

    @property
    def sections(self) -> list[tuple[str, int]]:
        """(heading, number of columns) of neighbouring columns; empty without any heading."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.section:
                spans[-1] = (column.section, spans[-1][1] + 1)
            else:
                spans.append((column.section, 1))
        return spans if any(section for section, _ in spans) else []


def evaluation_measures(comparison: Comparison) -> list[Measure]:
    """The evaluations' qualities; spreads over draws and what was chosen stand in the CSV."""
    measures = []
    for key in comparison.evaluation_keys:
        if key.endswith("_std") or key.partition(".")[2].startswith(_CHOSEN + _EACH):
            continue
        evaluation, _, name = key.partition(".")
        label = re.sub(r"_(\d+)_per_class$", r", \1 per class", name).replace("_", " ")
        label = re.sub(r"\bm(iou|ap|ce)\b", lambda word: _WORDS[word[0]], label)
        is_share = _SHARES.match(name) is not None
        measures.append(
            Measure(
                key,
                _EVALUATIONS.get(evaluation, evaluation),
                label,
                scale=100.0 if is_share else 1.0,
                unit="%" if is_share else "",
                decimals=1 if is_share else _decimals(comparison, [key]),
                higher=not re.search("loss|error|mce", name),
            )
        )
    # Columns of one evaluation stand together, in the order in which evaluations appear.
    order = list(dict.fromkeys(measure.section for measure in measures))
    return sorted(measures, key=lambda measure: order.index(measure.section))


def loss_measures(comparison: Comparison) -> list[Measure]:
    """Training and held-out loss."""
    decimals = _decimals(comparison, LOSSES, digits=4)
    return [
        Measure("train_loss", "Loss", "training loss", decimals=decimals, higher=False),
        Measure("val_loss", "Loss", "held-out loss", decimals=decimals, higher=False),
    ]


def cost_measures(comparison: Comparison) -> list[Measure]:
    """What a run costs, in units that suit the largest value."""
    seconds, unit = time_unit(_largest(comparison, ["wall_seconds"]))

    decimals = {
        key: _decimals(comparison, [key], scale=scale)
        for key, scale in (
            ("images_per_second", 1.0),
            ("peak_memory_bytes", 2.0**-20),
            ("wall_seconds", 1 / seconds),
        )
    }
    tokens = [run.measures.get("encoder_tokens", 0.0) for run in comparison.runs]
    whole = all(value == int(value) for value in tokens)
    flops = _decimals(comparison, ["flops_forward", "flops_backward"], digits=4, scale=1e-9)
    per_image = partial(Measure, section="Per image", higher=False, exact=True)
    speed = partial(Measure, section="On this machine")
    return [
        per_image("encoder_tokens", label="tokens in encoder", decimals=0 if whole else 1),
        per_image("flops_forward", label="forward GFLOPs", scale=1e-9, decimals=flops),
        per_image("flops_backward", label="backward GFLOPs", scale=1e-9, decimals=flops),
        speed("images_per_second", label="images/s", decimals=decimals["images_per_second"]),
        speed(
            "peak_memory_bytes",
            label="peak memory",
            scale=2.0**-20,
            unit="MiB",
            decimals=decimals["peak_memory_bytes"],
            higher=False,
        ),
        speed(
            "wall_seconds",
            label="wall time",
            scale=1 / seconds,
            unit=unit,
            decimals=decimals["wall_seconds"],
            higher=False,
        ),
    ]


def time_unit(seconds: float) -> tuple[float, str]:
    """(seconds in the unit, its sign) to print durations up to ``seconds``."""
    if seconds >= 7200:
        return 3600.0, "h"
    return (60.0, "min") if seconds >= 600 else (1.0, "s")


def comparison_table(comparison: Comparison) -> Table:
    """A row per group: mean ± standard deviation over seeds; the reference rows last."""
    measures = [
        *loss_measures(comparison),
        *evaluation_measures(comparison),
        *cost_measures(comparison),
    ]
    judged = [*evaluation_measures(comparison)]
    if same_task(comparison.groups):
        judged += loss_measures(comparison)
    leaders = {
        measure.key: label
        for measure in judged
        if (label := leader(comparison, measure)) is not None
    }
    rows = []
    for group in (*comparison.groups, *comparison.references):
        done, n = len(group.runs), len(group.finished)
        count = str(n) if n == done else f"{n} of {done}"
        cells = [Cell(group.label), Cell(count if done else MISSING, value=float(n))]
        for measure in measures:
            summary = summarize(group.values(measure.key).values())
            fewer = summary is not None and summary.n != n
            note = f"n = {summary.n}" if fewer and summary else ""
            best = leaders.get(measure.key) == group.label
            mean = summary.mean if summary else None
            cells.append(Cell(measure.summary(summary), note, best, mean))
        rows.append(Row(tuple(cells), group.kind))
    heads = [Column(measure.head, measure.section) for measure in measures]
    bold = "; bold: ahead of every other row, each by a 95% interval that leaves out 0"
    return Table(
        f"Mean ± standard deviation over seeds{bold if leaders else ''}",
        (Column("Encoder", numeric=False), Column("n"), *heads),
        tuple(rows),
        "results",
    )


def leader(comparison: Comparison, measure: Measure) -> str | None:
    """The group that is shown to be ahead of every other one and of the references.

    None where an interval contains 0 or is lacking: one seed, or nothing to be ahead of.
    """
    sign = 1 if measure.higher else -1
    groups = [group for group in comparison.groups if group.values(measure.key)]
    if len(groups) < 2:
        return None
    best = max(groups, key=lambda g: sign * float(np.mean(list(g.values(measure.key).values()))))
    found = [
        paired_difference(best.values(measure.key), other.values(measure.key))
        for other in groups
        if other is not best
    ]
    margins = [margin(comparison, best, kind, measure) for kind in REFERENCES]
    found += [paired for paired in margins if paired is not None]
    given = [reference for reference in comparison.references if reference.kind == GIVEN]
    ahead = all(paired and paired.shown and paired.mean * sign > 0 for paired in found)
    # A given encoder has one value and no seed to pair by: nothing is shown against it.
    return best.label if ahead and not any(g.values(measure.key) for g in given) else None


MOST_PAIRED = 16
"""Values of an axis of which every two are set against each other."""


MOST_DRAWN = 36
"""Groups that a chart, the pictures and the configs of a page hold."""


def drawn(comparison: Comparison) -> Comparison:
    """The comparison with the groups that a page has room to draw, in their order.

    All, or the ``MOST_DRAWN`` with the best means of the first measure that was taken.
    """
    groups = comparison.groups
    if len(groups) <= MOST_DRAWN:
        return comparison
    measures = [*evaluation_measures(comparison), *loss_measures(comparison)]
    means: dict[str, float] = {}
    for measure in measures:
        sign = 1 if measure.higher else -1
        found = {group.label: summarize(group.values(measure.key).values()) for group in groups}
        means = {label: sign * summary.mean for label, summary in found.items() if summary}
        if means:
            break
    ranked = sorted(groups, key=lambda group: -means.get(group.label, -math.inf))
    kept = {group.label for group in ranked[:MOST_DRAWN]}
    return replace(comparison, groups=tuple(group for group in groups if group.label in kept))


def pairs(comparison: Comparison) -> list[tuple[str, Group, Group]]:
    """(axis, first, second) for every two groups that differ in exactly one axis.

    Of more than ``MOST_PAIRED`` groups that differ in the same axis alone, each is set against the
    first one only, so that there are not many more pairs than groups.
    """
    keys = list(dict.fromkeys(key for group in comparison.groups for key in group.axes))
    order = {axis: place for place, axis in enumerate(comparison.axes)}
    found = []
    for key in keys:
        rest = [other for other in keys if other != key]
        alike: dict[str, list[tuple[int, Group]]] = {}
        for place, group in enumerate(comparison.groups):
            same = json.dumps([group.axes.get(other) for other in rest], sort_keys=True)
            alike.setdefault(same, []).append((place, group))
        for members in alike.values():
            starts = members if len(members) <= MOST_PAIRED else members[:1]
            each = ((a, b) for place, a in enumerate(starts) for b in members[place + 1 :])
            for (one, second), (other, first) in each:
                if first.axes.get(key) != second.axes.get(key):
                    found.append((order.get(key, len(order)), one, other, key, first, second))
    found.sort(key=lambda pair: pair[:3])
    return [(key, first, second) for *_, key, first, second in found]


def difference_table(comparison: Comparison) -> Table | None:
    """Paired differences of groups that differ in one axis; none without such a pair."""
    found = pairs(comparison)
    measures = evaluation_measures(comparison)
    if any(same_task(pair) for _, *pair in found):
        measures = [*loss_measures(comparison), *measures]
    labels = axis_labels([key for key in comparison.axes if key != "seed"])
    rows = []
    for axis, first, second in found:
        rest = {key: value for key, value in first.axes.items() if key != axis}
        where = ", ".join(f"{labels.get(key, key)} {show_value(rest[key])}" for key in rest)
        one, other = (show_value(group.axes.get(axis, MISSING)) for group in (first, second))
        cells = [Cell(f"{labels.get(axis, axis)}: {one} \u2212 {other}", where)]
        for measure in measures:
            if measure.key in LOSSES and not same_task([first, second]):
                cells.append(Cell(MISSING, "not comparable"))
                continue
            paired = paired_difference(first.values(measure.key), second.values(measure.key))
            cells.append(_difference_cell(measure, paired))
        rows.append(Row(tuple(cells)))
    if not rows:
        return None
    heads = [
        Column(measure.head.replace("(%)", "(points)"), measure.section) for measure in measures
    ]
    return Table(
        "Mean paired difference with its 95% interval",
        (Column("Difference", numeric=False), *heads),
        tuple(rows),
        "differences",
    )


def margin_table(comparison: Comparison) -> Table | None:
    """How far each group stands above the reference rows; none without evaluations."""
    measures = evaluation_measures(comparison)
    rows = []
    for group in comparison.groups:
        for kind, name in REFERENCES.items():
            cells = [Cell(f"{group.label} \u2212 {name}")]
            for measure in measures:
                cells.append(_difference_cell(measure, margin(comparison, group, kind, measure)))
            rows.append(Row(tuple(cells)))
    if not measures or not rows:
        return None
    heads = [
        Column(measure.head.replace("(%)", "(points)"), measure.section) for measure in measures
    ]
    return Table(
        "Mean difference from the references, with its 95% interval",
        (Column("Difference", numeric=False), *heads),
        tuple(rows),
        "margins",
    )


def margin(comparison: Comparison, group: Group, kind: str, measure: Measure) -> Paired | None:
    """Difference of a group from a reference, paired by seed.

    Raw pixels have no seed: their one value is taken from each of the group's.
    """
    reference = comparison.reference(group, kind)
    if reference is None:
        return None
    values, other = group.values(measure.key), reference.values(measure.key)
    if kind == "pixels" and len(other) == 1:
        other = dict.fromkeys(values, next(iter(other.values())))
    return paired_difference(values, other)


def settings_table(comparison: Comparison) -> Table | None:
    """Where the config of each group departs from the base; none where nothing does."""
    base = flatten(comparison.base)
    rows = []
    for group in comparison.groups:
        config = flatten(group.config) if group.config else base | flatten(group.axes)
        for key in dict.fromkeys([*base, *config]):
            if key in ("seed", "output", "resume"):
                continue
            ours, theirs = (_setting(settings, key) for settings in (config, base))
            if ours != theirs:
                rows.append(Row((Cell(group.label), Cell(key), Cell(theirs), Cell(ours))))
    if not rows:
        return None
    heads = ("Encoder", "Setting", "Base", "Here")
    columns = tuple(Column(head, numeric=False) for head in heads)
    return Table("Settings that differ from the base config", columns, tuple(rows), "settings")


def facts_table(comparison: Comparison) -> Table | None:
    """Environment and data of the runs; where runs disagree, every value and how often."""
    rows = []
    for section in ("data", "environment"):
        runs = [run for run in comparison.runs if run.kind == "run" and getattr(run, section)]
        facts = [flatten(getattr(run, section)) for run in runs]
        for key in dict.fromkeys(key for fact in facts for key in fact):
            shown = [_setting(fact, key) for fact in facts]
            values = Counter(shown)
            several = [f"{value} ({count} of {len(facts)} runs)" for value, count in values.items()]
            text = "; ".join(several) if len(values) > 1 else next(iter(values))
            rows.append(Row((Cell(f"{section}: {key.replace('_', ' ')}"), Cell(text))))
    if not rows:
        return None
    columns = (Column("What", numeric=False), Column("Value", numeric=False))
    return Table("What the runs saw, and where they ran", columns, tuple(rows), "facts")


def failures_table(comparison: Comparison) -> Table | None:
    """Runs without a result, and why; none where all finished."""
    rows = [
        Row((Cell(run.name), Cell(run.status), Cell(run.error or "no reason was recorded")))
        for run in comparison.runs
        if not run.finished
    ]
    if not rows:
        return None
    columns = tuple(Column(head, numeric=False) for head in ("Run", "Status", "Reason"))
    return Table("Runs that have no result", columns, tuple(rows), "failures")


def runs_table(comparison: Comparison) -> Table:
    """Every run and where it is."""
    rows = []
    for run in comparison.runs:
        progress = run.progress
        share = 1.0 if run.finished else 0.0
        if progress is not None and progress.total:
            share = progress.step / progress.total
        left = progress.seconds_left if progress is not None else None
        loss = progress.loss if progress is not None else run.measures.get("train_loss")
        cells = (
            Cell(run.name),
            Cell(run.status),
            Cell(f"{share:.0%}", value=share),
            Cell(f"{loss:.4g}" if loss is not None else MISSING, value=loss),
            Cell(clock(left) if left is not None else MISSING, value=left),
            Cell(run.error if run.status in ("failed", UNREADABLE) else ""),
        )
        rows.append(Row(cells, run.kind))
    heads = ("done", "loss", "time left")
    columns = (
        Column("Run", numeric=False),
        Column("State", numeric=False),
        *(Column(head) for head in heads),
        Column("Reason", numeric=False),
    )
    return Table("All runs, in their order", columns, tuple(rows), "runs")


def results_csv(comparison: Comparison) -> str:
    """``results.csv``: a row per run and reference, numbers as measured.

    Columns: ``run``, the axes (dotted keys), ``seed``, ``kind``, each measure, ``status``.
    """
    axes = [key for key in comparison.axes if key != "seed"]
    axes += [
        key for run in comparison.runs for key in run.axes if key != "seed" and key not in axes
    ]
    axes = list(dict.fromkeys(axes))
    measures = [*LOSSES, *comparison.evaluation_keys, *COSTS]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", *axes, "seed", "kind", *measures, "status"])
    for run in comparison.runs:
        known = run.placed
        writer.writerow(
            [
                run.folder.name,
                *(show_value(run.axes[key]) if key in run.axes else "" for key in axes),
                run.seed if known and run.kind not in ("pixels", "given") else "",
                run.kind,
                *(run.measures.get(key, "") for key in measures),
                run.status,
            ]
        )
    return buffer.getvalue()


def markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = [
        "| " + " | ".join(map(escape_markdown, table.heads)) + " |",
        "|" + "|".join(" ---: " if column.numeric else " --- " for column in table.columns) + "|",
    ]
    for row in table.rows:
        texts = [f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row.cells]
        marked = [
            f"**{escape_markdown(text)}**" if cell.strong else escape_markdown(text)
            for text, cell in zip(texts, row.cells, strict=True)
        ]
        lines.append("| " + " | ".join(marked) + " |")
    return "\n".join(lines)


def latex(table: Table) -> str:
    """A table in LaTeX; needs the package booktabs."""
    align = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        f"\\caption{{{escape_latex(table.caption)}.}}",
        f"\\begin{{tabular}}{{{align}}}",
        "\\toprule",
    ]
    if table.sections:
        parts, rules, start = [], [], 1
        for section, span in table.sections:
            title = escape_latex(section)
            if not section:
                parts += [""] * span
            else:
                parts.append(f"\\multicolumn{{{span}}}{{c}}{{{title}}}")
                rules.append(f"\\cmidrule(lr){{{start}-{start + span - 1}}}")
            start += span
        lines += [" & ".join(parts) + " \\\\", "".join(rules)]
    lines.append(" & ".join(escape_latex(column.label) for column in table.columns) + " \\\\")
    lines.append("\\midrule")
    for row in table.rows:
        cells = []
        for cell in row.cells:
            text = escape_latex(f"{cell.text} ({cell.note})" if cell.note else cell.text)
            cells.append(f"\\textbf{{{text}}}" if cell.strong else text)
        lines.append(" & ".join(cells) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "\u2212": "$-$",
    "\u2013": "--",
    "\u00b7": r"$\cdot$",
    "\u00a0": "~",
    "\u202f": r"\,",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


def table_csv(table: Table) -> str:
    """A table as it is printed, in CSV; the numbers as measured are in ``results.csv``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.heads)
    for row in table.rows:
        writer.writerow(
            [f"{cell.text} ({cell.note})" if cell.note else cell.text for cell in row.cells]
        )
    return buffer.getvalue()


def escape_markdown(text: str) -> str:
    """Text that Markdown prints as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|&$~])", r"\\\1", " ".join(text.split()))


def _difference_cell(measure: Measure, paired: Paired | None) -> Cell:
    if paired is None:
        return Cell(MISSING)
    note = f"n = {paired.n}"
    if paired.low is not None:
        note = f"{measure.interval(paired)}, {note}"
    text = measure.number(paired.mean, sign=True)
    return Cell(text, note, strong=paired.shown, value=paired.mean)


def _setting(settings: Mapping[str, Any], key: str) -> str:
    return show_value(settings[key]) if key in settings else MISSING


def _largest(comparison: Comparison, keys: Iterable[str]) -> float:
    wanted = tuple(keys)
    values = [abs(run.measures.get(key, 0.0)) for run in comparison.runs for key in wanted]
    return max(values, default=0.0)


def _decimals(
    comparison: Comparison, keys: Sequence[str], digits: int = 3, scale: float = 1.0
) -> int:
    """Decimals that show ``digits`` digits of the largest value."""
    largest = _largest(comparison, keys) * scale
    if largest <= 0:
        return 1
    return min(max(digits - 1 - math.floor(math.log10(largest)), 0), 6)


def base_config_text(comparison: Comparison) -> str:
    """The base config, for reading."""
    return json.dumps(comparison.base, indent=2, ensure_ascii=False)
