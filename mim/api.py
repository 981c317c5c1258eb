"""What stands above all rooms: a comparison and its report, by one call."""

from __future__ import annotations

import functools
from pathlib import Path

from rich.console import Console

from mim.compare import CompareConfig, Launch, read_compare_config, run_comparison
from mim.core.errors import choice_error
from mim.model import encode
from mim.report import read_comparison, write_report
from mim.report.overview import closing_table, live_overview
from mim.training.loading import load
from mim.training.runtime.trackers import track_report

__all__ = ["CompareConfig", "Launch", "compare", "encode", "load", "read_compare_config"]

SHOWS = ("auto", "live", "plain", "quiet")


def compare(
    config: CompareConfig, command: str = "", show: str = "auto", launch: Launch | None = None
) -> Path:
    """Run a comparison and write its report.

    What fails is told on stderr and in the report. What is kept of an earlier call, and what is
    refused, says :func:`mim.compare.runner.run_comparison`.

    Args:
        config: the comparison.
        command: how it was called, for the report.
        show: live (a table of all runs, on a terminal), plain (lines), quiet (failures alone), all
            on stderr; auto is live on a terminal and plain elsewhere. Where it is live, what a run
            prints to stderr goes to ``stderr.log`` in its folder.
        launch: where the runs are computed; by default here, one after the other.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: for a mistake in the config, before any training.
        KeyboardInterrupt: after a signal, with everything saved.
    """
    return compare_runs(config, command, show, launch)[0]


def compare_runs(
    config: CompareConfig, command: str = "", show: str = "auto", launch: Launch | None = None
) -> tuple[Path, list[str]]:
    """:func:`compare`, and the folders of the runs that failed."""
    if show not in SHOWS:
        raise choice_error("show", show, SHOWS)
    if show == "auto":
        show = "live" if Console(stderr=True).is_terminal else "plain"
    output = Path(config.output)
    watch = functools.partial(live_overview, output, Console(stderr=True))

    def report() -> None:
        write_report(output)
        _track(config, output)

    shown = watch if show == "live" else None
    failed = run_comparison(config, command, show, launch, watch=shown, on_end=report)
    return output / "report.html", failed


def _track(config: CompareConfig, output: Path) -> None:
    """Give the report to the trackers, where there are any."""
    files = [output / name for name in ("report.html", "report.md", "results.csv")]
    files += sorted((output / "tables").iterdir())
    text = (output / "report.md").read_text(encoding="utf-8")
    table = closing_table(read_comparison(output))
    track_report(config.base, config.name, output, files, table, text)
