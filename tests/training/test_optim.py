"""The schedule against hand-computed rates; which parameters decay."""

from __future__ import annotations

import pytest

import mim
from mim.core.config import OptimConfig
from mim.training.optim import build_optimizer, build_schedule

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
