"""``metrics.jsonl`` on disks that are slow or full: nothing waits, no line is lost or doubled."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim.core.errors import TrainingError
from mim.training import checkpoint
from mim.training.metrics import Metrics

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
SECONDS = 0.05
STEPS = 50
EVERY_STEP = {
    "train.max_steps": STEPS,
    "train.log_every": 1,
    "train.checkpoint_every": 0.4,  # 25 steps an epoch: five checkpoints
    "train.keep_checkpoints": 9,
}


def rows(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


class SlowFile:
    """What is written reaches the file when it is closed, which takes 50 ms."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *details: object) -> None:
        time.sleep(SECONDS)
        self.file.close()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is in the file 50 ms after its writing began."""
    real = Path.open

    def slow(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = real(self, mode, *args, **kwargs)
        return SlowFile(file) if self.name == "metrics.jsonl" and "a" in mode else file

    monkeypatch.setattr(Path, "open", slow)


@pytest.mark.parametrize("beside", [False, True])
def test_a_slow_disk_does_not_slow_the_loop(
    beside: bool,
    tmp_path: Path,
    mim: Mim,
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """And when a checkpoint is written, all lines up to its step are in the file."""
    changes = {**EVERY_STEP, "train.async_save": beside}
    args = ("pretrain", "--config", tiny(changes), "--output")
    plain, slow = tmp_path / "plain", tmp_path / "slow"
    assert mim(*args, plain).code == 0
    request.getfixturevalue("slow_disk")
    waited = {"write": 0.0, "flush": 0.0}
    for name in waited:
        real = getattr(Metrics, name)

        def timed(*given: Any, real: Any = real, name: str = name, **named: Any) -> None:
            began = time.monotonic()
            real(*given, **named)
            waited[name] += time.monotonic() - began

        monkeypatch.setattr(Metrics, name, timed)
    known, save = [], checkpoint.save_checkpoint

    def noted(run: Path, state: Any, step: int, *more: Any) -> Path:
        known.append((step, [row["step"] for row in rows(run / "metrics.jsonl") if "lr" in row]))
        return save(run, state, step, *more)

    monkeypatch.setattr(checkpoint, "save_checkpoint", noted)
    assert mim(*args, slow).code == 0
    assert rows(slow / "metrics.jsonl") == rows(plain / "metrics.jsonl")
    assert waited["write"] < 0.1 * STEPS * SECONDS, waited
    # A checkpoint waits for the write that has begun and for one more, of all lines since.
    assert waited["flush"] < len(known) * 2 * SECONDS + 0.3, waited
    assert len(known) == 5
    for step, lines in known:
        assert lines[:step] == list(range(1, step + 1)), step


def test_lines_keep_their_order(tmp_path: Path, slow_disk: None) -> None:
    path, began = tmp_path / "metrics.jsonl", time.monotonic()
    with Metrics(path, 0) as metrics:
        for step in range(200):
            metrics.write(step=step)
        metrics.flush()
        assert time.monotonic() - began < 200 * SECONDS / 4, "all lines that wait are one write"
        assert [row["step"] for row in rows(path)] == list(range(200))
        metrics.write(step=200)
    assert [row["step"] for row in rows(path)] == list(range(201))


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    metrics = Metrics(path, 0)
    metrics.write(step=1)
    for act in (metrics.flush, metrics.check, lambda: metrics.write(step=2)):
        with pytest.raises(TrainingError, match="No space left on device; the last good checkp"):
            act()


def test_a_run_whose_metrics_cannot_be_written_stops(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not at its next checkpoint, and it goes on to the same lines."""
    args = ("pretrain", "--config", tiny(EVERY_STEP), "--resume", "auto", "--output")
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert mim(*args, plain).code == 0
    real, written = Metrics._append, []

    def failing(self: Metrics) -> None:
        written.append(1)
        if len(written) == 13:
            raise OSError(5, "Input/output error")
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "_append", failing)
        outcome = mim(*args, run)
    assert outcome.code == 1
    assert "metrics.jsonl' cannot be written: Input/output error; the last good" in outcome.line
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_00000010.pt"]
    assert mim(*args, run).code == 0
    assert rows(run / "metrics.jsonl") == rows(plain / "metrics.jsonl")
