"""What predicts the hidden patches from the latents.

A decoder works in two parts: ``forward`` gives a hidden vector at every patch, and ``project``
turns chosen ones into predictions, so that the last projection runs only where it is wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.backbone import sincos_position_embedding
from mim.config import DecoderConfig
from mim.errors import setting_error
from mim.keys import seed_of
from mim.regimes import Latents, Regime, place_tokens
from mim.registry import Registry


class Decoder(nn.Module, ABC):
    """Base class.

    Args:
        config: the settings under ``model.decoder``.
        width: D, of the latents.
        output: values predicted for a patch.
        grid: (rows, columns) of patches.
        regime: the regime it decodes for.
    """

    needs_all_tokens: bool
    """Whether it reads a latent at every patch and so cannot follow a regime that drops some."""

    def __init__(
        self,
        config: DecoderConfig,
        width: int,
        output: int,
        grid: tuple[int, int],
        regime: Regime,
        num_prefix: int,
    ) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, latents: Latents) -> Tensor:
        """Latents -> (B, N, E), a hidden vector at every patch."""

    @abstractmethod
    def project(self, hidden: Tensor) -> Tensor:
        """(..., E) -> (..., output)."""


DECODERS: Registry[type[Decoder]] = Registry("model.decoder.name")


@DECODERS.register("transformer")
class TransformerDecoder(Decoder):
    """MAE's decoder: mask tokens where no latent is, fixed positions, transformer blocks.

    With a regime that keeps every token it reads those and has no mask token of its own.
    He et al. 2021, arXiv:2111.06377.
    """

    needs_all_tokens = False

    def __init__(
        self,
        config: DecoderConfig,
        width: int,
        output: int,
        grid: tuple[int, int],
        regime: Regime,
        num_prefix: int,
    ) -> None:
        super().__init__(config, width, output, grid, regime, num_prefix)
        settings = config.transformer
        self.embed = nn.Linear(width, settings.width)
        positions = sincos_position_embedding(grid, settings.width, num_prefix)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, P + N, E)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.heads, settings.mlp_ratio, qkv_bias=True)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        self.head = nn.Linear(settings.width, output)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Last, so that the weights above are the same whether or not there is a mask token.
        self.mask_token: nn.Parameter | None = None
        if not regime.keeps_all_tokens:
            self.mask_token = nn.Parameter(torch.randn(1, 1, settings.width) * 0.02)

    def forward(self, latents: Latents) -> Tensor:
        """Decode; see :class:`Decoder`."""
        x = self.embed(latents.tokens)  # (B, P + T, E)
        if latents.patch_ids is not None:
            assert self.mask_token is not None
            prefix, patches = x[:, : latents.num_prefix], x[:, latents.num_prefix :]
            fill = self.mask_token.expand(len(x), latents.num_patches, -1).to(x.dtype)
            patches = place_tokens(patches, latents.patch_ids, latents.valid, fill)
            x = torch.cat([prefix, patches], dim=1)  # (B, P + N, E)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, latents.num_prefix :])

    def project(self, hidden: Tensor) -> Tensor:
        """Predict; see :class:`Decoder`."""
        return self.head(hidden)


@DECODERS.register("linear")
class LinearDecoder(Decoder):
    """One linear map of each latent (SimMIM, arXiv:2111.09886)."""

    needs_all_tokens = True

    def __init__(
        self,
        config: DecoderConfig,
        width: int,
        output: int,
        grid: tuple[int, int],
        regime: Regime,
        num_prefix: int,
    ) -> None:
        super().__init__(config, width, output, grid, regime, num_prefix)
        self.head = nn.Linear(width, output)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, latents: Latents) -> Tensor:
        """The latents of the patches; see :class:`Decoder`."""
        return latents.patches

    def project(self, hidden: Tensor) -> Tensor:
        """Predict; see :class:`Decoder`."""
        return self.head(hidden)


def build_decoder(
    config: DecoderConfig,
    *,
    width: int,
    output: int,
    grid: tuple[int, int],
    regime: Regime,
    num_prefix: int,
    seed: int = 0,
) -> Decoder:
    """The decoder that ``config`` names; its weights follow from ``seed`` alone.

    Raises:
        UserError: if the name is unknown, or the decoder needs tokens that the regime drops.
    """
    kind = DECODERS.get(config.name)
    if kind.needs_all_tokens and not regime.keeps_all_tokens:
        able = ", ".join(name for name in DECODERS if not DECODERS.get(name).needs_all_tokens)
        reason = (
            f"needs a token at every patch, and model.regime.name={regime.config.name!r} drops "
            f"the masked ones; with that regime choose {able}"
        )
        raise setting_error("model.decoder.name", config.name, reason)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "decoder"))
        return kind(config, width, output, grid, regime, num_prefix)
