"""What predicts the hidden patches from the latents.

A decoder works in two parts: ``forward`` gives a hidden vector at the patches asked for, and
``project`` turns them into predictions, so that the last projection runs only where it is wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import freq_bands
from torch import Tensor, nn

from mim.core.config import DecoderConfig
from mim.core.errors import setting_error
from mim.core.fields import Count, Positive, Settings
from mim.core.patches import values_at
from mim.core.registry import Registry
from mim.core.rng import seed_of
from mim.masks import PatchMask
from mim.model.regimes import Latents, Regime, scatter_tokens
from mim.model.terms import WithTerms


@dataclass(frozen=True, eq=False)
class DecoderContext:
    """What a decoder is built for."""

    width: int
    """D, of the latents."""
    output: int
    """Values predicted for a patch."""
    grid: tuple[int, int]
    """(rows, columns) of patches."""
    regime: Regime
    num_prefix: int
    """P, tokens in front of the patches."""
    prefix_on_border: bool = False
    """Whether the backbone gives them places on the border of the image."""
    head: Callable[[int], nn.Module | None] = lambda width: None
    """Builds what the target wants in the place of a decoder's last linear map, given its width."""


class Decoder(WithTerms, nn.Module, ABC):
    """Base class; its ``settings`` are those registered with it, None without any."""

    name: ClassVar[str] = ""
    """As registered."""
    needs_all_tokens: bool
    """Whether it reads a latent at every patch and so cannot follow a regime that drops some."""
    needs_layers: bool = False
    """Whether it reads the output of every encoder block, not of the last alone."""
    needs_input: bool = False
    """Whether those layers begin with what enters the first block, and the encoder's final norm is
    used by nobody."""
    share: float = 1.0
    """Share of the hidden patches that it predicts in training."""
    share_of: str = "masked"
    """What that is a share of: masked, or all patches."""
    takes_sizes: ClassVar[bool] = True
    """Whether image sizes may differ (:class:`mim.core.patches.Patches`)."""
    packs: bool = False
    """Whether images of different sizes share a sequence."""
    predicts_blocks: ClassVar[bool] = False
    """Whether it predicts the target blocks of a mask (``PatchMask.target_ids``), each by itself:
    ``ids`` are then (B, T A), and the latents hold the mask."""
    head: nn.Module

    def __init__(self, settings: Any, context: DecoderContext) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        """Compute hidden vectors (B, M, E) at the patches ``ids`` (B, M); None: all N in order."""

    def project(self, hidden: Tensor) -> Tensor:
        """Turn hidden vectors into predictions, by ``self.head``: (..., E) -> (..., output)."""
        return self.head(hidden)

    def share_at(self, mask: PatchMask) -> float:
        """Return the share of the patches that ``mask`` hides which is predicted in training."""
        if self.share_of == "masked":
            return self.share
        return min(1.0, self.share * mask.num_patches / max(mask.num_masked, 1))


DECODERS: Registry[type[Decoder]] = Registry(
    "model.decoder.name",
    DecoderConfig,
    {"mae": "transformer", "crossmae": "cross_attention", "simmim": "linear"},
)


def at(hidden: Tensor, ids: Tensor | None) -> Tensor:
    return hidden if ids is None else values_at(hidden, ids)


def positions(table: Tensor, latents: Latents, num_prefix: int = 0) -> Tensor:
    """Fixed positions: ``table`` (1, P + N, E), or (B, P + N, E) where image sizes differ.

    Prefix tokens have zeros.
    """
    if latents.coords is None:
        return table
    bands = freq_bands(table.shape[-1] // 4, temperature=10000.0, step=1, device=table.device)
    angles = latents.coords[..., None] * bands  # (B, N, 2, E / 4)
    patches = torch.cat([angles.sin(), angles.cos()], dim=-2).flatten(-2)  # (B, N, E)
    return F.pad(patches.to(table.dtype), (0, 0, num_prefix, 0))


def latents_at(latents: Latents, ids: Tensor | None, fill: Tensor | None = None) -> Tensor:
    """Latents (B, M, D) of the patches ``ids``; ``fill`` (B, N, D) or zeros where there is none."""
    patches = latents.patches  # (B, T, D)
    if latents.patch_ids is not None:
        if fill is None:
            fill = patches.new_zeros(len(patches), latents.num_patches, patches.shape[-1])
        fill = fill.to(patches.dtype)
        patches = scatter_tokens(patches, latents.patch_ids, latents.valid, fill)
    return at(patches, ids)


def init_xavier(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@dataclass(frozen=True)
class BlocksSettings(Settings):
    """Sizes of a decoder of blocks."""

    width: Count = 512
    """Width of a token in the decoder."""
    depth: Count = 8
    """Number of blocks."""
    heads: Count = 16
    """Attention heads; must divide the width."""
    mlp_ratio: Positive = 4.0
    """Hidden width of a block's MLP over the decoder's width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise self.error("width", f"is not divisible by {self.where}.heads={self.heads}")
        if self.width % 4:
            reason = "must be divisible by 4 for its 2-D sin-cos position embedding"
            raise self.error("width", reason)


def build_decoder(config: DecoderConfig, context: DecoderContext, seed: int = 0) -> Decoder:
    """Build the decoder that ``config`` names; its weights follow from ``seed`` alone.

    Raises:
        UserError: if the name is unknown, or the decoder needs tokens that the regime drops.
    """
    kind = DECODERS.get(config.name)
    regime = context.regime
    if kind.needs_all_tokens and not regime.keeps_all_tokens:
        able = ", ".join(name for name in DECODERS if not DECODERS.get(name).needs_all_tokens)
        reason = (
            f"needs a token at every patch, and model.regime.name={regime.name!r} drops "
            f"the masked ones; with that regime choose {able}"
        )
        raise setting_error("model.decoder.name", config.name, reason)
    if regime.predict_share < 1 and not kind.needs_all_tokens:
        able = ", ".join(name for name in DECODERS if DECODERS.get(name).needs_all_tokens)
        reason = f"must be 1 with model.decoder.name={config.name!r}, whose predictions read each "
        reason += f"other's latents; below 1 choose {able}"
        raise setting_error("model.regime.zero.predict_share", regime.predict_share, reason)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "decoder"))
        decoder = kind(DECODERS.chosen(config, config.name), context)
        if isinstance(decoder.head, nn.Linear):
            decoder.head = context.head(decoder.head.in_features) or decoder.head
        return decoder
