"""data2vec 2.0's decoder for images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim.core.fields import Count, NonNegative, Settings
from mim.model.decoders.base import DECODERS, Decoder, DecoderContext, at, latents_at
from mim.model.regimes import Latents


@dataclass(frozen=True)
class ConvolutionalSettings(Settings):
    """data2vec 2.0's convolutional decoder."""

    width: Count = 768
    """Channels of a convolution."""
    depth: Count = 6
    """Number of convolutions."""
    kernel: Count = 3
    """Side of a convolution's window in patches."""
    groups: Count = 16
    """Groups of channels that are convolved apart; must divide both widths."""
    noise: NonNegative = 0.01
    """Standard deviation of what stands where a regime drops patches; 0 where a model does not
    train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.groups:
            reason = f"does not divide model.decoder.convolutional.width={self.width}"
            raise self.error("groups", reason)


@DECODERS.register("convolutional", ConvolutionalSettings)
class ConvolutionalDecoder(Decoder):
    """Convolutions over the grid of patches (data2vec 2.0, Baevski et al. 2022, 2212.07525).

    Each is followed by a layer norm without weights and a GELU, and added to its input where that
    is as wide. There is no mask token: patches without a latent are noise. Prefix tokens are not
    read.
    """

    needs_all_tokens = False
    takes_sizes = False
    settings: ConvolutionalSettings

    def __init__(self, settings: ConvolutionalSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        if context.width % settings.groups:
            reason = f"does not divide the {context.width} of the backbone's tokens"
            raise settings.error("groups", reason)
        self.grid = context.grid
        self.blocks = nn.ModuleList(
            nn.Conv2d(
                settings.width if index else context.width,
                settings.width,
                settings.kernel,
                padding=settings.kernel // 2,
                groups=settings.groups,
            )
            for index in range(settings.depth)
        )
        self.head = nn.Linear(settings.width, context.output)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        fill: Tensor | None = None
        if self.training and self.settings.noise:
            shape = (len(latents.tokens), latents.num_patches, latents.tokens.shape[-1])
            fill = torch.randn(shape, device=latents.tokens.device) * self.settings.noise
        x = latents_at(latents, None, fill).transpose(1, 2).unflatten(2, self.grid)
        for block in self.blocks:
            y = block(x)[:, :, : self.grid[0], : self.grid[1]]  # (B, E, rows, columns)
            y = F.layer_norm(y.movedim(1, -1), y.shape[1:2]).movedim(-1, 1)
            y = F.gelu(y)
            x = x + y if x.shape == y.shape else y
        return at(x.flatten(2).transpose(1, 2), ids)
