"""timm's VisionTransformer: learned or fixed positions added to the tokens."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from mim.backbone.family import Embedded, Transformer, register_family


@register_family(VisionTransformer)
class PlainViT(Transformer):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), DeiT, CLIP's and DINOv2's among them."""

    @property
    def splits(self) -> bool:
        """See :class:`~mim.backbone.Family`."""
        return all(type(b) is Block and type(b.attn) is Attention for b in self.vit.blocks)

    def place(self, patches: Tensor) -> Embedded:
        """See :class:`~mim.backbone.Family`."""
        return Embedded(self.vit.patch_drop(self.vit._pos_embed(patches)))

    def step(
        self,
        index: int,
        x: Tensor,
        embedded: Embedded,
        bias: Tensor | None,
        num_keys: int | None,
    ) -> Tensor:
        """See :class:`~mim.backbone.family.Transformer`."""
        block = self.vit.blocks[index]
        if num_keys is None:
            return block(x, attn_mask=bias) if bias is not None else block(x)
        attended = _attend_few_keys(block.attn, block.norm1(x), num_keys, bias)
        x = x + block.drop_path1(block.ls1(attended))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def attention(
        self, index: int, x: Tensor, embedded: Embedded, bias: Tensor | None = None
    ) -> Tensor:
        """See :class:`~mim.backbone.Family`."""
        block = self.vit.blocks[index]
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, attn.num_heads, -1)  # (B, L, 3, h, d)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, h, L, d)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def classifier_args(self, mean: bool) -> dict[str, Any]:
        """See :class:`~mim.backbone.Family`; with ``mean`` a norm follows the pooling (MAE)."""
        normed = mean or type(self.vit.fc_norm).__name__ != "Identity"
        return {**super().classifier_args(mean), "fc_norm": normed}


def _attend_few_keys(attn: Attention, x: Tensor, num_keys: int, bias: Tensor | None) -> Tensor:
    """timm's ``Attention.forward`` with keys and values of the first ``num_keys`` tokens only."""
    batch, length, _ = x.shape
    width, heads = attn.attn_dim, attn.num_heads
    weight, offset = attn.qkv.weight, attn.qkv.bias
    q = F.linear(x, weight[:width], None if offset is None else offset[:width])
    kv = F.linear(x[:, :num_keys], weight[width:], None if offset is None else offset[width:])
    q = q.view(batch, length, heads, -1).transpose(1, 2)  # (B, heads, L, d)
    k, v = kv.view(batch, num_keys, 2, heads, -1).permute(2, 0, 3, 1, 4)  # (B, heads, keys, d)
    out = F.scaled_dot_product_attention(
        attn.q_norm(q),
        attn.k_norm(k),
        v,
        attn_mask=bias,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
    )
    out = attn.norm(out.transpose(1, 2).reshape(batch, length, width))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))
