"""What of a run's time is its steps: whole runs beside the bare step, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu import trainer_of
from mim.core.config import Config
from mim.core.errors import UserError
from mim.training.checkpoint import read_result, write_config
from mim.training.runtime.cost import environment, wait_for

_WARM = 3  # steps before the clock starts


def bench_whole(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """Times whole runs, each in a process of its own, and between them steps of one batch.

    Args:
        config: of pre-training, of several epochs.
        rounds: pairs of a whole run and of bare steps.
        steps: bare steps of a round.

    Returns:
        ``rounds``, each with ``bare``, ``steps`` and ``run`` in images a second (of one batch over
        and over; of the run without its hooks; of the run with held-out loss, probe, curves and
        checkpoints) and ``around``, the seconds of the process that are not of the run: imports,
        listing the images and building the model before it, saving after it.

    Raises:
        UserError: if a run fails.
    """
    trainer = trainer_of(config)
    batch = next(iter(trainer.task.batches(0)))
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            figures = _whole(config, Path(folder))
        found.append({"bare": _bare(trainer, batch, steps), **figures})
    return {"environment": environment(trainer.accelerator.device), "rounds": found}


def _whole(config: Config, folder: Path) -> dict[str, float]:
    write_config(folder, config)
    call = [sys.executable, "-m", "mim", "pretrain", "--config", str(folder / "config.yaml")]
    began = time.monotonic()
    done = subprocess.run(
        [*call, "--output", str(folder / "run")], capture_output=True, text=True, env=os.environ
    )
    seconds = time.monotonic() - began
    if done.returncode:
        raise UserError(f"the run ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result = read_result(folder / "run")
    images = result["steps"] * config.data.batch_size
    return {
        "steps": result["images_per_second"],
        "run": images / result["wall_seconds"],
        "around": seconds - result["wall_seconds"],
    }


def _bare(trainer: Any, batch: Any, steps: int) -> float:
    for number in range(_WARM + steps):
        if number == _WARM:
            wait_for(trainer.accelerator.device)
            began = time.monotonic()
        trainer.train_step(batch)
        trainer.state.unread.clear()
    wait_for(trainer.accelerator.device)
    return float(steps * len(batch.images) / (time.monotonic() - began))


def format_whole(figures: dict[str, Any]) -> str:
    """Returns a Markdown table of the medians, and the ratios within each round."""
    rounds = figures["rounds"]

    def middle(values: list[float]) -> str:
        return f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})"

    rates = [middle([item[key] for item in rounds]) for key in ("bare", "steps", "run")]
    ratios = [middle([item[key] / item["bare"] for item in rounds]) for key in ("steps", "run")]
    cells = [*rates, *ratios, middle([item["around"] for item in rounds])]
    return "\n".join(
        [
            "| bare steps (images/s) | steps of the run | whole run | steps / bare | run / bare "
            "| before and after (s) |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
            "| " + " | ".join(cells) + " |",
        ]
    )
