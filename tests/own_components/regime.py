"""Masked patches are replaced by the mean of the visible embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim.core.fields import Settings, Share
from mim.masks import PatchMask
from mim.model.backbones import Embedded, family_of
from mim.model.regimes import REGIMES, Regime
from mim.model.terms import Forward


@dataclass(frozen=True)
class MeanSettings(Settings):
    """Settings of the regime mean."""

    strength: Share = 1.0
    """Factor of the mean that stands at hidden patches."""


@REGIMES.register("mean", MeanSettings)
class Mean(Regime):
    """All tokens are kept, and everybody reads the mean at hidden places."""

    keeps_all_tokens = True

    def inputs(
        self, vit: nn.Module, images: Tensor, mask: PatchMask
    ) -> tuple[Embedded, Tensor | None]:
        family = family_of(vit)
        patches, seen = family.embed(images), mask.is_visible[..., None]  # (B, N, D), (B, N, 1)
        mean = (patches * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        patches = torch.where(seen, patches, mean * self.settings.strength)
        return family.place(patches), None

    def terms(self, forward: Forward) -> dict[str, Tensor]:
        return {"latent_size": 1e-4 * forward.latents.tokens.square().mean((1, 2))}
