"""What maps each latent by itself: a linear map, and a multilayer perceptron."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mim.core.fields import Count, Settings
from mim.model.decoders.base import DECODERS, Decoder, DecoderContext, init_xavier, latents_at
from mim.model.regimes import Latents


@DECODERS.register("linear")
class LinearDecoder(Decoder):
    """One linear map of each latent (SimMIM, arXiv:2111.09886)."""

    needs_all_tokens = True

    def __init__(self, settings: None, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.head = nn.Linear(context.width, context.output)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        return latents_at(latents, ids)


@dataclass(frozen=True)
class MlpSettings(Settings):
    """A multilayer perceptron on each latent."""

    width: Count = 512
    """Width of a hidden layer."""
    depth: Count = 1
    """Number of hidden layers."""


@DECODERS.register("mlp", MlpSettings)
class MlpDecoder(Decoder):
    """A multilayer perceptron on each latent; between SimMIM's linear map and a transformer."""

    needs_all_tokens = True

    def __init__(self, settings: MlpSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        layers: list[nn.Module] = []
        for index in range(settings.depth):
            inner = settings.width if index else context.width
            layers += [nn.Linear(inner, settings.width), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(settings.width, context.output)
        init_xavier(self)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        return self.layers(latents_at(latents, ids))
