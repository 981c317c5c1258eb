"""I-JEPA's predictor: each target block of a mask by itself, from the context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mim.core.fields import Count
from mim.core.patches import values_at
from mim.masks import PatchMask
from mim.model.attention import key_bias
from mim.model.backbones import sincos_position_embedding
from mim.model.decoders.base import DECODERS, BlocksSettings, Decoder, DecoderContext
from mim.model.regimes import Latents


@dataclass(frozen=True)
class BlockPredictorSettings(BlocksSettings):
    """I-JEPA's predictor."""

    width: Count = 384
    """Width of a token in the decoder."""
    depth: Count = 12
    """Number of blocks."""
    heads: Count = 12
    """Attention heads; must divide the width."""


@DECODERS.register("block_predictor", BlockPredictorSettings)
class BlockPredictor(Decoder):
    """Mask tokens of one target block, and the visible latents, read each other (I-JEPA).

    Each target block of the mask (``mask.name: target_blocks``) is a sequence of its own, so that
    no block reads another; of a mask without target blocks, all that is hidden is one. With a
    regime that keeps every token, the block's own latents stand in the place of mask tokens.
    Assran et al. 2023, arXiv:2301.08243.
    """

    needs_all_tokens = False
    predicts_blocks = True
    takes_sizes = False

    def __init__(self, settings: BlockPredictorSettings, context: DecoderContext) -> None:
        super().__init__(settings, context)
        self.num_prefix = context.num_prefix
        self.embed = nn.Linear(context.width, settings.width)
        positions = sincos_position_embedding(context.grid, settings.width)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)  # (1, N, E)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.heads, settings.mlp_ratio, qkv_bias=True)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        self.head = nn.Linear(settings.width, context.output)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.mask_token: nn.Parameter | None = None
        if not context.regime.keeps_all_tokens:
            self.mask_token = nn.Parameter(torch.empty(1, 1, settings.width))
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, latents: Latents, ids: Tensor | None = None) -> Tensor:
        mask, patches = latents.mask, latents.patches
        assert mask is not None  # the model gives it
        images = len(patches)
        places = self.pos_embed.expand(images, -1, -1)  # (B, N, E)
        blocks, valid = 1, None
        if ids is None:
            ids = torch.arange(mask.num_patches, device=patches.device).expand(images, -1)
        elif mask.target_ids is None:
            valid = mask.masked_valid
        else:
            blocks, valid = mask.target_ids.shape[1], mask.target_valid
        queries = values_at(places, ids)  # (B, T A, E)
        if self.mask_token is None:
            queries = queries + self.embed(values_at(patches, ids))
            patches = values_at(patches, mask.visible_ids)
        else:
            queries = queries + self.mask_token
        context = self.embed(patches) + values_at(places, mask.visible_ids)  # (B, K, E)
        context = torch.cat([self.embed(latents.prefix), context], dim=1)  # (B, P + K, E)
        queries = queries.reshape(images * blocks, -1, queries.shape[-1])  # (B T, A, E)
        x = torch.cat([context.repeat_interleave(blocks, dim=0), queries], dim=1)
        bias = None
        if valid is not None or mask.visible_valid is not None:
            bias = self._bias(mask, valid, blocks, queries)
        for block in self.blocks:
            x = block(x, attn_mask=bias)
        return self.norm(x[:, -queries.shape[1] :]).reshape(images, ids.shape[1], -1)

    def _bias(self, mask: PatchMask, valid: Tensor | None, blocks: int, queries: Tensor) -> Tensor:
        """Hide padding of the context, and of targets (``valid``), from all (B T, 1, 1, L)."""
        seen, prefix = mask.visible_valid, self.num_prefix
        if seen is None:
            seen = torch.ones_like(mask.visible_ids, dtype=torch.bool)
        flags = torch.ones(queries.shape[:2], dtype=torch.bool, device=seen.device)
        if valid is not None:
            flags = valid.reshape(flags.shape)
        readable = torch.cat([seen.repeat_interleave(blocks, dim=0), flags], dim=1)
        return key_bias(readable, queries.dtype, prefix)
