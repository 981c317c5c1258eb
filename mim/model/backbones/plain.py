"""timm's VisionTransformer: learned or fixed positions added to the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mim.core.cpu.linear import PatchProjection, linear_of
from mim.core.patches import Patches, patches_at, values_at
from mim.model.backbones.family import (
    Embedded,
    Grid,
    Transformer,
    as_unit,
    register_family,
    resample_positions,
)


@register_family(VisionTransformer)
class PlainViT(Transformer):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929), DeiT, CLIP's and DINOv2's among them."""

    packs = True
    has_one_grid = True

    def __init__(self, vit: Any) -> None:
        super().__init__(vit)
        self.takes_sizes = getattr(vit, "pos_embed", None) is not None  # they are interpolated

    @property
    def splits(self) -> bool:
        return all(type(b) is Block and type(b.attn) is Attention for b in self.vit.blocks)

    def place(self, patches: Tensor) -> Embedded:
        return Embedded(self.vit.patch_drop(self.vit._pos_embed(patches)))

    def embed_at(self, images: Tensor, ids: Tensor) -> Embedded | None:
        vit, embed = self.vit, self.vit.patch_embed
        drops = vit.training and (vit.pos_drop.p > 0 or not isinstance(vit.patch_drop, nn.Identity))
        convolves = type(embed.proj) in (nn.Conv2d, PatchProjection)
        is_plain = convolves and embed.flatten and not vit.dynamic_img_size
        if drops or not is_plain:
            return None
        patches = self._project(patches_at(images, self.patch_size, ids))  # (B, T, D)
        # timm's rule adds to what it is given: to zeros it adds the positions.
        count = images.shape[-2:].numel() // (self.patch_size[0] * self.patch_size[1])
        added = vit._pos_embed(patches.new_zeros(1, count, patches.shape[-1]))
        positions = added[0, self.num_prefix :]
        if vit.pos_embed is None or not vit.pos_embed.requires_grad:
            positions = positions.detach()  # a gradient that nobody needs is not summed up
        tokens = patches + F.embedding(ids, positions)  # (B, T, D)
        prefix = added[:, : self.num_prefix].expand(len(tokens), -1, -1)
        return Embedded(torch.cat([prefix, tokens], dim=1))

    def embed_patches(self, images: Patches) -> Tensor:
        return self._project(images.values)

    def _project(self, patches: Tensor) -> Tensor:
        """Apply timm's convolution as a product with each patch: (B, T, P) -> (B, T, D)."""
        embed = self.vit.patch_embed
        weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P), in patchify's order
        return embed.norm(linear_of(embed.proj)(patches, weight, embed.proj.bias))

    def place_patches(self, patches: Tensor, images: Patches) -> Embedded:
        """Add positions as timm resamples them to the grid of each image."""
        vit, prefix = self.vit, 0 if self.vit.no_embed_class else self.num_prefix
        tables = {grid: self._positions(grid, prefix) for grid in set(images.grids)}
        rows = [F.pad(tables[g], (0, 0, 0, patches.shape[1] - g[0] * g[1])) for g in images.grids]
        tokens = patches + torch.stack(rows).to(patches.dtype)  # (B, N, D)
        extra = (vit.cls_token, vit.reg_token)
        front = [token.expand(len(tokens), -1, -1) for token in extra if token is not None]
        if front:
            first = torch.cat(front, dim=1)
            if prefix:
                first = first + vit.pos_embed[:, :prefix]
            tokens = torch.cat([first, tokens], dim=1)
        return Embedded(vit.patch_drop(vit.pos_drop(tokens)))

    def _positions(self, grid: Grid, prefix: int) -> Tensor:
        """(n, D) for the patches of a grid."""
        return resample_positions(self.vit.pos_embed, grid, self.grid, prefix)[0, prefix:]

    def step(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        block, bias = self.vit.blocks[index], embedded.bias
        if embedded.num_keys is None:
            return block(x, attn_mask=bias) if bias is not None else block(x)
        return as_unit(block, _few_keys, block, x, embedded.num_keys, bias)

    def attention(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        block, bias = self.vit.blocks[index], embedded.bias
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, attn.num_heads, -1)  # (B, L, 3, h, d)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, h, L, d)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def mlp_output(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        block = self.vit.blocks[index]
        x = x + block.ls1(block.attn(block.norm1(x), attn_mask=embedded.bias))
        return block.mlp(block.norm2(x))

    def classifier_args(self, mean: bool) -> dict[str, Any]:
        # With the mean a norm follows the pooling, as in MAE.
        normed = mean or type(self.vit.fc_norm).__name__ != "Identity"
        return {**super().classifier_args(mean), "fc_norm": normed}


def block_at(block: Block, x: Tensor, ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """Output (B, M, D) of a plain timm block at the tokens ``ids`` (B, M) of ``x`` (B, L, D).

    They read all tokens; ``bias`` (B, 1, 1, L) adds to the scores. The rest is not computed.
    """
    return as_unit(block, _few_queries, block, x, ids, bias)


def _few_queries(block: Block, x: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
    assert isinstance(block.attn, Attention)
    normed = block.norm1(x)
    attended = _attend(block.attn, values_at(normed, ids), normed, bias)
    return _after_attention(block, values_at(x, ids), attended)  # (B, M, D)


def _few_keys(block: Block, x: Tensor, num_keys: int, bias: Tensor | None) -> Tensor:
    assert isinstance(block.attn, Attention)
    normed = block.norm1(x)
    return _after_attention(block, x, _attend(block.attn, normed, normed[:, :num_keys], bias))


def _after_attention(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.drop_path1(block.ls1(attended))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend(attn: Attention, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
    """Compute timm's ``Attention.forward`` with queries of ``x``, keys and values of ``memory``."""
    batch, length, _ = x.shape
    width, heads = attn.attn_dim, attn.num_heads
    weight, offset, linear = attn.qkv.weight, attn.qkv.bias, linear_of(attn.qkv)
    q = linear(x, weight[:width], None if offset is None else offset[:width])
    kv = linear(memory, weight[width:], None if offset is None else offset[width:])
    q = q.view(batch, length, heads, width // heads).transpose(1, 2)  # (B, heads, L, d)
    kv = kv.view(batch, memory.shape[1], 2, heads, width // heads)
    k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, K, d)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)  # (B, heads, L, K)
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        out = attn.attn_drop(weights) @ v
    out = attn.norm(out.transpose(1, 2).reshape(batch, length, width))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))
