"""A linear map after a layer norm and dropout."""

from dataclasses import dataclass

from torch import Tensor, nn

from mim.core.fields import BelowOne, Settings
from mim.core.patches import values_at
from mim.model.decoders import DECODERS, Decoder, DecoderContext
from mim.model.regimes import Latents


@dataclass(frozen=True)
class NormedSettings(Settings):
    """Settings of the decoder normed."""

    dropout: BelowOne = 0.1
    """Share of each latent that is left out in training."""


@DECODERS.register("normed", NormedSettings)
class Normed(Decoder):
    """Needs a latent at every patch."""

    needs_all_tokens = True

    def __init__(self, settings: NormedSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.norm = nn.Sequential(nn.LayerNorm(context.width), nn.Dropout(settings.dropout))
        self.head = nn.Linear(context.width, context.output)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        return self.norm(latents.patches if ids is None else values_at(latents.patches, ids))

    def project(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)
