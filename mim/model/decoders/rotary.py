"""CAPI's predictor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import Mlp, apply_rot_embed_cat
from torch import Tensor, nn

from mim.core.fields import BelowOne, Share
from mim.core.patches import values_at
from mim.model.attention import key_bias
from mim.model.backbones.capi import axial_rotation, border_places, grid_places, residual
from mim.model.decoders.base import DECODERS, BlocksSettings, Decoder, DecoderContext, init_xavier
from mim.model.regimes import Latents

_EPSILON = 1e-5


@dataclass(frozen=True)
class RotarySettings(BlocksSettings):
    """CAPI's predictor."""

    share: Share = 0.05
    """Share of the hidden patches that is predicted in training, drawn for each image and epoch;
    must be 1 with model.target.loss_on=all."""
    drop_path: BelowOne = 0.0
    """Share of the images of a batch that a block's halves leave out; CAPI's is 0.2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width // self.heads % 4:
            reason = "must give each head a width divisible by 4, for two axes of rotation: "
            reason += f"{self.width} / {self.heads} is not"
            raise self.error("heads", reason)


class RotaryCrossBlock(nn.Module):
    """Queries of width E read a memory of width D, both turned by their places; then an MLP."""

    def __init__(self, settings: RotarySettings, memory: int) -> None:
        super().__init__()
        width = settings.width
        self.heads, self.drop_path = settings.heads, settings.drop_path
        self.norm1 = nn.RMSNorm(width, eps=_EPSILON)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(memory, width, bias=False)
        self.v = nn.Linear(memory, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=_EPSILON)
        self.mlp = Mlp(width, int(width * settings.mlp_ratio), bias=False)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        query_rotation: Tensor,
        key_rotation: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Map queries (B, M, E) and a memory (B, L, D) to (B, M, E).

        The rotations are (B, 1, M, R) and (B, 1, L, R); bias (B, 1, 1, L) adds to the scores.
        """
        share = self.drop_path if self.training else 0.0

        def read(of: Callable[[Tensor], Tensor]) -> Tensor:
            return self._attend(
                self.norm1(of(x)),
                of(memory),
                of(query_rotation),
                of(key_rotation),
                None if bias is None else of(bias),
            )

        x = residual(x, read, share)
        return residual(x, lambda of: self.mlp(self.norm2(of(x))), share)

    def _attend(
        self,
        x: Tensor,
        memory: Tensor,
        query_rotation: Tensor,
        key_rotation: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        q, k, v = (
            linear(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, ., d)
            for linear, tokens in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        q = apply_rot_embed_cat(q, query_rotation, half=True).type_as(v)
        k = apply_rot_embed_cat(k, key_rotation, half=True).type_as(v)
        bias = None if bias is None else bias.to(q.dtype)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(read.transpose(1, 2).flatten(2))


@DECODERS.register("rotary", RotarySettings)
class RotaryDecoder(Decoder):
    """Queries that are one mask token, told apart by rotation alone (CAPI, arXiv:2502.08769).

    Each reads the encoder's output, prefix tokens too, and no other query, so that a ``share`` of
    the hidden patches can be predicted alone. Registers of a backbone that places them on the
    border of the image (``vit_large_patch14_capi``) lie on that of the box around the patches that
    have a latent; other prefix tokens are not turned.
    """

    needs_all_tokens = False
    takes_sizes = False

    def __init__(self, settings: RotarySettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.share = settings.share
        self.grid, self.prefix_on_border = context.grid, context.prefix_on_border
        self.head_width = settings.width // settings.heads
        self.blocks = nn.ModuleList(
            RotaryCrossBlock(settings, context.width) for _ in range(settings.depth)
        )
        self.norm = nn.RMSNorm(settings.width, eps=_EPSILON, elementwise_affine=False)
        self.head = nn.Linear(settings.width, context.output)
        init_xavier(self)
        self.mask_token = nn.Parameter(torch.randn(1, 1, settings.width) * 0.02)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        tokens, prefix = latents.tokens, latents.num_prefix
        batch = len(tokens)
        all_places = grid_places(self.grid, tokens).expand(batch, -1, -1)  # (B, N, 2)
        asked = all_places if ids is None else values_at(all_places, ids)  # (B, M, 2)
        places = all_places
        if latents.patch_ids is not None:
            places = values_at(all_places, latents.patch_ids)  # (B, T, 2)
        first = places.new_zeros(batch, prefix, 2)
        if self.prefix_on_border:
            first = border_places(prefix, places, latents.valid)
        keys = self._rotation(torch.cat([first, places], dim=1))
        queries = self._rotation(asked)
        bias = None
        if latents.valid is not None:
            bias = key_bias(latents.valid, tokens.dtype, prefix)
        x = self.mask_token.expand(batch, asked.shape[1], -1)
        for block in self.blocks:
            x = block(x, tokens, queries, keys, bias)
        return self.norm(x)

    def _rotation(self, places: Tensor) -> Tensor:
        return axial_rotation(places, self.head_width)[:, None]
