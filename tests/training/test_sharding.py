"""A model shared out among processes trains as one that each has whole (FSDP2, gloo)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mim.training import checkpoint

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
Launch = Callable[..., Any]

# Uneven parts: the held-out images do not divide, nor do some parameters, of one row.
CHANGES = {
    "data.batch_size": 36,
    "data.val_fraction": 0.101,
    "train.log_every": 1,
    "train.validate_every": 0.1,
    "train.checkpoint_every": 0.1,
    "train.accumulate": 2,
    "optim.clip_grad": 1.0,
}
# What lies on each process is a part, and the step does as much.
NOTE = """
import mim.training.runtime.sharding
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

load = mim.training.runtime.sharding.Sharded.__init__

def noted(self, model, accelerator):
    load(self, model, accelerator)
    parts = sum(p.to_local().numel() for p in self.parameters() if isinstance(p, DTensor))
    total = sum(p.numel() for p in self.parameters())
    units = sum(isinstance(module, FSDPModule) for module in self.modules())
    open({note!r} + str(rank), "w").write(f"{{parts}} {{total}} {{units}}")

mim.training.runtime.sharding.Sharded.__init__ = noted
"""


def curve(run: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    named = ("loss", "val_loss")
    return {(row["step"], name): row[name] for row in rows for name in named if name in row}


def assert_alike(one: Path, two: Path) -> None:
    assert len(curve(one)) == 8
    assert curve(two) == pytest.approx(curve(one), abs=1e-5)
    state, other = (checkpoint.encoder_weights(run) for run in (one, two))
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert other[name].shape == value.shape
        assert other[name].numpy() == pytest.approx(value.numpy(), abs=1e-4), name


@pytest.mark.parametrize("regime", ["zero", pytest.param("drop", marks=pytest.mark.slow)])
def test_shards_are_the_whole(
    regime: str, tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch
) -> None:
    depth = {"model.backbone_args.depth": 2, "model.decoder.transformer.depth": 2}
    config = tiny({**CHANGES, **depth, "model.regime.name": regime})
    args = ["pretrain", "--config", config, "--output"]
    one, two, note = tmp_path / "one", tmp_path / "two", tmp_path / "note"
    assert mim(*args, one).code == 0
    shard = ["--train.shard", "true"]
    started = ranks([*args, two, *shard], all=NOTE.format(note=str(note)))
    assert started.wait() == [0, 0], started.texts()
    assert_alike(one, two)
    noted = [Path(f"{note}{rank}").read_text().split() for rank in (0, 1)]
    parts, totals = ([int(row[column]) for row in noted] for column in (0, 1))
    assert sum(parts) == totals[0] == totals[1] and max(parts) < 0.6 * totals[0]
    assert noted[0][2] == "5", "each block of the encoder and of the decoder, and the rest"
    # The files are those of a run that was not sharded: every tensor whole, the same names.
    ours, theirs = (checkpoint.read_checkpoint(checkpoint.checkpoints(r)[-1]) for r in (two, one))
    assert ours["model"].keys() == theirs["model"].keys()
    moments = [state["optimizer"]["state"] for state in (ours, theirs)]
    for number, state in moments[1].items():
        for name, value in state.items():
            assert moments[0][number][name].shape == value.shape


@pytest.mark.parametrize("first", ["sharded", pytest.param("alone", marks=pytest.mark.slow)])
def test_a_run_goes_on_sharded_or_not(
    first: str, tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch, stop: str
) -> None:
    """Stopped in its third step by a signal to one process; moments and weights go along."""
    args = ["pretrain", "--config", tiny(CHANGES), "--resume", "auto", "--output"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert mim(*args, one).code == 0
    shard = [*args, two, "--train.shard", "true"]
    begin = shard if first == "sharded" else [*args, two]
    world = 2 if first == "sharded" else 1
    codes = ranks(begin, world, of={world - 1: stop}).wait()
    assert codes == [143] * world
    assert checkpoint.checkpoints(two)[-1].name == "step_00000003.pt"
    if first == "sharded":
        assert mim(*args, two).code == 0
    else:
        assert ranks(shard).wait() == [0, 0]
    assert_alike(one, two)


def test_what_cannot_be_sharded_is_refused(
    tmp_path: Path, mim: Mim, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["pretrain", "--config", tiny(), "--output", tmp_path / "run"]
    for key, value in (("train.ema_decay", 0.9), ("train.precision", "fp16")):
        refused = mim(*args, "--train.shard", "true", f"--{key}", value)
        assert refused.code == 2 and "train.shard: True does not work with" in refused.line
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused = mim(*args)
    assert refused.code == 2 and "set train.shard=true" in refused.line


def test_a_tensor_is_whole_again() -> None:
    """A state without shards stays what it is."""
    from mim.training.runtime.sharding import gather_full

    state = {"a": [torch.arange(3), 1], "b": {"c": "text"}}
    assert gather_full(state)["a"][0] is state["a"][0] and gather_full(state) == state
