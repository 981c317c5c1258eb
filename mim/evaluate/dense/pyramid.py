"""Makes feature maps at several scales from a plain ViT, which has one scale.

The simple feature pyramid of ViTDet (Li et al. 2022, https://arxiv.org/abs/2203.16527): each scale
is the ViT's map, enlarged by transposed convolutions or pooled. ViTDet makes all scales from the
last block; BEiT's and MAE's segmentation makes each from another block.

Shapes: B images, D width of the encoder, h x w grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

SCALES = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Sizes of a map that can be made, over that of the grid of patches."""


def quarter_layers(depth: int) -> list[int]:
    """Blocks, from 0, that end at 1/4, 1/2, 3/4 and all of the depth."""
    return [max(round(depth * part / 4), 1) - 1 for part in (1, 2, 3, 4)]


def layer_maps(vit: Any, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """The patch tokens after some blocks, under the final norm, as maps.

    Args:
        vit: the encoder.
        images: (B, C, H, W), normalised.
        layers: blocks from 0; one may stand there twice.

    Returns:
        For each layer (B, D, h, w).
    """
    wanted = sorted(set(layers))
    maps: Any = vit.forward_intermediates(
        images, indices=wanted, norm=True, intermediates_only=True
    )
    return [maps[wanted.index(layer)] for layer in layers]


def _resized(width: int, scale: float) -> tuple[nn.Module, int]:
    """What brings a map to a scale, and the width it leaves."""
    if scale == 4:
        first = nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
        second = nn.ConvTranspose2d(width // 2, width // 4, kernel_size=2, stride=2)
        return nn.Sequential(first, LayerNorm2d(width // 2), nn.GELU(), second), width // 4
    if scale == 2:
        return nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2), width // 2
    if scale == 1:
        return nn.Identity(), width
    return nn.MaxPool2d(round(1 / scale), ceil_mode=True), width


class Pyramid(nn.Module):
    """Maps (B, D, h, w), one for each scale -> maps (B, ``out``, h * scale, w * scale).

    Args:
        width: D.
        out: channels of all results.
        scales: of :data:`SCALES`.
    """

    def __init__(self, width: int, out: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for scale in scales:
            resize, left = _resized(width, scale)
            self.levels.append(
                nn.Sequential(
                    resize,
                    nn.Conv2d(left, out, kernel_size=1, bias=False),
                    LayerNorm2d(out),
                    nn.Conv2d(out, out, kernel_size=3, padding=1, bias=False),
                    LayerNorm2d(out),
                )
            )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]
