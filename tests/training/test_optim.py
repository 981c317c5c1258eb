"""The schedule against hand-computed rates; which parameters decay."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mim
from mim.core.config import OptimConfig
from mim.core.errors import UserError
from mim.training.hooks import HOOKS
from mim.training.optim import build_optimizer, build_schedule
from mim.training.pretrain import pretrain
from mim.training.trainer import Hook, Trainer

TINY = {
    "data.source": "digits",
    "data.image_size": 8,
    "data.channels": 1,
    "model.backbone_args": {
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "reg_tokens": 2,
        "qk_norm": True,
        "init_values": 0.1,
    },
    "model.regime.name": "token",
    "model.decoder.transformer": {"width": 16, "depth": 1, "heads": 2},
}


def test_the_rate_at_hand_computed_steps() -> None:
    # 512 images: the peak is 1e-3 * 512 / 256 = 2e-3. 2 epochs of 2 steps warm up, 8 steps decay.
    config = OptimConfig(base_lr=1e-3, min_lr=1e-4, warmup_epochs=2)
    rate = build_schedule(config, batch_size=512, total=12, steps_per_epoch=2)
    assert rate.peak == pytest.approx(2e-3)
    rising = [rate(step) for step in range(4)]
    assert rising == pytest.approx([4e-4, 8e-4, 1.2e-3, 1.6e-3])  # fifths of the peak
    assert rate(4) == pytest.approx(2e-3)
    assert rate(8) == pytest.approx((2e-3 + 1e-4) / 2)  # half way down, cos = 0
    assert rate(6) == pytest.approx(1e-4 + 1.9e-3 * (1 + 2**-0.5) / 2)
    assert rate(12) == pytest.approx(1e-4)
    assert rate(50) == pytest.approx(1e-4)


def test_a_short_run_warms_up_for_half_of_its_steps() -> None:
    rate = build_schedule(OptimConfig(base_lr=1.0, warmup_epochs=40), 256, 10, 100)
    assert rate.warmup == 5
    assert max(range(10), key=rate) == 5
    assert rate(5) == pytest.approx(1.0)
    assert rate(9) > 0


def test_no_warm_up_starts_at_the_peak() -> None:
    rate = build_schedule(OptimConfig(base_lr=1.0, warmup_epochs=0), 256, 10, 100)
    assert rate(0) == pytest.approx(1.0)


def test_what_decays_and_what_does_not() -> None:
    model = mim.build_model(mim.load_config(None, TINY))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.3), model, 1e-3)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == {id(p) for p in trained.values()}, "each trained parameter in one group"
    free = {name for name, p in trained.items() if decay[id(p)] == 0.0}
    named = {name for name in trained if "token" in name.split(".")[-1] or "pos_embed" in name}
    assert {"backbone.cls_token", "backbone.reg_token", "backbone.pos_embed"} <= named
    assert any("mask_token" in name for name in named)
    vectors = {name for name, p in trained.items() if p.ndim == 1}
    assert {"backbone.norm.weight", "backbone.blocks.0.attn.qkv.bias"} <= vectors
    assert {"backbone.blocks.0.ls1.gamma", "backbone.blocks.0.attn.q_norm.weight"} <= vectors
    assert free == named | vectors
    decayed = {name for name in trained if name not in free}
    assert {"backbone.blocks.0.attn.qkv.weight", "backbone.patch_embed.proj.weight"} <= decayed
    assert all(decay[id(trained[name])] == 0.3 for name in decayed)
    optimizer = build_optimizer(OptimConfig(weight_decay=0.3, decay_tokens=True), model, 1e-3)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    tokens = {name for name in named if "token" in name}
    assert {name for name, p in trained.items() if decay[id(p)] == 0.3} == decayed | tokens
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    model = mim.build_model(mim.load_config(None, TINY))
    config = mim.load_config(None, {**TINY, "optim.scales": [{"names": "backbone.patch.*"}]})
    with pytest.raises(UserError, match=r"optim.scales.names: 'backbone.patch.\*' fits the name"):
        build_optimizer(config.optim, model, 1e-3)


class Recorder(Hook):
    """Keeps weights and gradients before each step, and what follows."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.teachers: list[dict[str, Tensor]] = []
        self.last: dict[str, Tensor] = {}

    @contextmanager
    def running(self, trainer: Trainer) -> Any:
        named = dict(trainer.task.model.named_parameters())

        def before(*_: object) -> None:
            weights = {name: p.detach().double().clone() for name, p in named.items()}
            grads = {n: p.grad.double().clone() for n, p in named.items() if p.grad is not None}
            self.steps.append((weights, grads))

        with_handle = trainer.optimizer.register_step_pre_hook(before)
        yield
        with_handle.remove()
        self.last = {name: p.detach().double() for name, p in named.items()}

    def after_step(self, trainer: Trainer, batch: Any, inputs: Any) -> None:
        teacher: Any = trainer.task.model.teacher
        self.teachers.append(copy.deepcopy(teacher.encoder.state_dict()))


RECORDER = Recorder()
HOOKS.register("recorder")(lambda config: RECORDER)


def test_three_steps_by_hand(tmp_path: Path) -> None:
    """AdamW with a rate, a decay and a teacher's decay that move, and with multipliers."""
    settings = {
        "output": str(tmp_path / "run"),
        "data.batch_size": 256,
        "data.workers": 0,
        "model.target.name": "ema_features",
        "model.teacher_decay": 0.5,
        "model.teacher_schedule": {"shape": "linear", "to": 1.0},
        "optim.base_lr": 0.01,
        "optim.warmup_epochs": 0,
        "optim.decay_tokens": True,
        "optim.weight_decay": 0.1,
        "optim.schedule": {"shape": "linear"},
        "optim.decay_schedule": {"shape": "cosine", "to": 0.4},
        "optim.scales": [
            {"names": "backbone.patch_embed.*", "lr": 0.2},
            {"names": "*.norm?.weight", "decay": 0.1},
        ],
        "train.max_steps": 3,
        "train.hooks": ["recorder"],
        "log.tensorboard": False,
    }
    pretrain(mim.load_config(None, {**TINY, **settings}))
    first = {name: torch.zeros_like(grad) for name, grad in RECORDER.steps[0][1].items()}
    second = copy.deepcopy(first)
    teacher = {
        name.removeprefix("backbone."): weight
        for name, weight in RECORDER.steps[0][0].items()
        if name.startswith("backbone.")
    }
    for step, (weights, grads) in enumerate(RECORDER.steps):
        rate = 0.01 * (1 - step / 3)
        decay = [0.1, 0.1 + 0.3 * 0.25, 0.1 + 0.3 * 0.75][step]  # cos(pi / 3) is a half
        after = RECORDER.steps[step + 1][0] if step < 2 else RECORDER.last
        for name, grad in grads.items():
            lr = rate * (0.2 if "patch_embed" in name else 1.0)
            share = 0.0 if grad.ndim == 1 or "pos_embed" in name else 1.0
            share = 0.1 if name.endswith(("norm1.weight", "norm2.weight")) else share
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            deviation = (second[name] / (1 - 0.95 ** (step + 1))).sqrt()
            expected = weights[name] * (1 - lr * decay * share) - lr * mean / (deviation + 1e-8)
            torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=2e-7, msg=name)
        kept = 0.5 + 0.5 * step / 3
        for name, weight in RECORDER.teachers[step].items():
            teacher[name] = kept * teacher[name] + (1 - kept) * after[f"backbone.{name}"]
            torch.testing.assert_close(weight.double(), teacher[name], rtol=1e-5, atol=1e-6)
