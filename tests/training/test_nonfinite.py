"""Steps that are not finite: what they leave alone, what is told, and losses that leap."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mim as package
from mim.core.rng import image_keys
from mim.data import open_source, train_loader
from mim.model import MaskedImageModel
from mim.model.teacher import ema_update
from mim.training import checkpoint, trainer
from mim.training.debug import debug_batch
from mim.training.nonfinite import LEAST, WINDOW, Guard, Spikes, strict

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
Spoil = Callable[[Mapping[int, str]], None]


class Gone(BaseException):
    """Ends a run where it stands."""


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """``spoil({3: "nan"})``: what happens in a step, counted from 0; again for a second run."""
    real_seed, real_forward = trainer.seed_of, MaskedImageModel.forward
    now = -1

    def set_steps(steps: Mapping[int, str]) -> None:
        def seed_of(seed: int, *parts: int | str) -> int:
            nonlocal now
            if parts[0] == "step":
                now = int(parts[1])
                if steps.get(now) == "gone":
                    raise Gone
            return real_seed(seed, *parts)

        def forward(self: MaskedImageModel, *args: Any) -> Any:
            output = real_forward(self, *args)
            what = steps.get(now) if self.training else None
            if what == "gradient":
                output.loss.register_hook(lambda grad: grad * math.nan)
            elif what == "inf":  # with a gradient that is finite
                return dataclasses.replace(
                    output, loss=output.loss + math.inf, reconstruction=output.loss + math.inf
                )
            elif what is not None:
                factor = float(what)
                loss, seen = output.loss * factor, output.reconstruction * factor
                return dataclasses.replace(output, loss=loss, reconstruction=seen)
            return output

        monkeypatch.setattr(trainer, "seed_of", seed_of)
        monkeypatch.setattr(MaskedImageModel, "forward", forward)

    return set_steps


EVERYTHING = {
    "mask.name": "learned",
    "model.target.name": "ema_features",
    "model.teacher_decay": 0.5,
    "train.ema_decay": 0.5,
    "train.accumulate": 2,
    "train.on_nonfinite": "skip",
    "train.max_steps": 8,
    "train.checkpoint_every": 0.04,  # every step
    "train.keep_checkpoints": 20,
}


def state_after(run: Path, steps: int) -> dict[str, Any]:
    return checkpoint.read_checkpoint(run / "checkpoints" / f"step_{steps:08d}.pt")


def learned(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors that training moves, by name."""
    found = {f"model.{k}": v for k, v in state["model"].items()}
    found |= {f"ema.{k}": v for k, v in state["ema"].items()}
    for number, values in state["optimizer"]["state"].items():
        found |= {f"optimizer.{number}.{k}": v for k, v in values.items()}
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def test_a_skipped_step_leaves_everything_as_it_was(
    tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil
) -> None:
    spoil({2: "nan", 3: "inf", 5: "gradient"})
    run = tmp_path / "run"
    outcome = mim("pretrain", "--config", tiny(EVERYTHING), "--output", run)
    assert outcome.code == 0
    states = {step: learned(state_after(run, step)) for step in range(1, 9)}
    for step, skipped in {2: False, 3: True, 4: True, 5: False, 6: True, 7: False}.items():
        before, after = states[step - 1], states[step]
        assert before.keys() == after.keys()
        same = {name for name, value in before.items() if torch.equal(value, after[name])}
        if skipped:
            assert same == set(before)
            continue
        moved = set(before) - same
        for part in ("model.backbone.", "model.teacher.", "model.mask_network.", "ema.", "opt"):
            assert any(name.startswith(part) for name in moved), (step, part)
    rows = [row for row in lines(run) if "lr" in row]
    assert [row.get("skipped", 0) for row in rows] == [0, 2, 1, 0]
    assert [("loss" in row) for row in rows] == [True, False, True, True]
    said = [line for line in outcome.err.splitlines() if "skipped" in line]
    assert [line.split(":")[0] for line in said] == ["step 3", "step 4", "step 6"]
    assert "loss is nan" in said[0] and "loss is inf" in said[1]
    assert "the gradient is not finite" in said[2] and "5 stop the run" in said[2]
    assert checkpoint.read_result(run)["skipped_steps"] == 3
    details = json.loads((run / "nonfinite.json").read_text())
    assert details["step"] == 6 and details["weights"] == "nonfinite.pt"
    config = package.load_config(tiny(EVERYTHING))
    source = open_source(config.data, "train")
    (batch,) = train_loader(source, config.data, 0, start_step=5, total_steps=6)
    assert details["sample_ids"] == batch.sample_ids.tolist()
    for purpose in ("mask", "augment"):
        keys = image_keys(0, 0, batch.sample_ids, purpose=purpose)
        assert details[f"{purpose}_keys"] == keys.tolist()
    kept = torch.load(run / "nonfinite.pt", weights_only=True)["model"]
    now = state_after(run, 5)["model"]
    assert all(torch.equal(kept[name], now[name]) for name in now)


def test_the_mean_of_a_line_leaves_skipped_steps_out(
    tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil
) -> None:
    changes = {"train.on_nonfinite": "skip", "train.max_steps": 4}
    spoil({3: "nan"})
    each, pairs = tmp_path / "each", tmp_path / "pairs"
    one = tiny(changes | {"train.log_every": 1}, "one")
    assert mim("pretrain", "--config", one, "--output", each).code == 0
    assert mim("pretrain", "--config", tiny(changes, "two"), "--output", pairs).code == 0
    single = {row["step"]: row.get("loss") for row in lines(each) if "lr" in row}
    assert single[4] is None
    rows = {row["step"]: row.get("loss") for row in lines(pairs) if "lr" in row}
    assert rows[2] == pytest.approx((single[1] + single[2]) / 2)
    assert rows[4] == pytest.approx(single[3])


def test_too_many_in_a_row_stop_the_run(tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil) -> None:
    changes = EVERYTHING | {"train.max_nonfinite": 2}
    run = tmp_path / "run"
    spoil({1: "nan", 3: "nan", 4: "gradient"})
    config = tiny(changes)
    outcome = mim("pretrain", "--config", config, "--output", run)
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if "error" in line]
    assert "the gradient is not finite at step 5 (2 such steps in a row" in line
    assert "train.max_nonfinite" in line and f"mim debug batch {run}" in line
    spoil({})
    outcome = mim("pretrain", "--config", config, "--output", run, "--resume", "auto")
    assert outcome.code == 0
    assert [row["step"] for row in lines(run) if "lr" in row] == [2, 4, 6, 8]


def test_skipping_is_exact_across_a_resume(
    tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil
) -> None:
    bad = {2: "nan", 3: "nan", 5: "inf"}
    config = tiny(EVERYTHING | {"train.log_every": 3})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train = ("pretrain", "--config", config, "--resume", "auto", "--output")
    spoil(bad)
    assert mim(*train, whole).code == 0
    for gone in (3, 4, 6):  # after a skipped step, at the row's end, before the last line
        spoil(bad | {gone: "gone"})
        with pytest.raises(Gone):
            mim(*train, cut)
    spoil(bad)
    assert mim(*train, cut).code == 0
    assert lines(whole) == lines(cut)
    for step in range(1, 9):
        one, other = learned(state_after(whole, step)), learned(state_after(cut, step))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert state_after(whole, step)["watch"] == state_after(cut, step)["watch"]


def test_the_row_is_counted_across_a_resume(
    tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil
) -> None:
    config, run = tiny(EVERYTHING | {"train.max_nonfinite": 3}), tmp_path / "run"
    train = ("pretrain", "--config", config, "--resume", "auto", "--output", run)
    spoil({3: "nan", 4: "nan", 5: "gone"})
    with pytest.raises(Gone):
        mim(*train)
    spoil({5: "nan"})
    outcome = mim(*train)
    assert outcome.code == 1 and "step 6 (3 such steps in a row" in outcome.line


def test_the_first_stops_and_leaves_the_weights_before_it(
    tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil
) -> None:
    config, run = tiny(EVERYTHING | {"train.on_nonfinite": "stop"}), tmp_path / "run"
    spoil({4: "gradient"})
    outcome = mim("pretrain", "--config", config, "--output", run)
    assert outcome.code == 1
    assert "the gradient is not finite at step 5, learning rate" in outcome.line
    kept = torch.load(run / "nonfinite.pt", weights_only=True)
    before = state_after(run, 4)["model"]
    assert kept["step"] == 4 and all(torch.equal(kept["model"][n], before[n]) for n in before)
    # What stopped it is no part of what is computed: the same run goes on, and skips.
    free = ("--train.on_nonfinite", "skip", "--resume", "auto")
    assert mim("pretrain", "--config", config, "--output", run, *free).code == 0


class Reads(TorchDispatchMode):
    """Counts what waits for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def give_gradient(model: nn.Module, value: float, factor: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, factor)
    next(model.parameters()).grad[0, 0] = value * factor


def test_after_the_last_of_a_row_nothing_moves_until_the_host_reads() -> None:
    """On a GPU the host hears of it steps later, and must find the weights of that step."""
    model, optimizer = small()
    guard = Guard(2, 0, torch.device("cpu"))
    flags, seen = [], []
    for value in (1.0, math.inf, 1.0, math.nan, -math.inf, 1.0, 1.0):
        give_gradient(model, value)
        flags.append(float(guard.step(optimizer)))
        seen.append(model.weight.detach().clone())
    assert flags == [0, 1, 0, 1, 1, 1, 1]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [False, True, False, False, False, False]
    model, optimizer = small()
    guard = Guard(2, 1, torch.device("cpu"))  # one just before, in a run that goes on
    give_gradient(model, math.nan)
    assert float(guard.step(optimizer)) == 1
    give_gradient(model, 1.0)
    assert float(guard.step(optimizer)) == 1


def test_no_step_waits_for_the_device() -> None:
    model, optimizer = small()
    average = nn.Linear(3, 2)
    guard = Guard(3, 0, torch.device("cpu"))
    with Reads() as reads:
        for value in (1.0, math.nan):
            give_gradient(model, value)
            flag = guard.step(optimizer)
            ema_update(average, model, 0.1 * (flag == 0).float())
        assert reads.count == 0
        float(flag)
        assert reads.count == 1


def test_fp16_scales_and_an_overflow_lowers_the_scale_first() -> None:
    """The scaler of torch, on the CPU; training in fp16 itself needs a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model, optimizer = small()
    plain, reference = small()
    guard, other = (Guard(1, 0, torch.device("cpu")) for _ in range(2))
    found = []
    for value in (math.inf, math.nan, 2.0, math.inf, 2.0):
        before = model.weight.detach().clone()
        scale = scaler.get_scale()
        give_gradient(model, value, factor=scale)
        flag = float(guard.step(optimizer, scaler))
        found.append((scale, flag))
        if flag:
            assert torch.equal(model.weight, before)
        else:
            give_gradient(plain, value)
            other.step(reference)
    assert found == [(4.0, 0.5), (2.0, 0.5), (1.0, 0.0), (1.0, 1.0), (0.5, 0.0)]
    assert torch.allclose(model.weight, plain.weight, rtol=1e-6)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_infinite_loss_tells_its_gradient(value: float) -> None:
    x = torch.ones(2, requires_grad=True)
    loss = x.sum() + value
    (loss * strict(loss)).backward()
    assert x.grad is not None and not x.grad.isfinite().any()
    y = torch.tensor([0.3, 0.7], requires_grad=True)
    loss = (y * torch.tensor([1.1, 1.3])).sum()
    (loss * strict(loss)).backward()
    assert torch.equal(y.grad, torch.tensor([1.1, 1.3])), "a finite one changes no bit"


def test_a_follower_follows() -> None:
    average, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.constant_(model.weight, 3.0)
    model.num_batches_tracked += 5
    ema_update(average, model, torch.tensor(0.0))
    assert torch.equal(average.weight, torch.ones(2))
    ema_update(average, model, torch.tensor(0.25))
    assert torch.equal(average.weight, torch.full((2,), 1.5))
    assert average.num_batches_tracked == 5


def test_a_spike_by_hand() -> None:
    spikes = Spikes(10.0)
    calm = [1.0 + 0.01 * (i % 5) for i in range(LEAST)]  # median 1.02, median distance 0.01
    assert [spikes.look(x) for x in calm] == [None] * LEAST
    assert statistics.median(calm) == 1.02
    edge = 1.02 + 10 * 1.4826 * 0.01
    assert spikes.look(edge - 1e-4) is None
    said = spikes.look(1.02 + 20 * 1.4826 * 0.01)
    assert said == (
        "loss 1.317 is 20 robust deviations above 1.02, the median of the last 31 steps"
    )
    assert spikes.look(0.0) is None, "a fall is none"
    assert len(Spikes(1.0, range(500)).window) == WINDOW
    fresh = Spikes(10.0, calm[:-1])
    assert fresh.look(100.0) is None, "too few losses"
    off = Spikes(0.0, calm)
    assert off.look(1e9) is None
    flat = Spikes(10.0, [1.0] * LEAST)
    assert flat.look(1.1) is None, "without any spread there is no measure"


def test_a_spike_is_told_once_and_counted(
    tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil
) -> None:
    spoil({step: "50.0" for step in (36, 37)})
    changes = {"train.epochs": 2, "train.max_steps": 40, "train.log_every": 10}
    run = tmp_path / "run"
    outcome = mim("pretrain", "--config", tiny(changes), "--output", run)
    assert outcome.code == 0
    said = [line for line in outcome.err.splitlines() if "robust deviations" in line]
    assert len(said) == 1 and said[0].startswith("step 37: loss ")
    rows = [row for row in lines(run) if "lr" in row]
    assert [row.get("spikes", 0) for row in rows] == [0, 0, 0, 2]


def test_a_checkpoint_of_an_older_version_goes_on(
    tmp_path: Path, mim: Mim, tiny: Tiny, spoil: Spoil
) -> None:
    config, run = tiny({"train.checkpoint_every": 0.04, "train.log_every": 3}), tmp_path / "run"
    whole = tmp_path / "whole"
    assert mim("pretrain", "--config", config, "--output", whole).code == 0
    spoil({5: "gone"})
    with pytest.raises(Gone):
        mim("pretrain", "--config", config, "--output", run)
    state = state_after(run, 5)
    counters, hooks = state["state"], state["hooks"]
    assert len(counters["rows"]) == 2
    old = {name: state[name] for name in ("fingerprint", "model", "optimizer", "ema", "scaler")}
    old |= {name: counters[name] for name in ("elapsed", "train_seconds", "train_loss")}
    old |= {"format": 1, "val_loss": hooks["held_out"]["loss"], "online": {}}
    old["pending"] = torch.tensor([row["loss"] for row in counters["rows"]])
    checkpoint.save_checkpoint(run, old, 5, keep=2)
    spoil({})
    assert mim("pretrain", "--config", config, "--output", run, "--resume", "auto").code == 0
    assert lines(run) == lines(whole)


INFINITE = """
import dataclasses
import mim.training.trainer
from mim.model import MaskedImageModel

real_seed, real_forward, now = mim.training.trainer.seed_of, MaskedImageModel.forward, -1

def seed_of(seed, *parts):
    global now
    now = parts[1] if parts[0] == "step" else now
    return real_seed(seed, *parts)

def forward(self, *args):
    output = real_forward(self, *args)
    if self.training and now == 2:  # its gradient is finite
        bad = output.loss + float("inf")
        return dataclasses.replace(output, loss=bad, reconstruction=bad.detach())
    return output

mim.training.trainer.seed_of = seed_of
MaskedImageModel.forward = forward
"""


def test_all_processes_skip_what_one_has_met(
    tmp_path: Path, tiny: Tiny, ranks: Callable[..., Any]
) -> None:
    changes = {
        "train.on_nonfinite": "skip",
        "train.checkpoint_every": 0.04,
        "train.keep_checkpoints": 9,
        "train.ema_decay": 0.5,
        "train.max_steps": 4,
    }
    run = tmp_path / "run"
    found = ranks(("pretrain", "--config", tiny(changes), "--output", run), of={1: INFINITE})
    assert found.wait() == [0, 0], found.texts()
    states = [learned(state_after(run, step)) for step in range(1, 5)]
    same = [
        all(torch.equal(before[name], after[name]) for name in before)
        for before, after in itertools.pairwise(states)
    ]
    assert same == [False, True, False]
    said = "".join(found.texts())
    assert said.count("step 3: loss is inf; the step is skipped") == 1, "the first process tells"
    details = json.loads((run / "nonfinite.json").read_text())
    assert details["processes"] == 2 and len(details["sample_ids"]) == 64
    assert debug_batch(run, device="cpu").exact
