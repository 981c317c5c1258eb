"""MAE's decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.model.attention import key_bias, with_prefix
from mim.model.backbones import block_at, sincos_position_embedding
from mim.model.decoders.base import (
    DECODERS,
    BlocksSettings,
    Decoder,
    DecoderContext,
    at,
    init_xavier,
    positions,
)
from mim.model.packing import Packing
from mim.model.regimes import Latents, scatter_tokens


@dataclass(frozen=True)
class TransformerSettings(BlocksSettings):
    """MAE's decoder."""


@DECODERS.register("transformer", TransformerSettings)
class TransformerDecoder(Decoder):
    """MAE's decoder: mask tokens where no latent is, fixed positions, transformer blocks.

    With a regime that keeps every token it reads those and has no mask token of its own.
    He et al. 2021, arXiv:2111.06377.
    """

    needs_all_tokens = False

    def __init__(self, settings: TransformerSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.embed = nn.Linear(context.width, settings.width)
        positions = sincos_position_embedding(context.grid, settings.width, context.num_prefix)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, P + N, E)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.heads, settings.mlp_ratio, qkv_bias=True)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        self.head = nn.Linear(settings.width, context.output)
        init_xavier(self)
        # Last, so that the weights above are the same whether or not there is a mask token.
        self.mask_token: nn.Parameter | None = None
        if not context.regime.keeps_all_tokens:
            self.mask_token = nn.Parameter(torch.randn(1, 1, settings.width) * 0.02)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        x = self.embed(latents.tokens)  # (B, P + T, E)
        if latents.patch_ids is not None:
            assert self.mask_token is not None
            prefix, patches = x[:, : latents.num_prefix], x[:, latents.num_prefix :]
            fill = self.mask_token.expand(len(x), latents.num_patches, -1).to(x.dtype)
            patches = scatter_tokens(patches, latents.patch_ids, latents.valid, fill)
            x = torch.cat([prefix, patches], dim=1)  # (B, P + N, E)
        x = x + positions(self.pos_embed, latents, latents.num_prefix)
        return self.norm(self._run(x, latents, ids))

    def _run(self, x: Tensor, latents: Latents, ids: Tensor | None) -> Tensor:
        """Run the blocks, (B, P + N, E) -> (B, M, E); nobody reads padding."""
        bias, packing, prefix = None, None, latents.num_prefix
        if latents.patch_valid is not None:
            bias = key_bias(latents.patch_valid, x.dtype, prefix)
            if self.packs:
                packing = Packing.of(with_prefix(latents.patch_valid, prefix))
                x, bias = packing.pack(x), packing.bias(None, x.dtype)
        *earlier, last = self.blocks
        for block in earlier:
            x = block(x, attn_mask=bias)
        if ids is not None and packing is None:
            assert isinstance(last, Block)
            return block_at(last, x, ids + prefix, bias)  # nobody reads the other places
        x = last(x, attn_mask=bias)
        if packing is not None:
            x = packing.unpack(x)
        return at(x[:, prefix:], ids)
