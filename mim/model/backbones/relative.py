"""timm's ViTs with relative position bias: Beit and VisionTransformerRelPos."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import RelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from mim.model.backbones.family import Embedded, Transformer, as_unit, register_family


class RelativeViT(Transformer):
    """A bias by the places of query and key is added to the scores (BEiT, arXiv:2106.08254).

    Each block has its own bias, or all share one. Where tokens are absent, the rest keep the bias
    of their places.
    """

    has_one_grid = True
    takes_fixed_positions = False

    def place(self, patches: Tensor) -> Embedded:
        vit = self.vit
        if vit.cls_token is not None:
            patches = torch.cat([vit.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        positions = getattr(vit, "pos_embed", None)
        if positions is not None:
            patches = patches + positions
        return Embedded(vit.pos_drop(patches) if isinstance(vit, Beit) else patches)

    def take(self, embedded: Embedded, ids: Tensor, valid: Tensor | None = None) -> Embedded:
        first = torch.arange(self.num_prefix, device=ids.device).expand(len(ids), -1)
        places = torch.cat([first, ids + self.num_prefix], dim=1)  # (B, L)
        return replace(super().take(embedded, ids, valid), places=places)

    def before_blocks(self, tokens: Tensor) -> Tensor:
        return tokens

    def step(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        block = self.vit.blocks[index]
        return as_unit(block, self._run_block, block, x, embedded)

    def _run_block(self, block: Any, x: Tensor, embedded: Embedded) -> Tensor:
        bias = self._bias(block.attn)  # (..., heads, L, L) of all tokens, or None
        if bias is not None and embedded.places is not None:
            queries, keys = embedded.places[:, :, None], embedded.places[:, None, :]
            bias = bias.reshape(bias.shape[-3:])[:, queries, keys].transpose(0, 1)
        if embedded.bias is not None:
            bias = embedded.bias if bias is None else bias + embedded.bias
        attended = _attend(block.attn, block.norm1(x), bias)
        x = x + block.drop_path1(_scaled(block, 1, attended))
        return x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))

    @abstractmethod
    def _bias(self, attn: Any) -> Tensor | None:
        """(heads, P + N, P + N) of a block, its own and that of all blocks, perhaps after a 1."""


@register_family(Beit)
class BeitFamily(RelativeViT):
    """BEiT, BEiT v2 and SimMIM's ViT (``use_shared_rel_pos_bias``)."""

    def _bias(self, attn: Any) -> Tensor | None:
        table, shared = attn.relative_position_bias_table, self.vit.rel_pos_bias
        biases = [] if table is None else [attn._get_rel_pos_bias()]
        biases += [] if shared is None else [shared()]
        return sum(biases[1:], biases[0]) if biases else None

    def classifier_args(self, mean: bool) -> dict[str, Any]:
        normed = mean or not isinstance(self.vit.fc_norm, nn.Identity)
        return {**super().classifier_args(mean), "use_fc_norm": normed}


@register_family(VisionTransformerRelPos)
class RelPosViT(RelativeViT):
    """timm's own: a bias for each pair of offsets, or a small network of the offsets."""

    def refusal(self) -> str | None:
        if any(type(block) is not RelPosBlock for block in self.vit.blocks):
            return f"has blocks of the kind {type(self.vit.blocks[0]).__name__}, whose norms follow"
        return super().refusal()

    def _bias(self, attn: Any) -> Tensor | None:
        part = self.vit.shared_rel_pos if attn.rel_pos is None else attn.rel_pos
        return None if part is None else part.get_bias()

    def classifier_args(self, mean: bool) -> dict[str, Any]:
        normed = mean or not isinstance(self.vit.fc_norm, nn.Identity)
        return {**super().classifier_args(mean), "fc_norm": normed}


def _scaled(block: Any, part: int, values: Tensor) -> Tensor:
    """Apply a block's layer scale, where it has one."""
    if isinstance(block, RelPosBlock):
        scale = block.ls1 if part == 1 else block.ls2
        return scale(values)
    gamma = block.gamma_1 if part == 1 else block.gamma_2
    return values if gamma is None else gamma * values


def _attend(attn: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Compute timm's attention of ``x`` (B, L, D) with ``bias`` in the place of its own."""
    offset = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        offset = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv = F.linear(x, attn.qkv.weight, offset).unflatten(2, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    bias = None if bias is None else bias.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))
