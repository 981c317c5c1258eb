"""A tracker, or the disk, fails in the middle of training."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker, WandBTracker

from mim.core.settings import load_config
from mim.training import checkpoint, hooks
from mim.training.metrics import Metrics
from mim.training.runtime.trackers import Trackers, track_report

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
Outcomes = list[tuple[str, str, str]]
DISK = "64m"


def fill(place: Path) -> Path:
    """Takes all room that is left."""
    path = place / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        try:
            while True:
                file.write(bytes(1))
        except OSError:
            pass
    return path


def at_line(number: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens before a line of metrics is written."""
    real, lines = Metrics.write, 0

    def write(self: Metrics, **values: Any) -> None:
        nonlocal lines
        lines += 1
        if lines == number:
            act()
        real(self, **values)

    monkeypatch.setattr(Metrics, "write", write)


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def warnings(err: str) -> list[str]:
    return [line for line in err.splitlines() if "has failed" in line]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("call", ["log", "picture", "finish"])
@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_tracker_that_fails_is_left_out(
    name: str,
    call: str,
    fault: str,
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: Outcomes,
) -> None:
    def fail(error: Exception) -> None:
        if fault == "hangs":
            threading.Event().wait()
        raise error

    kinds = {"tensorboard": TensorBoardTracker, "wandb": WandBTracker}
    given: dict[str, list[int]] = {"tensorboard": [], "wandb": []}
    for kind, tracker in kinds.items():  # no server, no files
        for method in ("start", "store_init_configuration", "finish"):
            monkeypatch.setattr(tracker, method, lambda self, *args: None)

        def log(self: Any, values: Any, step: int, kind: str = kind) -> None:
            given[kind].append(step)
            if kind == name and call == "log" and step == 4:
                fail(ConnectionError("the server\nis gone"))

        monkeypatch.setattr(tracker, "log", log)

    def picture(trackers: list[Any], path: Path, step: int) -> None:
        if trackers[0].name == name and call == "picture":
            fail(OSError(28, "No space left on device"))

    monkeypatch.setattr("mim.training.runtime.trackers.track_picture", picture)

    def finish(self: Any) -> None:
        fail(BrokenPipeError(32, "Broken pipe"))

    if call == "finish":
        monkeypatch.setattr(kinds[name], "finish", finish)
    run = tmp_path / "run"
    changes = {
        "log.tensorboard": True,
        "log.wandb": "offline",
        "log.timeout": 0.3 if fault == "hangs" else 60,
        "train.picture_every": 0.12,
    }
    monkeypatch.setattr(atexit, "register", lambda act: None)  # of this process
    outcome = mim("pretrain", "--config", tiny(changes), "--output", run)
    outcomes.append(("tracker", f"{name}.{call} {fault}", "stopped"))
    assert outcome.code == 0
    cause = {
        "log": "the server is gone",
        "picture": "No space left on device",
        "finish": "Broken pipe",
    }
    if fault == "hangs":
        cause[call] = "no answer for 0.3 s, see log.timeout"
    assert warnings(outcome.err) == [
        f"log: {name} has failed and gets nothing more of this run ({cause[call]}); "
        "training continues"
    ]
    assert [row["step"] for row in rows(run) if "lr" in row] == [2, 4, 6]
    (other,) = set(given) - {name}
    assert sorted(set(given[other])) == [2, 4, 6], "the other one gets everything"
    last = {"log": 4, "picture": 2, "finish": 6}[call]
    assert max(given[name]) == last
    assert checkpoint.read_result(run)["status"] == "finished"
    outcomes[-1] = (*outcomes[-1][:2], "went on")


class Fake:
    """A tracker whose calls take as long as one likes."""

    def __init__(self, name: str, log: Callable[[int], object]) -> None:
        self.name, self._log = name, log

    def log(self, values: dict[str, float], step: int) -> None:
        self._log(step)

    def finish(self) -> None:
        self._log(-1)


def test_a_tracker_that_hangs_keeps_nobody_waiting(capfd: pytest.CaptureFixture[str]) -> None:
    """It is left out in the middle of the run, not only at its end; the slow one gets all."""
    hung, seen, free = [], [], threading.Event()

    def hang(step: int) -> None:
        hung.append(step)
        if step == 1:
            free.wait()

    def slow(step: int) -> None:
        time.sleep(0.01)
        seen.append(step)

    began = time.monotonic()
    fakes: list[Any] = [Fake("one", hang), Fake("two", slow)]
    with Trackers(fakes, 0.5) as trackers:
        for step in range(20):
            trackers.log({"loss": 1.0}, step)
        assert time.monotonic() - began < 0.1
        assert len(seen) < 20 and not warnings(capfd.readouterr().err)
        time.sleep(0.6)
        trackers.log({"loss": 1.0}, 20)
        (line,) = warnings(capfd.readouterr().err)
        assert line.startswith("log: one has failed") and "no answer for 0.5 s" in line
        free.set()  # it comes back too late
    assert time.monotonic() - began < 1.5
    assert seen == [*range(21), -1] and hung == [0, 1]
    assert not warnings(capfd.readouterr().err)
    for thread in threading.enumerate():
        if thread.name in ("mim-one", "mim-two"):
            thread.join(5)
            assert not thread.is_alive(), "it was told to end"


def test_a_tracker_that_cannot_keep_up(capfd: pytest.CaptureFixture[str]) -> None:
    free, seen = threading.Event(), []

    def wait(step: int) -> None:
        free.wait()
        seen.append(step)

    fakes: list[Any] = [Fake("one", wait)]
    with Trackers(fakes, 30) as trackers:
        for step in range(3000):
            trackers.log({}, step)
        free.set()
    (line,) = warnings(capfd.readouterr().err)
    assert "it is 1000 calls behind" in line and seen in ([], [0])


SERVICE = """
import os, signal, sys, threading
import psutil
from accelerate import PartialState
from accelerate.tracking import WandBTracker
from mim.training.runtime.trackers import Trackers

PartialState(cpu=True)
tracker = WandBTracker("masks", mode="offline", dir=sys.argv[1])
tracker.start()
with Trackers([tracker], 1.0) as trackers:
    trackers.log({"loss": 1.0}, 1)
    (service,) = [c for c in psutil.Process().children() if c.name().startswith("wandb-core")]
    service.send_signal(signal.SIGSTOP)
    timer = threading.Timer(30, service.kill)  # else this test would hang with it
    timer.daemon = True
    timer.start()
    trackers.log({"loss": 1.0}, 2)
sys.exit(3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_the_service_of_wandb_hangs(tmp_path: Path, outcomes: Outcomes) -> None:
    """wandb itself, whose own hook would wait for its service at the end of Python, for ever."""
    outcomes.append(("tracker", "the service of wandb is stopped", "hangs"))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SERVICE, tmp_path],
        # Not the service that another test has started.
        env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3 and time.monotonic() - began < 30, done.stderr
    (line,) = warnings(done.stderr)
    assert "wandb has failed" in line and "no answer for 1 s" in line
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    outcomes[-1] = (*outcomes[-1][:2], "went on")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_tracker_fails_at_the_report(
    name: str,
    fault: str,
    tmp_path: Path,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    outcomes: Outcomes,
) -> None:
    """A comparison is whole by then; the other tracker still gets its report."""
    given: list[str] = []
    kinds: dict[str, Any] = {"tensorboard": TensorBoardTracker, "wandb": WandBTracker}

    def start(self: Any) -> None:
        if self.name != name:
            given.append(self.name)
            raise ConnectionError("refused")
        if fault == "hangs":
            threading.Event().wait()
        raise RuntimeError("No API key\nconfigured.")

    for kind in kinds.values():
        monkeypatch.setattr(kind, "start", start)
    monkeypatch.setattr(atexit, "register", lambda act: None)
    changes = {"log.tensorboard": True, "log.wandb": "online", "log.timeout": 0.3}
    config = load_config(tiny(changes))
    outcomes.append(("tracker", f"the report: {name} {fault}", "stopped"))
    track_report(config, "name", tmp_path, [], (["Encoder"], [["drop"]]), "text")
    told = warnings(capfd.readouterr().err)
    (other,) = {*kinds} - {name}
    cause = "no answer for 0.3 s, see log.timeout" if fault == "hangs" else "No API key configured."
    assert sorted(told) == sorted(
        [
            f"log: {name} has failed and does not get the report ({cause})",
            f"log: {other} has failed and does not get the report (refused)",
        ]
    )
    assert given == [other]
    outcomes[-1] = (*outcomes[-1][:2], "went on")


def test_the_disk_of_tensorboard_fills_up(
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: Outcomes,
) -> None:
    """Its writer is a thread: nothing hangs, and the thread's traceback is not shown."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "logs").symlink_to(small_disk)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    at_line(2, lambda: fill(small_disk), monkeypatch)
    config = tiny({"log.tensorboard": True, "train.log_every": 1, "train.max_steps": 30})
    outcomes.append(("full disk", "of TensorBoard", "stopped"))
    outcome = mim("pretrain", "--config", config, "--output", run)
    assert outcome.code == 0
    assert len(warnings(outcome.err)) == 1 and "tensorboard" in warnings(outcome.err)[0]
    assert "Traceback" not in outcome.err and "Exception" not in outcome.err
    assert [row["step"] for row in rows(run) if "lr" in row] == list(range(1, 31))
    outcomes[-1] = (*outcomes[-1][:2], "went on")


def test_the_disk_of_the_run_fills_up(
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: Outcomes,
) -> None:
    changes = {"train.checkpoint_every": 0.08, "train.log_every": 1}
    config, straight, run = tiny(changes), tmp_path / "straight", small_disk / "run"
    train = ("pretrain", "--config", config, "--resume", "auto", "--output")
    assert mim(*train, straight).code == 0
    with monkeypatch.context() as patch:
        at_line(4, lambda: fill(small_disk), patch)
        outcomes.append(("full disk", "of the run, in the middle", "lost"))
        outcome = mim(*train, run)
    assert outcome.code == 1
    assert "checkpoint of step 4 cannot be saved" in outcome.line
    assert "the last good one is kept. Make room" in outcome.line
    assert [path.name for path in checkpoint.checkpoints(run)][-1:] == ["step_00000002.pt"]
    (small_disk / "filler").unlink()
    assert mim(*train, run).code == 0
    assert rows(run) == rows(straight)
    states = [checkpoint.newest_checkpoint(place)[0] for place in (straight, run)]
    assert all(value.equal(states[1]["model"][name]) for name, value in states[0]["model"].items())
    outcomes[-1] = (*outcomes[-1][:2], "identical")


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_tracker_that_cannot_start_again(
    fault: str, tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a run it is a mistake; a run that is requeued goes on without it."""

    def start(self: Any) -> None:
        if fault == "hangs":
            threading.Event().wait()
        raise OSError(30, "Read-only file system")

    seconds = 0.3 if fault == "hangs" else 60
    changes = {"log.tensorboard": True, "log.timeout": seconds, "train.checkpoint_every": 0.04}
    config, run = tiny(changes), tmp_path / "run"
    train = ("pretrain", "--config", config, "--resume", "auto", "--output", run)
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "start", start)
        outcome = mim(*train)
        assert outcome.code == 2
        wrong = (
            "cannot write in " if fault == "raises" else "True does not start: no answer for 0.3"
        )
        assert f"log.tensorboard: {wrong}" in outcome.line
    real = hooks.HeldOut.run

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hooks.HeldOut, "run", interrupt)  # at the end
    assert mim(*train).code == 130
    monkeypatch.setattr(hooks.HeldOut, "run", real)
    monkeypatch.setattr(TensorBoardTracker, "start", start)
    outcome = mim(*train)
    assert outcome.code == 0 and len(warnings(outcome.err)) == 1
    cause = "Read-only file system" if fault == "raises" else "no answer for 0.3 s, see log.timeout"
    assert f"({cause})" in warnings(outcome.err)[0]
