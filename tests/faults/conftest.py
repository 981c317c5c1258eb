"""The table of trials and their outcomes, printed at the end."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_OUTCOMES: list[tuple[str, str, str]] = []
_SECONDS: dict[str, list[float]] = {}
LOST_TRIALS = int(os.environ.get("MIM_LOST_TRIALS", "1"))
"""How often a process is lost in each way; the table at the end has median and range."""


@pytest.fixture
def outcomes() -> list[tuple[str, str, str]]:
    """Where a trial puts (fault, where it struck, outcome)."""
    return _OUTCOMES


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own, as large as ``DISK`` of the test's module."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("needs Linux and mount")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.module.DISK}", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def ended_after() -> Callable[[str, float], None]:
    """Where a trial puts how long the others went on after a process was lost in this way."""
    return lambda way, seconds: _SECONDS.setdefault(way, []).append(seconds)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeat the trials whose time is taken."""
    if "ended_after" in metafunc.fixturenames and LOST_TRIALS > 1:
        metafunc.fixturenames.append("trial")
        metafunc.parametrize("trial", range(LOST_TRIALS))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table; under xdist each worker has its own, so the fault suite runs without."""
    if not _OUTCOMES:
        return
    terminalreporter.section("trials and outcomes")
    for number, (fault, place, outcome) in enumerate(_OUTCOMES, start=1):
        terminalreporter.write_line(f"{number:>3}  {fault:<12} {outcome:<12} {place}")
    if _SECONDS:
        terminalreporter.section("seconds until the others had ended: median (range)")
    for way, seconds in _SECONDS.items():
        spread = f"({min(seconds):.1f} to {max(seconds):.1f})" if len(seconds) > 1 else ""
        line = f"{statistics.median(seconds):6.1f} {spread:<16} of {len(seconds)}  {way}"
        terminalreporter.write_line(line)
    counts = Counter((fault, outcome) for fault, _, outcome in _OUTCOMES)
    for (fault, outcome), count in sorted(counts.items()):
        terminalreporter.write_line(f"{fault}: {outcome} {count}")
