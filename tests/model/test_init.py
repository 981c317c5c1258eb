"""Initial weights against the distributions that MAE's paper names."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import mim

SMALL = {
    "data.source": "digits",
    "data.image_size": 32,
    "data.channels": 3,
    "model.backbone_args": {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3},
    "model.decoder.transformer": {"width": 64, "depth": 2, "heads": 2},
}


def weights(**changes: object) -> dict[str, Tensor]:
    model = mim.build_model(mim.load_config(None, {**SMALL, **changes}))
    return {name: p.detach().double().flatten() for name, p in model.named_parameters()}


def is_uniform(values: Tensor, bound: float) -> bool:
    """Whether values are a likely draw from U(-bound, bound), and reach out to it."""
    found = stats.kstest(values.numpy(), stats.uniform(-bound, 2 * bound).cdf)
    return bool(found.pvalue > 1e-4 and 0.98 * bound < values.abs().max() <= bound)


def test_every_matrix_of_mae_is_xavier_uniform() -> None:
    drawn = weights(**{"model.init": "mae"})
    sides = {  # fan in and fan out; queries, keys and values count as one map, as MAE's code has it
        "backbone.patch_embed.proj.weight": (8 * 8 * 3, 96),
        "decoder.embed.weight": (96, 64),
        "decoder.head.weight": (64, 8 * 8 * 3),
    }
    for part, width in (("backbone", 96), ("decoder", 64)):
        for block in range(2):
            sides |= {
                f"{part}.blocks.{block}.attn.qkv.weight": (width, 3 * width),
                f"{part}.blocks.{block}.attn.proj.weight": (width, width),
                f"{part}.blocks.{block}.mlp.fc1.weight": (width, 4 * width),
                f"{part}.blocks.{block}.mlp.fc2.weight": (4 * width, width),
            }
    wrong = [n for n, (i, o) in sides.items() if not is_uniform(drawn[n], math.sqrt(6 / (i + o)))]
    assert not wrong
    rest = {name: values for name, values in drawn.items() if name not in sides}
    for name, values in rest.items():
        of_torch = name == "backbone.patch_embed.proj.bias"  # as in MAE
        if ("norm" in name or name.endswith("bias")) and not of_torch:
            assert torch.all(values == (1.0 if name.endswith("weight") else 0.0)), name
    for name in ("backbone.cls_token", "decoder.mask_token"):
        assert stats.kstest(rest[name].numpy(), stats.norm(0, 0.02).cdf).pvalue > 1e-4, name


def test_timm_s_own_weights_stay_the_default() -> None:
    drawn = weights()
    proj = drawn["backbone.blocks.0.attn.proj.weight"]
    assert not is_uniform(proj, math.sqrt(6 / 192))
    assert proj.std().item() == pytest.approx(0.02, rel=0.05)
    assert drawn["backbone.cls_token"].std() < 1e-5


def test_the_weights_follow_from_the_seed_alone() -> None:
    first, again = (weights(**{"model.init": "mae", "seed": 3}) for _ in range(2))
    other = weights(**{"model.init": "mae", "seed": 4})
    name = "backbone.patch_embed.proj.weight"
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first[name], other[name])
