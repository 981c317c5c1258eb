"""A long run grows nothing: memory, file handles, threads, or the price of a line of metrics.

``MIM_LONG_STEPS`` sets its steps, 20,000 by default. ``MIM_LONG_RESTARTS`` sets how often loader
workers are started anew; ``bash scripts/test.sh faults`` does so 300 times.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mim.training import checkpoint, hooks
from mim.training.metrics import Metrics

STEPS = int(os.environ.get("MIM_LONG_STEPS", "20000"))
LINES = 200
RESTARTS = int(os.environ.get("MIM_LONG_RESTARTS", "12"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_grows(
    tmp_path: Path,
    mim: Callable[..., Any],
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[tuple[str, str, str]],
) -> None:
    process = psutil.Process()
    seen: list[tuple[int, int, int, float]] = []  # bytes, handles, threads, seconds of a line
    real = Metrics._append

    def append(self: Metrics) -> None:
        began = time.perf_counter()
        real(self)
        seconds = time.perf_counter() - began
        memory = process.memory_info().rss
        seen.append((memory, process.num_fds(), threading.active_count(), seconds))

    monkeypatch.setattr(Metrics, "_append", append)
    changes = {
        "data.batch_size": 16,
        "data.workers": 1,
        "train.epochs": STEPS,
        "train.max_steps": STEPS,
        "train.ema_decay": 0.9,
        "train.on_nonfinite": "skip",
        "train.log_every": max(STEPS // LINES, 1),
        "train.checkpoint_every": STEPS / 101 / 5,  # 101 steps an epoch: five in all
        "train.picture_every": STEPS / 101 / 4,
        "log.tensorboard": True,
    }
    run = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    assert checkpoint.read_result(run)["steps"] == STEPS
    early, late = seen[len(seen) // 3 : len(seen) // 2], seen[-len(seen) // 5 :]
    # The least of each: a batch on its way holds handles for a moment, another process takes time.
    memory, handles, threads, seconds = (
        [min(row[i] for row in part) for part in (early, late)] for i in range(4)
    )
    grown = memory[1] - memory[0]
    told = (
        f"{STEPS} steps: memory {grown / 1e6:+.1f} MB, handles {handles[0]:g} to {handles[1]:g}, "
        f"threads {threads[0]:g} to {threads[1]:g}, a line {seconds[0] * 1e6:.0f} to "
        f"{seconds[1] * 1e6:.0f} us"
    )
    outcomes.append(("long life", told, "grows"))
    assert grown < 8e6, told
    assert handles[1] <= handles[0] and threads[1] <= threads[0], told
    assert seconds[1] < 3 * seconds[0], told
    outcomes[-1] = ("long life", told, "steady")


def test_workers_are_started_anew_and_leave_nothing(
    tmp_path: Path,
    mim: Callable[..., Any],
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[tuple[str, str, str]],
) -> None:
    """Each held-out loss has workers of its own, beside those of the training, which stay."""
    process, real = psutil.Process(), Metrics.write
    seen: list[dict[str, float]] = []
    workers: set[int] = set()

    def children() -> set[int]:
        return {child.pid for child in process.children(recursive=True)}

    def write(self: Metrics, **values: Any) -> None:
        real(self, **values)
        if "val_loss" in values:
            maps = process.memory_maps(grouped=False)
            now = {
                "processes": len(children()),
                "handles": process.num_fds(),
                "threads": threading.active_count(),
                "shared memory": sum("/dev/shm" in part.path for part in maps),
                "memory": process.memory_info().rss,
            }
            seen.append(now)

    batches = hooks.eval_loader

    def watched(*args: Any, **named: Any) -> Iterator[Any]:
        there = children()
        for batch in batches(*args, **named):
            workers.update(children() - there)
            yield batch

    monkeypatch.setattr(Metrics, "write", write)
    monkeypatch.setattr(hooks, "eval_loader", watched)
    changes = {
        "data.workers": 2,
        "train.epochs": RESTARTS,
        "train.max_steps": RESTARTS,
        "train.validate_every": 0.01,  # each step
        "train.log_every": 1,
        "train.checkpoint_every": RESTARTS,
    }
    before = children()
    outcomes.append(("long life", f"workers started anew {RESTARTS} times", "grows"))
    assert mim("pretrain", "--config", tiny(changes), "--output", tmp_path / "run").code == 0
    assert len(seen) == RESTARTS
    assert len(workers) == 2 * RESTARTS
    assert children() == before
    early, late = seen[RESTARTS // 3], seen[-1]
    for what in ("processes", "handles", "threads", "shared memory"):
        assert late[what] <= early[what], (what, seen)
    assert late["memory"] - early["memory"] < 8e6, seen
    outcomes[-1] = (*outcomes[-1][:2], "steady")
