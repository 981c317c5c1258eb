"""CAPI's encoder: a ViT of RMS norms without biases, whose patches and registers are turned.

Made of timm's Eva; arXiv:2502.08769. ``vit_large_patch14_capi`` is its name among timm's models;
``model.backbone_args`` makes it smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as checkpoint_filter_fn
from torch import Tensor, nn

from mim.model.backbones.family import Embedded, Grid, as_unit, register_family
from mim.model.backbones.rotary import RotaryViT, attend_few_keys

_HIGHEST, _LOWEST = 7.0, 7e-4
"""Cycles over the image of the first and, but for one step, the last pair of channels."""


def grid_places(grid: Grid, like: Tensor) -> Tensor:
    """(N, 2): row and column of each patch, from 0 to 1, at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows, columns = (torch.linspace(0, 1, n, dtype=dtype, device=like.device) for n in grid)
    return torch.cartesian_prod(rows, columns)


def border_places(count: int, places: Tensor, valid: Tensor | None = None) -> Tensor:
    """Place registers on the border of the box around patches, a quarter of them on each side.

    Args:
        count: P, divisible by 4.
        places: (B, T, 2).
        valid: (B, T) bool, which of them count; None counts all.

    Returns:
        (B, P, 2), clockwise from the upper left corner down the rows first; over the whole image
        where no patch counts.
    """
    side = count // 4
    steps = torch.arange(side, dtype=places.dtype, device=places.device) / side
    zero, one = torch.zeros_like(steps), torch.ones_like(steps)
    rows = torch.cat([steps, one, 1 - steps, zero])
    columns = torch.cat([zero, steps, one, 1 - steps])
    border = torch.stack([rows, columns], dim=-1)  # (P, 2)
    low, high = places, places
    if valid is not None:
        low = places.masked_fill(~valid[..., None], 1.0)
        high = places.masked_fill(~valid[..., None], 0.0)
    lowest, highest = low.amin(dim=1, keepdim=True), high.amax(dim=1, keepdim=True)
    if valid is not None:
        is_empty = ~valid.any(dim=1)[:, None, None]
        lowest, highest = lowest.masked_fill(is_empty, 0.0), highest.masked_fill(is_empty, 1.0)
    return lowest + border * (highest - lowest)


def axial_rotation(places: Tensor, width: int) -> Tensor:
    """Return sines and cosines for ``apply_rot_embed_cat(half=True)``.

    The first half of a head's channels turns by the row, the second by the column, each through
    the same frequencies twice; channel j is paired with j + width / 2, as in CAPI's code.

    Args:
        places: (..., 2), from 0 to 1.
        width: of a head; divisible by 4.

    Returns:
        (..., 2 * width).
    """
    steps = torch.linspace(0, -1, width // 4, dtype=places.dtype, device=places.device)
    cycles = _HIGHEST * (_HIGHEST / _LOWEST) ** steps
    angles = places[..., None] * (torch.cat([cycles, cycles]) * 2 * math.pi)  # (..., 2, width / 2)
    angles = angles.flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def residual(
    x: Tensor, branch: Callable[[Callable[[Tensor], Tensor]], Tensor], drop: float
) -> Tensor:
    """Add a branch, computed for a part of the images only where ``drop`` is above 0.

    A branch computes on ``of(values)`` of what has a batch in front. Its part is scaled, so that
    the mean over draws is the branch of all.
    """
    if not drop:
        return x + branch(lambda values: values)
    batch = len(x)
    kept = torch.randperm(batch, device=x.device)[: max(int(batch * (1 - drop)), 1)]
    added = branch(lambda values: values[kept] if len(values) == batch else values)
    return x.index_add(0, kept, added.to(x.dtype), alpha=batch / len(kept))


class CapiViT(Eva):
    """timm's Eva with CAPI's norms, initialisation and places."""

    def __init__(self, drop_path_rate: float = 0.0, **args: Any) -> None:
        fixed: dict[str, Any] = {
            "norm_layer": partial(nn.RMSNorm, eps=1e-5),
            "qkv_bias": False,
            "qkv_fused": False,
            "class_token": False,
            "use_abs_pos_emb": False,
            "use_rot_pos_emb": False,
            "rope_rotate_half": True,
            "use_fc_norm": False,
        }
        super().__init__(**{**args, **fixed})
        width: int = self.embed_dim
        if self.num_prefix_tokens % 4:
            raise ValueError("num_reg_tokens must be divisible by 4: a quarter lies on each side")
        blocks: list[Any] = list(self.blocks)
        self.head_width = int(blocks[0].attn.head_dim)
        if self.head_width % 4:
            raise ValueError("embed_dim / num_heads must be divisible by 4, for two axes")
        self.norm = nn.RMSNorm(width, eps=1e-5, elementwise_affine=False)
        for block in blocks:
            block.attn.num_prefix_tokens = 0  # registers have places too
            if drop_path_rate:
                block.drop_path1 = DropPath(drop_path_rate)
                block.drop_path2 = DropPath(drop_path_rate)
            for part in block.modules():
                if isinstance(part, nn.Linear):
                    part.register_parameter("bias", None)
                    nn.init.xavier_uniform_(part.weight)
        self.patch_embed.proj.reset_parameters()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.view(width, -1))
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Put registers in front of (B, N, D); also return the rotation of all, (L, R)."""
        places = grid_places(self.patch_embed.grid_size, x)
        if self.reg_token is not None:
            x = torch.cat([self.reg_token.expand(len(x), -1, -1), x], dim=1)
            first = border_places(self.num_prefix_tokens, places[None])[0]
            places = torch.cat([first, places])
        return self.pos_drop(x), axial_rotation(places, self.head_width)


default_cfgs = generate_default_cfgs(
    {
        "vit_large_patch14_capi.untrained": {
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "input_size": (3, 224, 224),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        }
    }
)


@register_model
def vit_large_patch14_capi(pretrained: bool = False, **args: Any) -> CapiViT:
    """Build CAPI's ViT-L/14."""
    sizes = {"patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    given = {**sizes, "num_reg_tokens": 16, **args}
    model: CapiViT = build_model_with_cfg(CapiViT, "vit_large_patch14_capi", pretrained, **given)
    return model


@register_family(CapiViT)
class CapiFamily(RotaryViT):
    """Registers lie on the border of the box around the visible patches, and are turned too."""

    prefix_on_border = True

    @property
    def splits(self) -> bool:
        return True

    def place(self, patches: Tensor) -> Embedded:
        return Embedded(*self.vit._pos_embed(patches))  # (L, R)

    def frame(self, embedded: Embedded, is_visible: Tensor) -> Embedded:
        if not self.num_prefix:
            return embedded
        assert embedded.rotation is not None
        places = grid_places(self.grid, embedded.tokens).expand(len(is_visible), -1, -1)
        first = axial_rotation(
            border_places(self.num_prefix, places, is_visible), self.vit.head_width
        )
        patches = embedded.rotation[self.num_prefix :].expand(len(first), -1, -1)
        return replace(embedded, rotation=torch.cat([first, patches], dim=1)[:, None])

    def take(self, embedded: Embedded, ids: Tensor, valid: Tensor | None = None) -> Embedded:
        taken, rotation = super(RotaryViT, self).take(embedded, ids, valid), embedded.rotation
        assert rotation is not None
        first = torch.arange(self.num_prefix, device=ids.device).expand(len(ids), -1)
        places = torch.cat([first, ids + self.num_prefix], dim=1)  # (B, L)
        if rotation.ndim == 2:
            return replace(taken, rotation=rotation[places][:, None])
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        return replace(taken, rotation=rotation[rows, :, places].transpose(1, 2))

    def step(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        return as_unit(self.vit.blocks[index], _step, self.vit.blocks[index], x, embedded)


def _step(block: Any, x: Tensor, embedded: Embedded) -> Tensor:
    drop = 0.0
    if block.training and isinstance(block.drop_path1, DropPath):
        drop = block.drop_path1.drop_prob
    rotation, bias, num_keys = embedded.rotation, embedded.bias, embedded.num_keys
    assert rotation is not None

    def read(of: Callable[[Tensor], Tensor]) -> Tensor:
        normed = block.norm1(of(x))
        turn = rotation if rotation.ndim == 2 else of(rotation)
        few = normed.shape[1] if num_keys is None else num_keys
        return attend_few_keys(block.attn, normed, turn, few, None if bias is None else of(bias))

    x = residual(x, read, drop)
    return residual(x, lambda of: block.mlp(block.norm2(of(x))), drop)
