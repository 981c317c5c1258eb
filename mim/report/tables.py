"""The tables of a report, as plain cells that HTML and Markdown both print, and the CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mim.compare.statistics import Difference
from mim.core.errors import choice_error
from mim.core.progress import clock
from mim.core.settings import flatten
from mim.report.collect import (
    COSTS,
    LOSSES,
    REFERENCES,
    Comparison,
    axis_labels,
    show_value,
    without_seed,
)
from mim.report.measures import (
    MISSING,
    PLAIN,
    Measure,
    cost_measures,
    evaluation_measures,
    loss_measures,
    p_text,
    summarize,
)
from mim.report.statistics import Analysis, Verdict, against_references, leader
from mim.report.status import UNREADABLE


@dataclass(frozen=True)
class Column:
    """Head of a column; neighbours with the same section share a heading."""

    label: str
    section: str = ""
    numeric: bool = True


def text_columns(*labels: str) -> list[Column]:
    """Columns of words."""
    return [Column(label, numeric=False) for label in labels]


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    note: str = ""
    """Second line, smaller."""
    strong: bool = False
    value: float | None = None
    """What the column is sorted by; None sorts by the text, and a dash last."""

    @property
    def full_text(self) -> str:
        """The text, and the note in parentheses."""
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class Row:
    """One row; ``kind`` tells a reference from a run."""

    cells: Sequence[Cell]
    kind: str = "run"


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
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


def comparison_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """A row per group: mean ± standard deviation over seeds; the reference rows last."""
    qualities = [each.measure for each in analyses if each.measure.key not in LOSSES]
    return means_table(comparison, qualities, analyses, "results")


def cost_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """The same of the losses, of compute, speed and memory."""
    measures = [*loss_measures(comparison), *cost_measures(comparison)]
    return means_table(comparison, measures, analyses, "cost")


def means_table(
    comparison: Comparison, measures: Sequence[Measure], analyses: Sequence[Analysis], key: str
) -> Table:
    """A row per group and reference: the mean of each measure; bold where it leads."""
    leaders = {each.measure.key: leader(comparison, each) for each in analyses}
    bold = any(leaders.get(measure.key) for measure in measures)
    rows = []
    references = comparison.references if comparison.evaluation_keys else ()
    for group in (*comparison.groups, *references):
        total, n = len(group.runs), len(group.finished)
        count = str(n) if n == total else f"{n} of {total}"
        cells = [Cell(group.label), Cell(count if total else MISSING, value=float(n))]
        for measure in measures:
            summary = summarize(group.values(measure.key).values())
            note = f"n = {summary.n}" if summary and summary.n != n else ""
            best = leaders.get(measure.key) == group.label
            mean = summary.mean if summary else None
            cells.append(Cell(measure.summary(summary), note, best, mean))
        if key != "cost" or any(cell.text != MISSING for cell in cells[2:]):
            rows.append(Row(cells, group.kind))
    heads = [Column(measure.head, measure.section) for measure in measures]
    strong = "; bold: shown to be ahead of every other row" if bold else ""
    caption = f"Mean ± standard deviation over seeds{strong}"
    return Table(caption, [*text_columns("Encoder"), Column("n"), *heads], rows, key)


def chosen_measures(comparison: Comparison, keys: Sequence[str]) -> list[Measure]:
    """The measures of these names.

    Raises:
        UserError: if there is no such measure.
    """
    every = [*evaluation_measures(comparison), *loss_measures(comparison)]
    known = {measure.key: measure for measure in [*every, *cost_measures(comparison)]}
    for key in keys:
        if key not in known:
            raise choice_error("--columns", key, known)
    return [known[key] for key in keys]


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


def difference_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """Differences of the pairs with their intervals and verdicts."""
    compared = [each for each in analyses if each.verdicts]
    names: dict[tuple[str, str], str] = {}
    cells: dict[tuple[str, str], dict[int, Cell]] = {}
    for place, each in enumerate(compared):
        for verdict in each.verdicts:
            names.setdefault(verdict.key, pair_name(comparison, verdict))
            cell = _difference_cell(each.measure, verdict.found, verdict)
            cells.setdefault(verdict.key, {})[place] = cell
    rows = [
        Row([Cell(name), *(cells[key].get(n, Cell(MISSING)) for n in range(len(compared)))])
        for key, name in names.items()
    ]
    columns = [*text_columns("Difference"), *(_in_points(each.measure) for each in compared)]
    caption = (
        "Mean difference with its 95% interval, which holds for all differences at once in the "
        "measure that decides, and for one alone in others, whose verdicts carry Holm's correction"
    )
    return Table(caption, columns, rows, "differences")


def pair_name(comparison: Comparison, verdict: Verdict) -> str:
    """The two values that differ, and in parentheses where both groups stand on the other axes."""
    first, second = verdict.first, verdict.second
    labels = axis_labels(without_seed(comparison.axes))
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


def margin_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """How far each group stands above the reference rows; it has rows where there is a quality."""
    qualities = [each for each in analyses if each.measure.key not in LOSSES]
    rows = []
    for kind, name in REFERENCES.items() if qualities else ():
        found = [against_references(comparison, each, kind) for each in qualities]
        for place, group in enumerate(comparison.groups):
            cells = [Cell(f"{group.label} \u2212 {name}")]
            for each, column in zip(qualities, found, strict=True):
                cells.append(_difference_cell(each.measure, column[place][1]))
            rows.append(Row(cells))
    caption = "Mean difference from the references, with its 95% interval for all encoders at once"
    columns = [*text_columns("Difference"), *(_in_points(each.measure) for each in qualities)]
    return Table(caption, columns, rows, "margins")


def _difference_cell(
    measure: Measure, found: Difference | None, verdict: Verdict | None = None
) -> Cell:
    if found is None:
        return Cell(MISSING)
    notes = [measure.interval(found.low, found.high)] if found.low is not None else []
    notes.append(f"n = {found.n}")
    if verdict is not None:
        notes.append(f"{VERDICTS[verdict.kind]}{_outlook(measure, verdict)}")
    shown = verdict.kind == "difference" if verdict else found.shown
    text = measure.number(found.mean, sign=True)
    return Cell(text, ", ".join(notes), strong=shown, value=found.mean)


def _outlook(measure: Measure, verdict: Verdict) -> str:
    """What stands behind a verdict: how sure equality is, or what would decide."""
    if verdict.kind == "equal" and verdict.p_equal is not None:
        return f": {p_text(verdict.p_equal)}"
    if verdict.smallest is None:
        return ""
    more = f", about {verdict.needed - verdict.found.n} more seeds" if verdict.needed else ""
    return f": shows {measure.number(verdict.smallest)} or more{more}"


_UNTOLD = ("seed", "output", "resume", "data.fingerprint", "plugins")
"""Settings that differ by run, or stand elsewhere."""


def settings_table(comparison: Comparison) -> Table:
    """Where the config of each group departs from the base."""
    base = flatten(comparison.base)
    rows = []
    for group in comparison.groups:
        config = flatten(group.config) if group.config else base | flatten(group.axes)
        for key in dict.fromkeys([*base, *config]):
            ours, theirs = (_setting(settings, key) for settings in (config, base))
            if ours != theirs and key not in _UNTOLD:
                rows.append(Row([Cell(text) for text in (group.label, key, theirs, ours)]))
    columns = text_columns("Encoder", "Setting", "Base", "Here")
    return Table("Settings that differ from the base config", columns, rows, "settings")


def facts_table(comparison: Comparison) -> Table:
    """Environment and data of the runs; where runs disagree, every value and how often."""
    rows = []
    for section in ("data", "environment"):
        runs = [run for run in comparison.runs if run.kind == "run" and getattr(run, section)]
        facts = [flatten(getattr(run, section)) for run in runs]
        for key in dict.fromkeys(key for fact in facts for key in fact):
            values = Counter(_setting(fact, key) for fact in facts)
            several = [f"{value} ({count} of {len(facts)} runs)" for value, count in values.items()]
            text = "; ".join(several if len(values) > 1 else values)
            rows.append(Row([Cell(f"{section}: {key.replace('_', ' ')}"), Cell(text)]))
    columns = text_columns("What", "Value")
    return Table("What the runs saw, and where they ran", columns, rows, "facts")


def failures_table(comparison: Comparison) -> Table:
    """Runs without a result, and why."""
    rows = [
        Row([Cell(run.name), Cell(run.status), Cell(run.error or "no reason was recorded")])
        for run in comparison.runs
        if not run.finished
    ]
    columns = text_columns("Run", "Status", "Reason")
    return Table("Runs that have no result", columns, rows, "failures")


def runs_table(comparison: Comparison) -> Table:
    """Every run and where it is."""
    rows = []
    for run in comparison.runs:
        done, left, loss = float(run.finished), None, run.measures.get("train_loss")
        if run.progress is not None:
            left, loss = run.progress.seconds_left, run.progress.loss
            if run.progress.total:
                done = run.progress.step / run.progress.total
        cells = [
            Cell(run.name),
            Cell(run.status),
            Cell(f"{done:.0%}", value=done),
            Cell(f"{loss:.4g}" if loss is not None else MISSING, value=loss),
            Cell(clock(left) if left is not None else MISSING, value=left),
            Cell(run.error if run.status in ("failed", UNREADABLE) else ""),
        ]
        rows.append(Row(cells, run.kind))
    numbers = [Column(head) for head in ("done", "loss", "time left")]
    columns = [*text_columns("Run", "State"), *numbers, *text_columns("Reason")]
    return Table("All runs, in their order", columns, rows, "runs")


def results_csv(comparison: Comparison) -> str:
    """``results.csv``: a row per run and reference, numbers as measured.

    Columns: ``run``, the axes (dotted keys), ``seed``, ``kind``, each measure, ``status``.
    """
    named = [comparison.axes, *(run.axes for run in comparison.runs)]
    axes = list(dict.fromkeys(key for each in named for key in without_seed(each)))
    measures = [*LOSSES, *comparison.evaluation_keys, *COSTS]
    rows: list[Sequence[Any]] = [["run", *axes, "seed", "kind", *measures, "status"]]
    for run in comparison.runs:
        place = [show_value(run.axes[key]) if key in run.axes else "" for key in axes]
        seed = run.seed if run.placed and run.kind not in ("pixels", "given") else ""
        numbers = [run.measures.get(key, "") for key in measures]
        rows.append([run.folder.name, *place, seed, run.kind, *numbers, run.status])
    return _csv(rows)


_NUMBER = re.compile(r"[+-]?[\d.,]+([eE][+-]?\d+)?%?(?=\s|$)")
_CALL = re.compile(r"[|!]|\w\(")


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([_no_formula(value) for value in row] for row in rows)
    return buffer.getvalue()


def _no_formula(value: Any) -> Any:
    """A text that a spreadsheet would compute, with the mark that keeps it one."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    return value if _NUMBER.match(value) and not _CALL.search(value) else f"'{value}"


def markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = [
        "| " + " | ".join(map(escape_markdown, table.heads)) + " |",
        "|" + "|".join(" ---: " if column.numeric else " --- " for column in table.columns) + "|",
    ]
    for row in table.rows:
        texts = [(escape_markdown(cell.full_text), cell.strong) for cell in row.cells]
        marked = [f"**{text}**" if strong else text for text, strong in texts]
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
            if not section:
                parts += [""] * span
            else:
                parts.append(f"\\multicolumn{{{span}}}{{c}}{{{escape_latex(section)}}}")
                rules.append(f"\\cmidrule(lr){{{start}-{start + span - 1}}}")
            start += span
        lines += [" & ".join(parts) + " \\\\", "".join(rules)]
    lines.append(" & ".join(escape_latex(column.label) for column in table.columns) + " \\\\")
    lines.append("\\midrule")
    for row in table.rows:
        cells = []
        for cell in row.cells:
            text = escape_latex(cell.full_text)
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
    return _csv([table.heads, *([cell.full_text for cell in row.cells] for row in table.rows)])


def escape_markdown(text: str) -> str:
    """Text that Markdown prints as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|&$~])", r"\\\1", " ".join(text.split()))


def _setting(settings: Mapping[str, Any], key: str) -> str:
    return show_value(settings[key]) if key in settings else MISSING
