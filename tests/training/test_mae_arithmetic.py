"""The recipe of MAE beside its arithmetic, written here from the paper and worked in float64.

The model's formula, AdamW, which weights decay, the schedule and the count of visible patches are
all written anew; the recipe's side is the code that trains.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mim.core.recipes import evaluations_of, recipe_file
from mim.core.rng import image_keys
from mim.core.settings import read_mapping
from mim.evaluate import build_evaluation
from mim.model import build_model
from mim.training.optim import build_optimizer, build_schedule
from mim.training.settings import load_config

HEADS, DECODER_HEADS, PATCH, STEPS = 3, 2, 8, 3
SIZES = {
    "data.source": "photos",
    "data.image_size": 40,  # 25 patches
    "data.batch_size": 4,
    "data.workers": 0,
    "mask.ratio": 0.65,  # shows 8.75 of 25, which MAE rounds down to 8
    "model.backbone_args": {"patch_size": PATCH, "embed_dim": 48, "depth": 2, "num_heads": HEADS},
    "model.decoder.transformer.width": 32,
    "model.decoder.transformer.depth": 2,
    "model.decoder.transformer.heads": DECODER_HEADS,
}

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def block(x: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    width = x.shape[-1]
    parts = linear(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").split(width, dim=-1)
    q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
    attended = ((q @ k.transpose(-2, -1)) / math.sqrt(width // heads)).softmax(-1) @ v
    x = x + linear(attended.transpose(1, 2).flatten(2), w, f"{name}.attn.proj")
    inner = linear(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return x + linear(inner, w, f"{name}.mlp.fc2")


def patches_of(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, p * p * C), row, column, channel."""
    tiles = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    return tiles.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)


def mae_loss(w: Weights, images: Tensor, is_masked: Tensor) -> Tensor:
    """One image at a time, since each has its own visible patches."""
    losses = []
    for image, hidden in zip(images, is_masked, strict=True):
        patches = patches_of(image[None])
        kernel = w["backbone.patch_embed.proj.weight"]  # (D, C, p, p)
        tokens = patches @ kernel.permute(0, 2, 3, 1).flatten(1).T
        tokens = tokens + w["backbone.patch_embed.proj.bias"] + w["backbone.pos_embed"][:, 1:]
        cls = w["backbone.cls_token"] + w["backbone.pos_embed"][:, :1]
        x = torch.cat([cls, tokens[:, ~hidden]], dim=1)
        for index in range(2):
            x = block(x, w, f"backbone.blocks.{index}", HEADS)
        x = linear(layer_norm(x, w, "backbone.norm"), w, "decoder.embed")
        full = w["decoder.mask_token"].expand(1, len(hidden), -1).clone()
        full[:, ~hidden] = x[:, 1:]
        x = torch.cat([x[:, :1], full], dim=1) + w["decoder.pos_embed"]
        for index in range(2):
            x = block(x, w, f"decoder.blocks.{index}", DECODER_HEADS)
        predicted = linear(layer_norm(x, w, "decoder.norm"), w, "decoder.head")[:, 1:]
        deviation = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        target = (patches - patches.mean(-1, keepdim=True)) / deviation
        losses.append((predicted - target)[:, hidden].square().mean())
    return torch.stack(losses).mean()


def rate(step: int, per_epoch: int) -> float:
    """MAE's, from the fraction of an epoch: 1.5e-4 for a batch of 256, warm-up of 40 of 800."""
    epoch, peak = step / per_epoch, 1.5e-4 * 4096 / 256
    if epoch < 40:
        return peak * epoch / 40
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 760))


def test_three_steps_are_maes_arithmetic() -> None:
    config = load_config(recipe_file("mae-vit-b"), SIZES)
    model = build_model(config).double()
    per_epoch = 1  # so that 3 steps are far enough in the warm-up to move the weights
    schedule = build_schedule(config.optim, 4096, 800 * per_epoch, per_epoch)
    optimizer = build_optimizer(config.optim, model, schedule(0))
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"backbone.pos_embed", "decoder.pos_embed"}
    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in w.items()}
    second = {name: torch.zeros_like(value) for name, value in w.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        images = torch.randn(4, 3, 40, 40, generator=generator, dtype=torch.float64)
        keys = image_keys(0, step, torch.arange(4), purpose="mask")
        mask = model.draw_mask(images, keys, epoch=step, sample_ids=torch.arange(4))
        assert (~mask.is_masked).sum(1).tolist() == [8] * 4
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        loss = model(images, mask).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        expected = mae_loss(w, images, mask.is_masked)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        gradients = torch.autograd.grad(expected, list(w.values()), allow_unused=True)
        for (name, value), gradient in zip(w.items(), gradients, strict=True):
            if name in fixed or gradient is None:
                continue
            lr, decay = rate(step, per_epoch), 0.05 if value.ndim > 1 else 0.0
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            square = second[name] / (1 - 0.95 ** (step + 1))
            with torch.no_grad():
                value.mul_(1 - lr * decay).sub_(lr * mean / (square.sqrt() + 1e-8))
    begun = build_model(config).double().state_dict()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, w[name], rtol=0, atol=1e-12), name
        still = torch.equal(parameter, begun[name])
        assert still == (name in fixed), name  # each moved, however slow the warm-up is


FINETUNE: dict[str, dict[str, Any]] = {
    # model: epochs, base rate, layer decay, drop path (the authors' FINETUNE.md)
    "mae-vit-b": {"epochs": 100, "base_lr": 5e-4, "layer_decay": 0.65, "drop_path": 0.1},
    "mae-vit-l": {"epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.2},
    "mae-vit-h": {"epochs": 50, "base_lr": 1e-3, "layer_decay": 0.75, "drop_path": 0.3},
}
SHARED = {
    **{"batch_size": 1024, "warmup_epochs": 5, "min_lr": 1e-6, "weight_decay": 0.05},
    **{"betas": (0.9, 0.999), "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "erasing": 0.25},
    **{"rand_augment": "rand-m9-mstd0.5-inc1", "pool": "mean", "clip_grad": 0.0, "ema": 0.0},
    **{"held_out": 0.0, "fraction": 1.0, "crop_scale": (0.08, 1.0)},
}


@pytest.mark.parametrize("name", list(FINETUNE))
def test_fine_tuning_is_maes_line_by_line(name: str) -> None:
    given = evaluations_of(read_mapping(recipe_file(name)))
    settings: Any = build_evaluation("finetune", given["finetune"]).settings
    for key, value in {**SHARED, **FINETUNE[name]}.items():
        assert getattr(settings, key) == value, key
    probe: Any = build_evaluation("linear_mae", given["linear_mae"]).settings
    assert (probe.epochs, probe.batch_size, probe.base_lr) == (
        90 if name == "mae-vit-b" else 50,
        16384,
        (0.1,),
    )
    assert (probe.weight_decay, probe.warmup_epochs, probe.min_lr) == (0.0, 10, 0.0)
    assert (probe.pool, probe.crop_fit, probe.held_out) == ("cls", "clamp", 0.0)
    config = load_config(recipe_file(name))
    assert config.data.eval_share == 0.875 and config.data.size == (224, 224)
