"""A run folder of an early version (format 1, commit 4faa3ea), stopped at step 3 of 6."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mim as package
from mim.training import checkpoint

OLD = Path(__file__).parents[1] / "old_run"
# What that version reached when it was not stopped.
LOSSES = {4: 1.58889639377594, 5: 1.5253244638442993, 6: 1.5127475261688232}
VAL_LOSS = 1.5222085485855739


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(OLD, folder)
    (packed,) = (folder / "checkpoints").iterdir()
    with lzma.open(packed) as file:
        packed.with_suffix("").write_bytes(file.read())
    packed.unlink()
    return folder


def test_it_goes_on(run: Path, mim: Callable[..., Any]) -> None:
    state, passed_over = checkpoint.newest_checkpoint(run)
    assert state is not None and (state["format"], state["step"], passed_over) == (1, 3, [])
    config = ("--config", run / "config.yaml")
    outcome = mim("pretrain", *config, "--output", run, "--resume", "auto")
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert {step: losses[step] for step in LOSSES} == pytest.approx(LOSSES, abs=1e-6)
    assert checkpoint.read_result(run)["val_loss"] == pytest.approx(VAL_LOSS, abs=1e-6)


def test_its_weights_load(run: Path) -> None:
    average = checkpoint.read_checkpoint(checkpoint.checkpoints(run)[-1])["ema"]
    own = package.load(run).state_dict()
    assert own.keys() == average.keys()
    assert all((own[name] == average[name]).all() for name in own)
