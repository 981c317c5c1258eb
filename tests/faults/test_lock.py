"""Two processes never write one run."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mim.core.errors import UserError
from mim.core.lock import sole_use

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX record locks")


def hold(folder: str, seconds: float) -> None:
    with sole_use(Path(folder)):
        Path(folder, "held").touch()
        time.sleep(seconds)


def holder(folder: Path, seconds: float = 60) -> multiprocessing.Process:
    """A process that has the folder, when this returns."""
    process = multiprocessing.Process(target=hold, args=(str(folder), seconds))
    process.start()
    while not (folder / "held").exists():
        assert process.is_alive()
        time.sleep(0.01)
    return process


def test_a_second_start_is_refused_and_a_killed_first_forgotten(
    tmp_path: Path, mim: Mim, tiny: Tiny
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    process = holder(run)
    config = tiny()
    for verb in (("pretrain",), ("compare", "--base.data.source", "digits")):
        arguments = (
            ("--output", run) if verb[0] == "compare" else ("--config", config, "--output", run)
        )
        refused = mim(*verb, *arguments)
        assert refused.code == 2
        assert f"output: '{run}' is in use by process {process.pid} on " in refused.line
    assert sorted(path.name for path in run.iterdir()) == [".lock", "held"], "nothing was written"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    assert not (run / ".lock").exists()


def count_alone(folder: str, times: int) -> None:
    """Adds one to a number that nobody else may be adding to."""
    number = Path(folder, "number")
    while times:
        with suppress(UserError), sole_use(Path(folder)):
            seen = int(number.read_text())
            time.sleep(0.0005)
            number.write_text(str(seen + 1))
            times -= 1


def test_the_lock_of_one_that_leaves_is_not_shared(tmp_path: Path) -> None:
    """Its file goes with it, while others are opening it."""
    (tmp_path / "number").write_text("0")
    counters = [
        multiprocessing.Process(target=count_alone, args=(str(tmp_path), 150)) for _ in range(3)
    ]
    for counter in counters:
        counter.start()
    for counter in counters:
        counter.join()
        assert counter.exitcode == 0
    assert (tmp_path / "number").read_text() == "450"


def test_a_child_of_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    """Workers outlive a killed run by seconds, and have its open files."""
    with sole_use(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    held = holder(tmp_path, 0.0)  # another process can have it
    held.join(10)
    assert held.exitcode == 0
    child.kill()
    child.join()


def test_a_lock_without_a_name(tmp_path: Path) -> None:
    process = holder(tmp_path)
    (tmp_path / ".lock").write_text("{")
    errors = multiprocessing.get_context("fork").Queue()

    def ask() -> None:
        try:
            with sole_use(tmp_path, "here"):
                errors.put("taken")
        except UserError as error:
            errors.put(str(error))

    asking = multiprocessing.get_context("fork").Process(target=ask)
    asking.start()
    assert "is in use by another process" in errors.get(timeout=20)
    asking.join()
    process.kill()
    process.join()
