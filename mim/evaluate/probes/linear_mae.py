"""MAE's linear probe: batch norm without weights, LARS, augmentation, 90 epochs.

The protocol of He et al. 2022 (https://arxiv.org/abs/2111.06377, table 10), from timm's LARS. MAE
reads the class token by default (``pool: cls``), takes batches of 16,384 images and trains on all
of train; here the epoch is chosen on a split of train unless ``held_out`` is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.optim import Lars
from torch import Tensor, nn

from mim.core.fields import BelowOne, Count, NonNegative
from mim.evaluate.base import EVALUATIONS
from mim.evaluate.encoders import Encoder
from mim.evaluate.features import pool_tokens
from mim.evaluate.probes.frozen import FrozenProbe, FrozenSettings
from mim.evaluate.training import BatchSize
from mim.model.backbones import family_of
from mim.model.standardize import Standardize


@dataclass(frozen=True)
class LinearMaeSettings(FrozenSettings):
    """Settings of MAE's linear probe."""

    epochs: Count = 90
    """Passes over the training images."""
    batch_size: BatchSize = 256
    """Images a step, over all processes; MAE's is 16384."""
    warmup_epochs: NonNegative = 10.0
    """Epochs of linear warm-up, at most half of all."""
    crop_fit: Literal["redraw", "clamp"] = field(default="clamp", metadata={"before": "redraw"})
    """As data.crop_fit; MAE's cuts a random crop to its image."""
    momentum: BelowOne = 0.9
    """Of LARS."""


@EVALUATIONS.register("linear_mae", LinearMaeSettings)
class LinearMae(FrozenProbe):
    """A linear layer behind a batch norm, trained on augmented images by MAE's protocol."""

    settings: LinearMaeSettings

    def tokens(self, encoder: Encoder, images: Tensor) -> Tensor:
        """(B, D) pooled, or (B, 2 D) for ``pool: both``."""
        assert encoder.vit is not None
        tokens = family_of(encoder.vit).features(images)
        return pool_tokens(encoder.vit, tokens.float(), self.settings.pool)

    def head(self, encoder: Encoder, classes: int) -> nn.Module:
        assert encoder.vit is not None
        width = family_of(encoder.vit).width * (2 if self.settings.pool == "both" else 1)
        linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(Standardize(width), linear)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """LARS: the rate of a weight matrix follows its norm, that of a bias does not (MAE).

        timm's LARS adapts only where there is weight decay, unless told to always.
        """
        s = self.settings
        adapted: list[dict[str, Any]] = []
        for group in groups:
            weights = [p for p in group["params"] if p.ndim > 1]
            biases = [p for p in group["params"] if p.ndim == 1]
            adapted += [
                {**group, "params": weights, "always_adapt": True},
                {**group, "params": biases, "always_adapt": False, "weight_decay": 0.0},
            ]
        chosen: torch.optim.Optimizer = Lars(
            adapted, lr=1.0, momentum=s.momentum, weight_decay=s.weight_decay
        )
        return chosen
