"""A tracker, or the disk, fails in the middle of training."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker, WandBTracker

from mim import checkpoint
from mim import pretrain as training
from mim.errors import TrainingError
from mim.pretrain import Metrics

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
Outcomes = list[tuple[str, str, str]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(place)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


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
def test_a_tracker_that_raises_is_left_out(
    name: str,
    call: str,
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: Outcomes,
) -> None:
    kinds = {"tensorboard": TensorBoardTracker, "wandb": WandBTracker}
    given: dict[str, list[int]] = {"tensorboard": [], "wandb": []}
    for kind, tracker in kinds.items():  # no server, no files
        for method in ("start", "store_init_configuration", "finish"):
            monkeypatch.setattr(tracker, method, lambda self, *args: None)

        def log(self: Any, values: Any, step: int, kind: str = kind) -> None:
            given[kind].append(step)
            if kind == name and call == "log" and step == 4:
                raise ConnectionError("the server\nis gone")

        monkeypatch.setattr(tracker, "log", log)

    def picture(trackers: list[Any], path: Path, step: int) -> None:
        if trackers[0].name == name and call == "picture":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("mim.trackers.track_picture", picture)

    def finish(self: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    if call == "finish":
        monkeypatch.setattr(kinds[name], "finish", finish)
    run = tmp_path / "run"
    changes = {"log.tensorboard": True, "log.wandb": "offline", "train.picture_every": 0.12}
    outcome = mim("pretrain", "--config", tiny(changes), "--output", run)
    outcomes.append(("tracker", f"{name}.{call} raises", "stopped"))
    assert outcome.code == 0
    cause = {
        "log": "the server is gone",
        "picture": "No space left on device",
        "finish": "Broken pipe",
    }
    assert warnings(outcome.err) == [
        f"log: {name} has failed and gets nothing more of this run ({cause[call]}); training goes "
        "on"
    ]
    assert [row["step"] for row in rows(run) if "lr" in row] == [2, 4, 6]
    (other,) = set(given) - {name}
    assert sorted(set(given[other])) == [2, 4, 6], "the other one gets everything"
    last = {"log": 4, "picture": 2, "finish": 6}[call]
    assert max(given[name]) == last
    assert checkpoint.read_result(run)["status"] == "finished"
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


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(TrainingError, match="No space left on device; the last good checkpoint"):
        Metrics(path, 0).write(step=1)


def test_a_tracker_that_cannot_start_again(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start of a run it is a mistake; a run that is requeued goes on without it."""

    def start(self: Any) -> None:
        raise OSError(30, "Read-only file system")

    config, run = tiny({"log.tensorboard": True, "train.checkpoint_every": 0.04}), tmp_path / "run"
    train = ("pretrain", "--config", config, "--resume", "auto", "--output", run)
    with monkeypatch.context() as patch:
        patch.setattr(TensorBoardTracker, "start", start)
        outcome = mim(*train)
        assert outcome.code == 2
        assert "log.tensorboard: cannot write in " in outcome.line
    real = training.held_out_loss

    def interrupt(*args: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "held_out_loss", interrupt)  # at the end
    assert mim(*train).code == 130
    monkeypatch.setattr(training, "held_out_loss", real)
    monkeypatch.setattr(TensorBoardTracker, "start", start)
    outcome = mim(*train)
    assert outcome.code == 0 and len(warnings(outcome.err)) == 1
    assert "(Read-only file system)" in warnings(outcome.err)[0]
