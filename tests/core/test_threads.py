"""Whether torch's threads sleep at once, or look out for work first, follows from the cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import psutil
import pytest

from mim.core.cpu import process

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")


def chosen(
    monkeypatch: pytest.MonkeyPatch, busy: list[float], given: Mapping[str, str]
) -> list[str | None]:
    """What stands in the environment then, of a process that has not loaded torch."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: busy)
    process.choose_waiting()
    return [os.environ.get(name) for name in NAMES[:2]]


@pytest.mark.parametrize(
    "busy, given, wanted",
    [
        ([0, 5, 10, 0], {}, ["PASSIVE", process.SPINS]),
        ([0, 100, 0, 0], {}, ["PASSIVE", None]),
        ([20, 20, 20, 20], {}, ["PASSIVE", None]),
        ([0, 100, 100, 0], {"OMP_NUM_THREADS": "2"}, ["PASSIVE", process.SPINS]),
        ([60, 100, 100, 0], {"OMP_NUM_THREADS": "2"}, ["PASSIVE", None]),
        ([0, 0, 0, 0], {"OMP_NUM_THREADS": "1"}, ["PASSIVE", None]),
        # Cores that this process may not run on do not count.
        ([0, 0, 0, 0, 100, 100], {}, ["PASSIVE", process.SPINS]),
        ([100, 100, 100, 100, 0, 0, 0, 0], {}, ["PASSIVE", None]),
        ([0, 0, 0, 0], {"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", None]),
        ([0, 0, 0, 0], {"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"]),
        ([100, 100, 100, 100], {"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"]),
    ],
)
def test_how_threads_wait(
    busy: list[float],
    given: dict[str, str],
    wanted: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen(monkeypatch, busy, given) == wanted


def test_too_late_it_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has read the environment when it is loaded; nobody waits to find that out."""
    for name in NAMES[:2]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "cpu_percent", lambda *args, **kwargs: pytest.fail("it looked"))
    process.choose_waiting()
    assert [os.environ.get(name) for name in NAMES[:2]] == [None, None]


def test_a_verb_chooses_before_it_loads_torch() -> None:
    code = (
        "import os, sys\n"
        "import mim.cli.main as cli\n"
        "before = 'torch' in sys.modules\n"
        "cli.VERBS['runs'] = lambda args: print(before, os.environ['OMP_WAIT_POLICY'])\n"
        "cli.main(['runs'])\n"
    )
    free = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=free)
    assert done.stdout == "False PASSIVE\n", done.stderr
