"""timm's NaFlexVit: a ViT for images of any size (NaViT, arXiv:2307.06304; SigLIP 2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from mim.core.patches import Patches, patchify
from mim.model.backbones.family import Embedded, Grid, Transformer, register_family
from mim.model.backbones.plain import PlainViT
from mim.model.backbones.rotary import RotaryViT


class _Rotary(RotaryViT):
    """The blocks of a NaFlexVit with rotary positions, whose rotation is one of each image."""

    def _rotation(self, index: int, embedded: Embedded) -> Tensor | None:
        if embedded.rotation is None or not self.vit.rope_is_mixed:
            return embedded.rotation
        return embedded.rotation[index]


@register_family(NaFlexVit)
class NaFlexViT(Transformer):
    """Positions are learned, factorised or rotary, interpolated by timm to the grid of each image.

    Images of one size are the case in which all grids are equal.
    """

    takes_fixed_positions = False
    takes_sizes = True

    def __init__(self, vit: Any) -> None:
        super().__init__(vit)
        # A model with gates or SwiGLU has EVA's blocks, even without a rotation.
        self._inner: PlainViT | RotaryViT = PlainViT(vit)
        if isinstance(vit.blocks[0], EvaBlock):
            self._inner = _Rotary(vit)
        # EVA's blocks expect one prefix a sequence.
        self.packs = isinstance(self._inner, PlainViT)

    @property
    def grid(self) -> Grid:
        height, width = self.vit.image_size
        return height // self.patch_size[0], width // self.patch_size[1]

    @property
    def patch_size(self) -> Grid:
        height, width = self.vit.embeds.patch_size
        return int(height), int(width)

    @property
    def has_class_token(self) -> bool:
        return self.vit.embeds.cls_token is not None

    @property
    def splits(self) -> bool:
        return self._inner.splits

    def refusal(self) -> str | None:
        embeds = self.vit.embeds
        if not embeds.is_linear or not embeds.channels_last:
            return "must embed patches of pixels by a linear map (embed_proj_type=linear)"
        if self.vit.patch_drop is not None:
            return "drops patches by itself (patch_drop_rate); that is mask.ratio"
        return None

    def embed(self, images: Tensor, is_masked: Tensor | None = None) -> Tensor:
        return self._project(patchify(images, self.patch_size))

    def embed_patches(self, images: Patches) -> Tensor:
        return self._project(images.values)

    def _project(self, patches: Tensor) -> Tensor:
        embeds = self.vit.embeds
        if embeds.norm_input is not None:
            patches = embeds.norm_input(patches)
        return embeds.norm(embeds.proj(patches))

    def place(self, patches: Tensor) -> Embedded:
        return self.place_patches(patches, Patches.of(patches.detach(), [self.grid] * len(patches)))

    def place_patches(self, patches: Tensor, images: Patches) -> Embedded:
        """Add positions by timm's own functions, which add in place."""
        embeds, coords = self.vit.embeds, images.coords
        way = "_grid_sample" if embeds.pos_embed_use_grid_sample else ""
        tokens = patches.clone()
        if embeds.pos_embed_type != "none":
            add = getattr(embeds, f"_apply_{embeds.pos_embed_type}_naflex_pos_embed{way}")
            add(tokens, patch_coord=coords)
        prefix = (embeds.cls_token, embeds.reg_token)
        front = [token.expand(len(tokens), -1, -1) for token in prefix if token is not None]
        tokens = embeds.pos_drop(torch.cat([*front, tokens], dim=1))
        if self.vit.rope is None:
            return Embedded(tokens)
        rotation = self.vit._generate_rope_naflex(tokens, coords)  # (B, 1, N, R)
        if self.vit.rope_is_mixed:
            rotation = torch.stack(list(rotation))  # (blocks, B, heads, N, R)
        return Embedded(tokens, rotation)

    def take(self, embedded: Embedded, ids: Tensor, valid: Tensor | None = None) -> Embedded:
        taken, rotation = super().take(embedded, ids, valid), embedded.rotation
        if rotation is None:
            return taken
        index = ids[:, None, :, None].expand(-1, rotation.shape[-3], -1, rotation.shape[-1])
        index = index.expand(*rotation.shape[:-2], *index.shape[-2:])
        return replace(taken, rotation=rotation.gather(-2, index))

    def step(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        return self._inner.step(index, x, embedded)

    def attention(self, index: int, x: Tensor, embedded: Embedded) -> Tensor:
        return self._inner.attention(index, x, embedded)
