"""timm's Eva: ViTs with rotary position embeddings, EVA-02, RoPE-ViT and DINOv3 among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor

from mim.core.cpu.linear import linear_of
from mim.model.backbones.family import Embedded, Transformer, as_unit, register_family


@register_family(Eva)
class RotaryViT(Transformer):
    """A patch's queries and keys are turned by its place (EVA-02, arXiv:2303.11331).

    The rotation goes along with each patch, so that one keeps its own where others are absent or
    stand elsewhere in the sequence. Prefix tokens are not turned.
    """

    has_one_grid = True

    @property
    def splits(self) -> bool:
        kinds = (EvaAttention, AttentionRope)
        return all(type(b) is EvaBlock and type(b.attn) in kinds for b in self.vit.blocks)

    def place(self, patches: Tensor) -> Embedded:
        tokens, rotation = self.vit._pos_embed(patches)
        return Embedded(tokens, rotation)  # (N, R), or (blocks, heads, N, R)

    def take(self, embedded: Embedded, ids: Tensor, valid: Tensor | None = None) -> Embedded:
        taken, rotation = super().take(embedded, ids, valid), embedded.rotation
        if rotation is None:
            return taken
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        if self.vit.rope_mixed:  # (blocks, heads, N, R) -> (blocks, B, heads, T, R)
            if rotation.ndim == 4:
                return replace(taken, rotation=rotation[:, :, ids].transpose(1, 2))
            return replace(taken, rotation=rotation[:, rows, :, ids].permute(2, 0, 3, 1, 4))
        if rotation.ndim == 2:
            return replace(taken, rotation=rotation[ids][:, None])  # (B, 1, T, R)
        return replace(taken, rotation=rotation[rows, :, ids].transpose(1, 2))

    def _rotation(self, index: int, embedded: Embedded) -> Tensor | None:
        if embedded.rotation is None or not self.vit.rope_mixed:
            return embedded.rotation
        return embedded.rotation[index]

    def step(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        block, rotation = self.vit.blocks[index], self._rotation(index, embedded)
        if embedded.num_keys is None:
            return block(x, rope=rotation, attn_mask=embedded.bias)
        return as_unit(block, _few_keys, block, x, rotation, embedded.num_keys, embedded.bias)

    def attention(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        block, rotation = self.vit.blocks[index], self._rotation(index, embedded)
        q, k, _ = _project(block.attn, block.norm1(x), rotation, x.shape[1])
        scores = q @ k.transpose(-2, -1) * block.attn.scale
        return (scores if embedded.bias is None else scores + embedded.bias).softmax(dim=-1)

    def mlp_output(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        block, rotation = self.vit.blocks[index], self._rotation(index, embedded)
        attended = block.attn(block.norm1(x), rope=rotation, attn_mask=embedded.bias)
        return block.mlp(block.norm2(x + _scaled(attended, block.gamma_1)))

    def classifier_args(self, mean: bool) -> dict[str, Any]:
        # With the mean a norm follows the pooling, as in MAE.
        normed = mean or type(self.vit.fc_norm).__name__ != "Identity"
        return {**super().classifier_args(mean), "use_fc_norm": normed}


def _few_keys(
    block: Any, x: Tensor, rotation: Tensor | None, num_keys: int, bias: Tensor | None
) -> Tensor:
    attended = attend_few_keys(block.attn, block.norm1(x), rotation, num_keys, bias)
    x = x + block.drop_path1(_scaled(attended, block.gamma_1))
    return x + block.drop_path2(_scaled(block.mlp(block.norm2(x)), block.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _project(
    attn: Any, x: Tensor, rotation: Tensor | None, num_keys: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Project all queries, keys and values of the first ``num_keys`` tokens: (B, heads, ., d)."""
    few = x[:, :num_keys]
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(few), attn.v_proj(few)
    else:
        weight, offset = attn.qkv.weight, attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            offset = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        width = len(weight) // 3
        linear = linear_of(attn.qkv)
        q = linear(x, weight[:width], None if offset is None else offset[:width])
        kv = linear(few, weight[width:], None if offset is None else offset[width:])
        k, v = kv.chunk(2, dim=-1)
    q, k, v = (part.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for part in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rotation is not None:
        turned = num_keys - attn.num_prefix_tokens
        q = _turn(attn, q, rotation).type_as(v)
        k = _turn(attn, k, rotation[..., :turned, :]).type_as(v)
    groups = q.shape[1] // k.shape[1]  # several heads may share keys and values
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def _turn(attn: Any, x: Tensor, rotation: Tensor) -> Tensor:
    prefix, patches = x[:, :, : attn.num_prefix_tokens], x[:, :, attn.num_prefix_tokens :]
    patches = apply_rot_embed_cat(patches, rotation, half=attn.rotate_half)
    return torch.cat([prefix, patches], dim=2)


def attend_few_keys(
    attn: Any, x: Tensor, rotation: Tensor | None, num_keys: int, bias: Tensor | None
) -> Tensor:
    """timm's attention with keys and values of the first ``num_keys`` tokens only."""
    q, k, v = _project(attn, x, rotation, num_keys)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=attn.attn_drop.p if attn.training else 0.0
    )
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))
