"""Predicts the gray values of a patch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mim.core.fields import Positive, Settings
from mim.core.patches import patchify
from mim.model.targets import TARGETS, Target, TargetContext


@dataclass(frozen=True)
class GraySettings(Settings):
    """Settings of the target gray."""

    contrast: Positive = 1.0
    """Factor of the gray values, and the weight of patches by how much they vary."""


@TARGETS.register("gray", GraySettings)
class Gray(Target):
    """The mean over the channels of each pixel; patches that vary count more."""

    def __init__(self, settings: GraySettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        self.dim = context.patch_size[0] * context.patch_size[1]

    @torch.no_grad()
    def forward(self, images: Tensor, teacher: Any = None) -> Tensor:
        gray = images.mean(1, keepdim=True) * self.settings.contrast
        return patchify(gray, self.context.patch_size)

    def distance(self, prediction: Tensor, target: Tensor, **seen: Any) -> Tensor:
        weight = 1 + self.settings.contrast * target.std(-1)
        return super().distance(prediction, target, **seen) * weight
