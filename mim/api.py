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

    Args:
        config: the comparison.
        command: how it was called, for the report.
        show: live (a table of all runs, on a terminal), plain (lines), quiet (failures alone), all
            on stderr; auto is live on a terminal and plain elsewhere.
        launch: where the runs are computed; by default here, one after the other.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError, KeyboardInterrupt: as :func:`mim.compare.runner.run_comparison`, which also says
            what is kept of an earlier call.
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
    failed = run_comparison(
        config,
        command,
        show,
        launch,
        watch=watch if show == "live" else None,
        on_end=lambda: _report(config, output),
    )
    return output / "report.html", failed


def _report(config: CompareConfig, output: Path) -> None:
    """Write the report and give it to the trackers, where there are any."""
    write_report(output)
    files = [output / name for name in ("report.html", "report.md", "results.csv")]
    files += sorted((output / "tables").iterdir())
    text = (output / "report.md").read_text(encoding="utf-8")
    table = closing_table(read_comparison(output))
    track_report(config.base, config.name, output, files, table, text)
