"""The table of trials and their outcomes, printed at the end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

_OUTCOMES: list[tuple[str, str, str]] = []


@pytest.fixture
def outcomes() -> list[tuple[str, str, str]]:
    """Where a trial puts (fault, where it struck, outcome)."""
    return _OUTCOMES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table; under xdist each worker has its own, so the fault suite runs without."""
    if not _OUTCOMES:
        return
    terminalreporter.section("trials and outcomes")
    for number, (fault, place, outcome) in enumerate(_OUTCOMES, start=1):
        terminalreporter.write_line(f"{number:>3}  {fault:<12} {outcome:<12} {place}")
    counts = Counter((fault, outcome) for fault, _, outcome in _OUTCOMES)
    for (fault, outcome), count in sorted(counts.items()):
        terminalreporter.write_line(f"{fault}: {outcome} {count}")
