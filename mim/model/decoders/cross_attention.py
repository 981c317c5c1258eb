"""CrossMAE's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from mim.core.fields import Share
from mim.model.attention import key_bias
from mim.model.backbones import sincos_position_embedding
from mim.model.decoders.base import (
    DECODERS,
    BlocksSettings,
    Decoder,
    DecoderContext,
    at,
    init_xavier,
    positions,
)
from mim.model.regimes import Latents


class CrossBlock(nn.Module):
    """Queries of ``width`` E read a memory of width M, then an MLP; they do not read each other."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, memory: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(memory or width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        """Map queries (B, M, E) and a memory (B, L, M) to (B, M, E); bias adds to the scores."""
        q = self.q(self.norm1(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, h, M, d)
        kv = self.kv(memory).unflatten(2, (2, self.heads, -1))  # (B, L, 2, h, d)
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, h, L, d)
        bias = None if bias is None else bias.to(q.dtype)
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.proj(read.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class CrossAttentionSettings(BlocksSettings):
    """CrossMAE's decoder."""

    share: Share = 0.25
    """Share of the hidden patches that is decoded in training, drawn for each image and epoch; must
    be 1 with model.target.loss_on=all."""
    share_of: Literal["masked", "all"] = "masked"
    """What ``share`` counts: hidden patches, or all of them, as CrossMAE's kept ratio does."""
    layers: Literal["last", "weighted", "maps"] = "weighted"
    """What the blocks read: last (the encoder's output), weighted (each block its own learned sum
    of the outputs of the encoder's blocks, after one linear map for all) or maps (CrossMAE's own:
    the embedded patches are in the sum, no output has the final norm, and no linear map stands
    before keys and values)."""


@DECODERS.register("cross_attention", CrossAttentionSettings)
class CrossAttentionDecoder(Decoder):
    """Mask tokens read the latents and not each other (CrossMAE, Fu et al. 2024, 2401.14391).

    Since no prediction depends on another, any subset can be computed alone: in training a
    ``share`` of the hidden patches is, drawn by key, which leaves the loss unbiased. With
    ``layers: weighted`` or ``maps`` each block reads its own learned sum of the encoder's blocks.
    ``maps`` with ``share_of: all`` is the authors' arithmetic; the encoder's final norm then stays
    as it was initialised.
    """

    needs_all_tokens = False

    def __init__(self, settings: CrossAttentionSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.share, self.share_of = settings.share, settings.share_of
        self.needs_layers = settings.layers != "last"
        self.needs_input = settings.layers == "maps"
        if not self.needs_input:
            self.embed = nn.Linear(context.width, settings.width)
        positions = sincos_position_embedding(context.grid, settings.width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, N, E)
        memory = context.width if self.needs_input else settings.width
        self.blocks = nn.ModuleList(
            CrossBlock(settings.width, settings.heads, settings.mlp_ratio, memory)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        self.head = nn.Linear(settings.width, context.output)
        init_xavier(self)
        self.mask_token = nn.Parameter(torch.randn(1, 1, settings.width) * 0.02)
        if self.needs_layers:
            # The last block alone, to begin with.
            weights = torch.zeros(settings.depth, context.regime.num_layers + self.needs_input)
            weights[:, -1] = 1.0
            if self.needs_input:  # a matrix like any other, which decays by its name
                self.map_weights = nn.Parameter(nn.init.xavier_uniform_(weights))
            else:
                self.layer_weights = nn.Parameter(weights)  # (blocks, encoder blocks)
            self.layer_norms = nn.ModuleList(
                nn.LayerNorm(context.width, eps=1e-6) for _ in range(settings.depth)
            )

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        tokens = latents.tokens  # (B, P + T, D)
        places = positions(self.pos_embed, latents).expand(len(tokens), -1, -1)  # (B, N, E)
        x = self.mask_token + at(places, ids)  # (B, M, E)
        bias = None
        if latents.valid is not None:
            bias = key_bias(latents.valid, tokens.dtype, latents.num_prefix)
        layers = latents.layers
        if not self.needs_input:
            layers = (*layers[:-1], tokens)  # the last with the encoder's final norm
        for index, block in enumerate(self.blocks):
            x = block(x, self._memory(index, tokens, layers), bias)
        return self.norm(x)

    def _memory(self, index: int, tokens: Tensor, layers: tuple[Tensor, ...]) -> Tensor:
        """Return what a block reads, (B, P + T, M)."""
        if not self.needs_layers:
            return self.embed(tokens)
        weights = self.map_weights if self.needs_input else self.layer_weights
        each = zip(weights[index].to(tokens.dtype), layers, strict=True)
        mixed = sum(weight * layer for weight, layer in each)
        normed = self.layer_norms[index](mixed)
        return normed if self.needs_input else self.embed(normed)
