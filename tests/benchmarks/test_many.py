"""What many runs and images cost, and that the report's work does not grow with its square."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.many import write_runs
from mim.report import read_comparison, write_report

Captured = pytest.CaptureFixture[str]


def calls_of(work: Callable[[], object]) -> int:
    """Python calls that work takes: the same on any machine."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.slow
def test_work_grows_as_the_runs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the runs, at most a little more than twice the calls; pictures are of a set number."""
    from mim.report import figures

    monkeypatch.setattr(figures, "draw", lambda chart, forms: dict.fromkeys(forms, b"<svg/>"))
    counts = {}
    for runs in (900, 1800):
        folder = write_runs(tmp_path / str(runs), runs)
        counts[runs] = calls_of(partial(write_report, folder))
    assert counts[1800] < 2.2 * counts[900], counts


def test_bench_of_many_runs(tmp_path: Path, capsys: Captured) -> None:
    numbers = tmp_path / "numbers.json"
    assert main(["report", "--runs", "9,18", "--json", str(numbers)]) == 0
    figures = json.loads(numbers.read_text())
    assert [row["runs"] for row in figures["rows"]] == [9, 18]
    assert all(row["report_html_bytes"] > 10_000 for row in figures["rows"])
    assert set(figures["exponents"]) == set(figures["rows"][0]) - {"runs"}
    assert "| report html (MiB) |" in capsys.readouterr().out
    assert main(["report", "--runs", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    folder = write_runs(tmp_path / "runs", 9)
    comparison = read_comparison(folder)
    assert len(comparison.groups) == 3 and all(run.finished for run in comparison.runs)
    page = write_report(folder).read_text()
    assert "Runs without a result" not in page and "data:image" in page
    assert (folder / "figures" / "training_loss.svg").is_file()


def test_bench_of_many_images(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    assert main(["index", "--images", "200,400", "--json", str(numbers)]) == 0
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["images"] for row in rows] == [200, 400]
    assert all(value > 0 for row in rows for value in row.values())


@pytest.mark.parametrize("name", ["scale", "report", "index"])
def test_the_old_verbs_say_where_they_are(name: str, mim: Callable[..., Any]) -> None:
    refused = mim("bench", name, "--json", "x.json")
    assert refused.code == 2 and f"python -m benchmarks {name}" in refused.line
