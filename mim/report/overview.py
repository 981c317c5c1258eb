"""What a terminal shows of a comparison: all its runs while they train, the table at the end."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table as Grid

from mim.core.progress import clock
from mim.core.terminal import grid
from mim.report.collect import Comparison, Run, read_comparison, read_measures
from mim.report.measures import cost_measures, evaluation_measures, loss_measures
from mim.report.tables import means_table, runs_table

_SECONDS = 2.0


@contextmanager
def live_overview(folder: Path, console: Console) -> Iterator[set[str]]:
    """Show the state of all runs on a terminal until the block ends, and then leave it there.

    Yields:
        The folders that are being computed, which the files do not say; the caller keeps them.
    """
    active, done = set[str](), threading.Event()
    with Live(console=console, auto_refresh=False, transient=False) as live:

        def refresh() -> None:
            live.update(overview(read_comparison(folder), set(active)), refresh=True)

        def follow() -> None:
            while not done.wait(_SECONDS):
                refresh()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield active
        finally:
            done.set()
            thread.join()
            active.clear()
            refresh()


def overview(comparison: Comparison, active: Collection[str] = ()) -> Grid:
    """All runs: their state, how far they are, the time left, why one failed."""
    table = runs_table(comparison)
    rows = []
    for run, row in zip(comparison.runs, table.rows, strict=True):
        cells = [cell.text for cell in row.cells]
        if run.folder.name in active:
            # It has its result before its evaluations.
            cells[1] = "evaluating" if run.finished else "running"
        elif run.status == "running":
            cells[1] = "waiting"  # begun by an earlier call
        rows.append(cells)
    heads = [column.label.lower() for column in table.columns]
    finished = sum(run.finished and run.folder.name not in active for run in comparison.runs)
    left = training_left(comparison)
    about = f", about {clock(left)} left" if left else ""
    return grid(heads, rows, f"{comparison.name}: {finished} of {len(rows)} done{about}")


def training_left(comparison: Comparison) -> float | None:
    """Estimate the seconds that are left, evaluations too; None while nothing is known.

    A run that has not begun is taken to last as long as its group's finished ones, or else as the
    mean of all that are known; every run and reference is taken to be evaluated in the mean time
    so far.
    """
    known: dict[str, list[float]] = {}
    spent = [run.evaluated for run in comparison.runs if run.kind == "run" and run.evaluated]
    evaluating = sum(spent) / len(spent) if spent else 0.0
    references = sum(
        run.kind != "run" and run.status not in ("finished", "failed") for run in comparison.runs
    )
    left, waiting = references * evaluating, []
    for group in comparison.groups:
        for run in group.runs:
            progress = run.progress
            if run.finished and "wall_seconds" in run.measures:
                took = run.measures["wall_seconds"] + run.evaluated
                known.setdefault(group.label, []).append(took)
            elif progress is not None and progress.seconds_left is not None and progress.total:
                left += progress.seconds_left + evaluating
                if (rest := progress.total - progress.step) > 0:
                    whole = progress.seconds_left * progress.total / rest
                    known.setdefault(group.label, []).append(whole + evaluating)
            elif progress is not None:
                waiting.append(group.label)
    means = {label: sum(seconds) / len(seconds) for label, seconds in known.items()}
    if not means:
        return None
    return left + sum(means.get(label, sum(means.values()) / len(means)) for label in waiting)


def evaluations_table(
    numbers: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of what encoders reached: a row a measure, a column an encoder.

    Args:
        numbers: encoder -> evaluation -> named numbers.
    """
    runs = []
    for name, evaluations in numbers.items():
        measures = read_measures({"evaluations": evaluations}, {})
        runs.append(Run(Path(name), name, "run", {}, 0, "finished", measures=measures))
    measured = Comparison(Path(), "", "", {}, {}, tuple(runs), (), ())
    rows = [
        [measure.title, *(measure.number(run.measures.get(measure.key)) for run in runs)]
        for measure in evaluation_measures(measured)
    ]
    return ["measure", *numbers], rows


def closing_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of what matters at the end: held-out loss, the evaluations, the time."""
    loss = [measure for measure in loss_measures(comparison) if measure.key == "val_loss"]
    time = [measure for measure in cost_measures(comparison) if measure.key == "wall_seconds"]
    measures = [*loss, *evaluation_measures(comparison), *time]
    table = means_table(comparison, measures, [], "closing")
    return table.heads, [[cell.text for cell in row.cells] for row in table.rows]


def as_json(comparison: Comparison, report: Path) -> dict[str, Any]:
    """The comparison for scripts: every run with its state and its numbers."""
    runs = [
        {
            "name": run.folder.name,
            "kind": run.kind,
            "status": run.status,
            "reason": run.error,
            "axes": run.axes,
            "seed": run.seed,
            "measures": run.measures,
        }
        for run in comparison.runs
    ]
    return {"name": comparison.name, "report": str(report), "runs": runs}
