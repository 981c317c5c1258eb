"""Small squares, filled up or cut to an exact number (data2vec 2.0)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mim.core.fields import BelowOne, Count, Settings
from mim.core.rng import uniforms
from mim.masks.generators import MASKS, MaskRequest, RankedMask, rank_by

_CENTRES = 4  # the keys' stream for them


@dataclass(frozen=True)
class SquaresSettings(Settings):
    """Settings of the generator squares: many small squares of patches."""

    side: Count = 3
    """Side of a square in patches."""
    mark: Literal["visible", "hidden"] = "visible"
    """What the squares show: visible (the rest is hidden: data2vec 2.0's inverse block masks) or
    hidden."""
    extra: BelowOne = 0.07
    """Share of the grid that is marked beyond what is needed, since squares overlap."""


@MASKS.register("squares", SquaresSettings)
class SquaresMask(RankedMask):
    """Squares around random patches, in an exact number of patches (data2vec 2.0, 2212.07525).

    To mark a share p of N patches, ``N (p + extra) / side ** 2`` centres, rounded down, are drawn
    with replacement, and each marks the square around it; what lies beyond the border marks the
    patch of the border instead. Then random patches are added, or random ones of the squares taken
    away, until the count is exact. data2vec 2.0 rounds the visible patches down
    (``mask.rounding: floor_visible``).
    """

    settings: SquaresSettings

    def ranks(self, request: MaskRequest) -> Tensor:
        settings, keys = self.settings, request.keys
        rows, cols = request.grid
        shows = settings.mark == "visible"
        share = 1 - request.ratios if shows else request.ratios  # (B,)
        number = request.num_patches * ((share + settings.extra) / settings.side**2)
        most = int(request.num_patches * (1 + settings.extra) / settings.side**2)
        centres = (uniforms(keys, most, _CENTRES) * request.num_patches).long()  # (B, C)
        drawn = torch.arange(most, device=keys.device) < number.long()[:, None]  # (B, C)
        step = torch.arange(settings.side, device=keys.device) - settings.side // 2  # (S,)
        down = ((centres // cols)[..., None] + step).clamp(0, rows - 1)  # (B, C, S)
        right = ((centres % cols)[..., None] + step).clamp(0, cols - 1)
        marks = (down[..., :, None] * cols + right[..., None, :]).flatten(1)  # (B, C * S * S)
        times = drawn.repeat_interleave(settings.side**2, dim=1).long()
        marked = torch.zeros(len(keys), request.num_patches, dtype=torch.int64, device=keys.device)
        marked = marked.scatter_add(1, marks, times) > 0
        return rank_by((marked if shows else ~marked).long(), keys)
