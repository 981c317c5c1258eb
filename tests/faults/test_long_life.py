"""A long run grows nothing: memory, file handles, threads, or the price of a line of metrics.

``MIM_LONG_STEPS`` sets its steps, 20,000 by default.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mim import checkpoint
from mim.pretrain import Metrics

STEPS = int(os.environ.get("MIM_LONG_STEPS", "20000"))
LINES = 200


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
    real = Metrics.write

    def write(self: Metrics, **values: Any) -> None:
        began = time.perf_counter()
        real(self, **values)
        seconds = time.perf_counter() - began
        if "lr" in values:
            memory = process.memory_info().rss
            seen.append((memory, process.num_fds(), threading.active_count(), seconds))

    monkeypatch.setattr(Metrics, "write", write)
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
    memory, handles, threads, seconds = (
        [statistics.median(row[i] for row in part) for part in (early, late)] for i in range(4)
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
