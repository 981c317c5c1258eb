"""Hides rows of patches first, in a wave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mim.core.fields import Count, NonNegative, Settings
from mim.core.rng import uniforms
from mim.masks.generators import MASKS, MaskRequest, RankedMask, rank_by


@dataclass(frozen=True)
class WaveSettings(Settings):
    """Settings of the generator wave."""

    period: Count = 2
    """Rows of a wave."""
    noise: NonNegative = 0.5
    """How much chance disturbs it; 0 is none."""


@MASKS.register("wave", WaveSettings)
class Wave(RankedMask):
    """The rows at the crest of a wave are hidden first."""

    settings: WaveSettings

    def ranks(self, request: MaskRequest) -> Tensor:
        rows, columns = request.grid
        row = torch.arange(rows * columns, device=request.keys.device) // columns
        height = torch.sin(row * (2 * torch.pi / self.settings.period)).double()
        drawn = uniforms(request.keys, rows * columns, stream=4)
        return rank_by(self.settings.noise * drawn - height, request.keys)
