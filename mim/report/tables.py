"""The tables of a report, as plain cells that HTML and Markdown both print, and the CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mim.compare.statistics import Difference
from mim.core.progress import clock
from mim.report.collect import (
    COSTS,
    LOSSES,
    REFERENCES,
    Comparison,
    axis_labels,
    flatten,
    show_value,
)
from mim.report.measures import (
    MISSING,
    PLAIN,
    Measure,
    cost_measures,
    evaluation_measures,
    loss_measures,
    summarize,
)
from mim.report.statistics import Analysis, Verdict, against_references, analyse, leader
from mim.report.status import UNREADABLE


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
            column.label if column.section in PLAIN else f"{column.section}: {column.label}"
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


def comparison_table(comparison: Comparison, analyses: Sequence[Analysis] | None = None) -> Table:
    """A row per group: mean ± standard deviation over seeds; the reference rows last."""
    analyses = analyse(comparison) if analyses is None else analyses
    qualities = [each.measure for each in analyses if each.measure.key not in LOSSES]
    return means_table(comparison, qualities, analyses, "results")


def cost_table(comparison: Comparison, analyses: Sequence[Analysis] | None = None) -> Table:
    """The same of the losses, of compute, speed and memory."""
    analyses = analyse(comparison) if analyses is None else analyses
    measures = [*loss_measures(comparison), *cost_measures(comparison)]
    return means_table(comparison, measures, analyses, "cost")


def means_table(
    comparison: Comparison, measures: Sequence[Measure], analyses: Sequence[Analysis], key: str
) -> Table:
    """A row per group and reference: the mean of each measure; bold where it leads."""
    leaders = {each.measure.key: leader(comparison, each) for each in analyses}
    bold = any(leaders.get(measure.key) for measure in measures)
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
        if key != "cost" or any(cell.text != MISSING for cell in cells[2:]):
            rows.append(Row(tuple(cells), group.kind))
    heads = [Column(measure.head, measure.section) for measure in measures]
    strong = "; bold: shown to be ahead of every other row" if bold else ""
    return Table(
        f"Mean ± standard deviation over seeds{strong}",
        (Column("Encoder", numeric=False), Column("n"), *heads),
        tuple(rows),
        key,
    )


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


VERDICTS = {
    "difference": "different",
    "equal": "as good",
    "undecided": "undecided",
    "untested": "no interval",
}


def difference_table(
    comparison: Comparison, analyses: Sequence[Analysis] | None = None
) -> Table | None:
    """Differences of the pairs with their intervals and verdicts; none without a pair."""
    analyses = analyse(comparison) if analyses is None else analyses
    columns: list[Column] = []
    rows: dict[tuple[str, str], list[Cell]] = {}
    for place, each in enumerate(each for each in analyses if each.verdicts):
        columns.append(_in_points(each.measure))
        for verdict in each.verdicts:
            row = rows.setdefault(verdict.key, [Cell(pair_name(comparison, verdict))])
            row += [Cell(MISSING)] * (place + 1 - len(row))
            row.append(_difference_cell(each.measure, verdict.found, verdict.kind))
    if not rows:
        return None
    return Table(
        "Mean difference with its 95% interval",
        (Column("Difference", numeric=False), *columns),
        tuple(
            Row((*row, *[Cell(MISSING)] * (len(columns) + 1 - len(row)))) for row in rows.values()
        ),
        "differences",
    )


def pair_name(comparison: Comparison, verdict: Verdict) -> str:
    """The two values that differ, and in parentheses where both groups stand on the other axes."""
    first, second = verdict.first, verdict.second
    labels = axis_labels([key for key in comparison.axes if key != "seed"])
    axes = dict.fromkeys([*first.axes, *second.axes])
    differing = [key for key in axes if first.axes.get(key) != second.axes.get(key)]
    if len(differing) != 1:
        return f"{first.label} \u2212 {second.label}"
    axis = differing[0]
    one, other = (show_value(group.axes.get(axis, MISSING)) for group in (first, second))
    named = axis.endswith(".name") or axis == "variant"
    text = f"{'' if named else f'{labels.get(axis, axis)} '}{one} \u2212 {other}"
    rest = [
        f"{labels.get(key, key)} {show_value(value)}"
        for key, value in first.axes.items()
        if key != axis
    ]
    return f"{text} ({', '.join(rest)})" if rest else text


def _in_points(measure: Measure) -> Column:
    return Column(measure.head.replace("(%)", "(points)"), measure.section)


def margin_table(
    comparison: Comparison, analyses: Sequence[Analysis] | None = None
) -> Table | None:
    """How far each group stands above the reference rows; none without evaluations."""
    analyses = analyse(comparison) if analyses is None else analyses
    qualities = [each for each in analyses if each.measure.key not in LOSSES]
    rows = []
    for kind, name in REFERENCES.items():
        found = [against_references(comparison, each, kind) for each in qualities]
        for place, group in enumerate(comparison.groups):
            cells = [Cell(f"{group.label} \u2212 {name}")]
            for each, column in zip(qualities, found, strict=True):
                cells.append(_difference_cell(each.measure, column[place][1]))
            rows.append(Row(tuple(cells)))
    if not qualities or not rows:
        return None
    return Table(
        "Mean difference from the references, with its 95% interval for all encoders at once",
        (Column("Difference", numeric=False), *(_in_points(each.measure) for each in qualities)),
        tuple(rows),
        "margins",
    )


def _difference_cell(measure: Measure, found: Difference | None, kind: str = "") -> Cell:
    if found is None:
        return Cell(MISSING)
    notes = [measure.interval(found.low, found.high)] if found.low is not None else []
    notes.append(f"n = {found.n}")
    if kind:
        notes.append(VERDICTS[kind])
    shown = kind == "difference" if kind else found.shown
    text = measure.number(found.mean, sign=True)
    return Cell(text, ", ".join(notes), strong=shown, value=found.mean)


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


def _setting(settings: Mapping[str, Any], key: str) -> str:
    return show_value(settings[key]) if key in settings else MISSING


def base_config_text(comparison: Comparison) -> str:
    """The base config, for reading."""
    return json.dumps(comparison.base, indent=2, ensure_ascii=False)
