"""Several processes on one machine (gloo) compute what one process computes."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mim.training import checkpoint

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
Launch = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def curves(run: Path) -> tuple[dict[int, float], dict[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return train, {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}


# Per-image ratios, accumulation, an average, images that do not divide among the processes.
CHANGES = {
    "data.batch_size": 50,
    "data.val_fraction": 0.101,
    "mask.ratio": [0.4, 0.8],
    "train.log_every": 1,
    "train.validate_every": 0.1,
    "train.checkpoint_every": 0.1,
    "train.ema_decay": 0.5,
    "optim.clip_grad": 1.0,
}


def assert_alike(one: Path, two: Path, falls: bool = True) -> None:
    train, val = curves(one)
    other_train, other_val = curves(two)
    assert list(train) == [1, 2, 3, 4, 5, 6] and val
    assert train[6] < train[1] or not falls
    assert other_train == pytest.approx(train, abs=1e-5)
    assert other_val == pytest.approx(val, abs=1e-5)


@pytest.mark.parametrize("regime", ["drop", "token"])
def test_two_processes_are_one(
    regime: str, tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch
) -> None:
    config = tiny({**CHANGES, "model.regime.name": regime})
    one, two = tmp_path / "one", tmp_path / "two"
    assert mim("pretrain", "--config", config, "--output", one).code == 0
    assert ranks(["pretrain", "--config", config, "--output", two]).wait() == [0, 0]
    assert_alike(one, two)
    result = checkpoint.read_result(two)
    assert result["environment"]["processes"] == 2
    state, other = (checkpoint.model_state(run) for run in (one, two))
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert other[name].numpy() == pytest.approx(value.numpy(), abs=1e-4), name
    # A run may go on with another number of processes: accumulation there and here.
    assert mim("pretrain", "--config", config, "--output", two, "--resume", "auto").code == 0


CLUSTERS = {
    "data.batch_size": 32,
    "model.backbone": "vit_large_patch14_capi",
    "model.backbone_args": {
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "num_reg_tokens": 4,
    },
    "model.decoder.name": "rotary",
    "model.decoder.rotary": {"width": 16, "depth": 1, "heads": 2, "share": 0.5},
    "model.target.name": "clusters",
    "model.target.clusters.clusters": 8,
    "train.checkpoint_every": 0.02,
    "train.log_every": 1,
    "optim.clip_grad": 1.0,
}


def test_clusters_are_balanced_over_processes_and_resume(
    tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch
) -> None:
    config = tiny(CLUSTERS)
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    assert mim("pretrain", "--config", config, "--output", one).code == 0
    assert ranks(["pretrain", "--config", config, "--output", two]).wait() == [0, 0]
    state, other = (checkpoint.model_state(run) for run in (one, two))
    assert "target.layer.weight" in state and "teacher.encoder.reg_token" in state
    for name, value in state.items():
        assert other[name].numpy() == pytest.approx(value.numpy(), abs=1e-4), name
    # Half of it, and the rest: every bit is that of the whole.
    assert mim("pretrain", "--config", config, "--output", again).code == 0
    for saved in checkpoint.checkpoints(again)[1:]:
        saved.unlink()
    (again / "result.json").unlink()
    call = ["pretrain", "--config", config, "--output", again, "--resume", "auto"]
    assert mim(*call).code == 0
    for name, value in checkpoint.model_state(again).items():
        assert torch.equal(value, state[name]), name
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert {"effective_rank", "cluster_perplexity", "loss_clustering"} <= rows[0].keys()


NOTE = """
import json
import mim.model.model

draw = mim.model.model.MaskedImageModel.draw_mask

def noted(self, images, keys, *args, **kwargs):
    mask = draw(self, images, keys, *args, **kwargs)
    if kwargs.get("epoch", -1) >= 0:
        columns = kwargs["sample_ids"], mask.is_masked.int(), images[:, 0, 3, 3]
        with open({note!r} + str(rank), "a") as file:
            rows = list(zip(*(column.tolist() for column in columns)))
            file.write(json.dumps(rows) + chr(10))
    return mask

mim.model.model.MaskedImageModel.draw_mask = noted
"""


def test_one_of_8_is_two_of_4_is_four_of_2(
    tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch
) -> None:
    """The same images in the same order, each with the same mask and pixels; the same losses."""
    config = tiny({**CHANGES, "data.batch_size": 8, "model.regime.name": "zero"})
    seen, runs = {}, {}
    for world in (1, 2, 4):
        runs[world] = tmp_path / f"of_{world}"
        note = tmp_path / f"note_{world}_"
        args = ["pretrain", "--config", config, "--output", runs[world]]
        assert ranks(args, world, all=NOTE.format(note=str(note))).wait() == [0] * world
        lines = [Path(f"{note}{rank}").read_text().splitlines() for rank in range(world)]
        steps = zip(*([json.loads(line) for line in of_rank] for of_rank in lines), strict=True)
        # Before its six steps a run counts its operations on some images.
        seen[world] = [list(itertools.chain(*shares)) for shares in steps][-6:]
        assert checkpoint.read_result(runs[world])["environment"]["processes"] == world
    assert [len(step) for step in seen[1]] == [8] * 6
    assert seen[1] == seen[2] == seen[4]
    for world in (2, 4):
        assert_alike(runs[1], runs[world], falls=False)  # six steps of 8 images


WEIGH = """
import torch
import mim.training.pretrain
from mim.data import WEIGHTS

if "half" not in WEIGHTS:
    @WEIGHTS.register("half")
    def half(source, indices, epoch):
        ids = source.sample_ids[indices]
        return (ids % 2) * (1 + ids % 3)

real = mim.training.pretrain.normalize

def broken(images, mean, std):
    values = real(images, mean, std)
    if mim.training.pretrain.of_step is not None:  # in training, images of weight 0 hold NaN
        values[mim.training.pretrain.of_step % 2 == 0] = float("nan")
    mim.training.pretrain.of_step = None
    return values

keys = mim.training.pretrain.image_keys

def noted(seed, epoch, ids, purpose):
    mim.training.pretrain.of_step = ids
    return keys(seed, epoch, ids, purpose=purpose)

mim.training.pretrain.of_step = None
mim.training.pretrain.normalize, mim.training.pretrain.image_keys = broken, noted
"""


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_images_of_several_sizes_on_two_processes(
    batching: str, tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch, own_sizes: dict[str, Any]
) -> None:
    """Each process pads or packs its own share, to another length than the whole batch has."""
    changes = {"data.batching": batching, "model.regime.name": "drop", "train.validate_every": 0.5}
    config = tiny({**own_sizes, **changes})
    one, two = tmp_path / "one", tmp_path / "two"
    assert mim("pretrain", "--config", config, "--output", one).code == 0
    assert ranks(["pretrain", "--config", config, "--output", two]).wait() == [0, 0]
    assert_alike(one, two)


def test_weights_mean_the_same_on_two_processes(
    tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch
) -> None:
    """Half the images are left out, unequally many a process; in the second run they are NaN."""
    (tmp_path / "weigh.py").write_text(WEIGH.partition("real =")[0])
    one, two = tmp_path / "one", tmp_path / "two"
    plugin = f"[{tmp_path / 'weigh.py'}]"
    config = tiny({**CHANGES, "data.weights": "half", "train.accumulate": 2})
    args = ["pretrain", "--config", config, "--output"]
    assert mim(*args, one, "--plugins", plugin).code == 0
    assert ranks([*args, two], all=WEIGH).wait() == [0, 0]
    assert_alike(one, two)


def test_all_stop_at_the_same_step_and_go_on_alone(
    tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch, stop: str
) -> None:
    """The signal reaches one process only, in its third step."""
    config = tiny(CHANGES)
    one, two = tmp_path / "one", tmp_path / "two"
    assert mim("pretrain", "--config", config, "--output", one).code == 0
    codes = ranks(["pretrain", "--config", config, "--output", two], of={1: stop}).wait()
    assert codes == [143, 143]
    assert checkpoint.checkpoints(two)[-1].name == "step_00000003.pt"
    assert not (two / "result.json").exists()
    assert mim("pretrain", "--config", config, "--output", two, "--resume", "auto").code == 0
    assert_alike(one, two)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, tiny: Tiny, ranks: Launch) -> None:
    args = ["pretrain", "--config", tiny({"data.batch_size": 33}), "--output", tmp_path / "run"]
    assert ranks(args).wait() == [2, 2]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_torchrun(tmp_path: Path, mim: Mim, tiny: Tiny, ranks: Launch) -> None:
    config = tiny({**CHANGES, "train.accumulate": 2, "data.workers": 1})
    one, two = tmp_path / "one", tmp_path / "two"
    assert mim("pretrain", "--config", config, "--output", one).code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port()), "-m", "mim"]
    args = ["pretrain", "--config", str(config), "--output", str(two)]
    env = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # a machine without a GPU, of which no launcher says so
    done = subprocess.run([*launcher, *args], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said and len(set(said)) == len(said), "one process speaks"
    assert "on 2 processes (cpu)" in said[0]
    assert_alike(one, two)
