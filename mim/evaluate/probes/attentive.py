"""Attentive probe: one cross-attention with a learned query, then a linear layer.

The head of AIM (El-Nouby et al. 2024, https://arxiv.org/abs/2401.08541), which CAPI (Darcet et al.
2025, https://arxiv.org/abs/2502.08769) measures by too: what a patch knows counts although no
single vector holds it all, so that encoders trained without a global token are not undersold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.core.errors import setting_error
from mim.core.fields import Count, Natural, NonNegative, Positive, SpanToOne
from mim.evaluate.base import EVALUATIONS, NOT_EMPTY
from mim.evaluate.encoders import Encoder
from mim.evaluate.probes.frozen import FrozenProbe, FrozenSettings
from mim.evaluate.training import BatchSize
from mim.model.backbones import family_of
from mim.model.standardize import Standardize


@dataclass(frozen=True)
class AttentiveSettings(FrozenSettings):
    """Settings of the attentive probe."""

    pool: Literal["mean", "both"] = "mean"
    """Which tokens the query reads: mean (the patches') or both (the prefix tokens too)."""
    epochs: Count = 50
    """Passes over the training images."""
    batch_size: BatchSize = 256
    """Images a step, over all processes."""
    weight_decay: NonNegative = 0.1
    """AdamW's."""
    base_lr: Annotated[tuple[Positive, ...], NOT_EMPTY] = (1e-4, 3e-4, 1e-3, 3e-3)
    """Peak learning rates for a batch of 256, scaled with the batch size: a head is trained with
    each, and the best is chosen."""
    crop_scale: SpanToOne = (0.3, 1.0)
    """Share of the image's area a random crop covers, from and to; mirrored as data.flip says."""
    heads: Natural = 0
    """Attention heads; 0 is as many as the encoder's last block has."""
    form: Literal["aim", "capi"] = field(default="aim", metadata={"before": "aim"})
    """aim standardises tokens, and keys and values have no bias. capi is CAPI's own head: no
    standardising, biases, which do not decay, all weights from a normal of 0.02, betas of 0.9 and
    0.95."""
    decays: tuple[NonNegative, ...] = field(default=(), metadata={"before": ()})
    """Weight decays in the place of weight_decay: a head is trained for each rate and each decay
    (CAPI: 5e-4, 1e-3, 5e-2)."""


class AttentivePool(nn.Module):
    """A learned query reads tokens, and a linear layer what it found; ``form`` is the setting."""

    def __init__(self, width: int, heads: int, classes: int, form: str = "aim") -> None:
        super().__init__()
        is_capi = form == "capi"
        self.num_heads = heads
        self.norm = nn.Identity() if is_capi else Standardize(width)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key = nn.Linear(width, width, bias=is_capi)
        self.value = nn.Linear(width, width, bias=is_capi)
        self.head = nn.Linear(width, classes)
        for name, parameter in self.named_parameters() if is_capi else ():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, K)."""
        x = self.norm(tokens)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)  # (B, heads, L, d)

        query = split(self.query.expand(len(x), 1, -1))  # (B, heads, 1, d)
        found = F.scaled_dot_product_attention(query, split(self.key(x)), split(self.value(x)))
        logits: Tensor = self.head(found.transpose(1, 2).flatten(1))
        return logits


@EVALUATIONS.register("attentive", AttentiveSettings)
class Attentive(FrozenProbe):
    """One cross-attention with a learned query on the tokens of a frozen encoder."""

    settings: AttentiveSettings

    def _heads(self, encoder: Encoder) -> int:
        assert encoder.vit is not None
        last: Any = family_of(encoder.vit).blocks[-1]
        return self.settings.heads or int(last.attn.num_heads)

    def check_encoder(self, encoder: Encoder) -> None:
        """Refuses heads that do not divide the encoder's width, too."""
        super().check_encoder(encoder)
        assert encoder.vit is not None
        width = family_of(encoder.vit).width
        if width % self._heads(encoder):
            reason = f"does not divide the encoder's width, {width}"
            raise setting_error("evaluations.attentive.heads", self.settings.heads, reason)

    def tokens(self, encoder: Encoder, images: Tensor) -> Tensor:
        """(B, L, D)."""
        assert encoder.vit is not None
        family = family_of(encoder.vit)
        first = family.num_prefix if self.settings.pool == "mean" else 0
        tokens: Tensor = family.pool_norm(family.features(images)[:, first:].float())
        return tokens

    def head(self, encoder: Encoder, classes: int) -> nn.Module:
        assert encoder.vit is not None
        width, form = family_of(encoder.vit).width, self.settings.form
        return AttentivePool(width, self._heads(encoder), classes, form)

    def decays(self) -> tuple[float, ...]:
        return self.settings.decays or super().decays()

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.settings.form == "aim":
            return torch.optim.AdamW(groups, lr=1.0)
        parts: list[dict[str, Any]] = []
        for group in groups:
            query, *others = group["params"]  # a vector too, but it decays
            weights = [query, *(p for p in others if p.ndim > 1)]
            biases = [p for p in others if p.ndim == 1]
            parts += [
                {**group, "params": weights},
                {**group, "params": biases, "weight_decay": 0.0},
            ]
        return torch.optim.AdamW(parts, lr=1.0, betas=(0.9, 0.95))
