"""How hidden patches meet the encoder: drop, zero or token.

Shapes: B images, C channels, H x W pixels, N patches, K visible patches, P prefix tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mim.backbone import add_positions, grid_of, patch_size_of, run_blocks, supports_split
from mim.config import RegimeConfig
from mim.errors import UserError, setting_error
from mim.keys import seed_of
from mim.masks import PatchMask, key_bias
from mim.registry import Registry


@dataclass(frozen=True, eq=False)
class Latents:
    """What the encoder returns.

    Attributes:
        tokens: (B, P + T, D), prefix tokens first.
        patch_ids: (B, T) int64, which patch each of the other tokens belongs to; None means all N
            patches in order.
        valid: (B, T) bool, False where a shorter row is padded; None means no padding.
        num_prefix: P.
        num_patches: N.
        layers: the output of every block, each as ``tokens``; empty unless the regime collects.
    """

    tokens: Tensor
    num_prefix: int
    num_patches: int
    patch_ids: Tensor | None = None
    valid: Tensor | None = None
    layers: tuple[Tensor, ...] = ()

    @property
    def prefix(self) -> Tensor:
        """(B, P, D)."""
        return self.tokens[:, : self.num_prefix]

    @property
    def patches(self) -> Tensor:
        """(B, T, D)."""
        return self.tokens[:, self.num_prefix :]


def place_tokens(tokens: Tensor, ids: Tensor, valid: Tensor | None, fill: Tensor) -> Tensor:
    """Put tokens at their patches and ``fill`` everywhere else.

    Args:
        tokens: (B, T, D).
        ids: (B, T) patch of each token.
        valid: (B, T) bool, False for padding, which goes nowhere; None where there is none.
        fill: (B, N, D), what stands where no token belongs.

    Returns:
        (B, N, D).
    """
    count = fill.shape[1]
    if valid is not None:  # padding goes to a place behind the last patch, cut off below
        ids = torch.where(valid, ids, count)
        fill = torch.cat([fill, fill[:, :1]], dim=1)
    index = ids[..., None].expand(-1, -1, tokens.shape[-1])
    return fill.scatter(1, index, tokens.to(fill.dtype))[:, :count]


class Regime(nn.Module, ABC):
    """Encodes images under a mask with a backbone it does not own.

    Args:
        config: the settings under ``model.regime``.
        vit: the backbone, for its width and shapes; not kept.
        seed: own weights follow from it.
    """

    keeps_all_tokens: bool
    """Whether there is a token at every patch, so that any decoder can be used."""

    def __init__(self, config: RegimeConfig, vit: VisionTransformer, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.collects_layers = False
        self.num_layers = len(vit.blocks)

    def encode(
        self,
        vit: VisionTransformer,
        tokens: Tensor,
        *,
        bias: Tensor | None = None,
        num_keys: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """:func:`mim.backbone.run_blocks`, with every block's output where they are collected."""
        layers: list[Tensor] | None = [] if self.collects_layers else None
        tokens = run_blocks(
            vit,
            tokens,
            bias=bias,
            num_keys=num_keys,
            checkpointing=self.checkpointing,
            layers=layers,
        )
        return tokens, tuple(layers or ())

    @abstractmethod
    def inputs(
        self, vit: VisionTransformer, images: Tensor, mask: PatchMask
    ) -> tuple[Tensor, Tensor | None]:
        """What the blocks work on.

        Args:
            vit: the backbone.
            images: (B, C, H, W), normalised.
            mask: (B, N), what is hidden.

        Returns:
            tokens (B, P + T, D), embedded, and what is added to the scores of every layer, or None.
        """

    def forward(self, vit: VisionTransformer, images: Tensor, mask: PatchMask) -> Latents:
        """Encode (B, C, H, W) normalised images of which only the visible patches count."""
        tokens, bias = self.inputs(vit, images, mask)
        tokens, layers = self.encode(vit, tokens, bias=bias)
        return Latents(tokens, vit.num_prefix_tokens, mask.num_patches, layers=layers)

    def encoder_tokens(self, vit: VisionTransformer, visible: float) -> float:
        """Tokens a block of the encoder works on, with so many visible patches."""
        return vit.num_prefix_tokens + vit.patch_embed.num_patches


REGIMES: Registry[type[Regime]] = Registry("model.regime.name")


def _refuse_empty_rows(vit: VisionTransformer, mask: PatchMask) -> None:
    if vit.num_prefix_tokens == 0 and not mask.is_equal:
        if bool((mask.is_masked.all(dim=1)).any()):
            raise UserError(
                "mask: an image has every patch masked and the backbone has no prefix token, "
                "so nothing is left to attend to; lower mask.ratio or add a class token"
            )
    elif vit.num_prefix_tokens == 0 and mask.num_visible == 0:
        raise UserError(
            "mask: every patch is masked and the backbone has no prefix token, so nothing is "
            "left to attend to; lower mask.ratio or add a class token"
        )


def _with_prefix(valid: Tensor, prefix: int) -> Tensor:
    """(B, T) -> (B, P + T): prefix tokens are always read."""
    return torch.cat([valid.new_ones(len(valid), prefix), valid], dim=1)


def _embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Embedded patches as the backbone's position embedding expects them."""
    return vit.patch_embed(images)


def _replace(patches: Tensor, is_masked: Tensor, fill: Tensor | float) -> Tensor:
    """``fill`` at the masked patches of (B, N, D) or (B, rows, columns, D)."""
    flags = is_masked.view(*patches.shape[:-1], 1)
    return torch.where(flags, torch.as_tensor(fill, dtype=patches.dtype), patches)


@REGIMES.register("drop")
class Drop(Regime):
    """Only visible patches are encoded (MAE's encoder, He et al. 2021, arXiv:2111.06377)."""

    keeps_all_tokens = False

    def inputs(
        self, vit: VisionTransformer, images: Tensor, mask: PatchMask
    ) -> tuple[Tensor, Tensor | None]:
        """Prefix and visible patches; see :class:`Regime`."""
        _refuse_empty_rows(vit, mask)
        prefix = vit.num_prefix_tokens
        tokens = add_positions(vit, _embed(vit, images))  # (B, P + N, D)
        index = mask.visible_ids[..., None].expand(-1, -1, tokens.shape[-1])
        visible = tokens[:, prefix:].gather(1, index)  # (B, K, D)
        bias = None
        if mask.visible_valid is not None:
            # Padding holds zeros, so that not even an unread place depends on a masked patch.
            visible = visible.masked_fill(~mask.visible_valid[..., None], 0.0)
            bias = key_bias(_with_prefix(mask.visible_valid, prefix), tokens.dtype)
        return torch.cat([tokens[:, :prefix], visible], dim=1), bias  # (B, P + K, D)

    def forward(self, vit: VisionTransformer, images: Tensor, mask: PatchMask) -> Latents:
        """Encode the visible patches; see :class:`Regime`."""
        latents = super().forward(vit, images, mask)
        return replace(latents, patch_ids=mask.visible_ids, valid=mask.visible_valid)

    def encoder_tokens(self, vit: VisionTransformer, visible: float) -> float:
        """Prefix and visible patches."""
        return vit.num_prefix_tokens + visible


@REGIMES.register("zero")
class Zero(Regime):
    """Masked patches are set to zero and nobody attends to them (DeiT-style, full length).

    At prefix and visible positions its latents are those of ``drop``; in addition each masked
    position has a latent, computed by a query that reads prefix and visible tokens only.
    ``attention: split`` projects no keys of masked patches; ``dense`` adds -inf to their scores.
    """

    keeps_all_tokens = True

    def __init__(self, config: RegimeConfig, vit: VisionTransformer, seed: int = 0) -> None:
        super().__init__(config, vit, seed)
        if config.zero.attend_mask and config.zero.attention == "split" and not supports_split(vit):
            kind = type(vit.blocks[0]).__name__
            reason = f"needs plain timm blocks and this backbone has {kind}; choose dense"
            raise setting_error("model.regime.zero.attention", "split", reason)

    def inputs(
        self, vit: VisionTransformer, images: Tensor, mask: PatchMask
    ) -> tuple[Tensor, Tensor | None]:
        """All patches, and -inf for the keys of masked ones; see :class:`Regime`."""
        _refuse_empty_rows(vit, mask)
        if self.config.zero.at == "pixels":
            rows, columns = grid_of(vit)
            height, width = patch_size_of(vit)
            flags = mask.is_masked.view(-1, 1, rows, columns)
            flags = flags.repeat_interleave(height, 2).repeat_interleave(width, 3)
            patches = _embed(vit, images.masked_fill(flags, 0.0))
        else:
            patches = _replace(_embed(vit, images), mask.is_masked, 0.0)
        tokens = add_positions(vit, patches)  # (B, P + N, D)
        if not self.config.zero.attend_mask:
            return tokens, None
        readable = _with_prefix(~mask.is_masked, vit.num_prefix_tokens)
        return tokens, key_bias(readable, tokens.dtype)

    def forward(self, vit: VisionTransformer, images: Tensor, mask: PatchMask) -> Latents:
        """Encode all patches; see :class:`Regime`."""
        settings = self.config.zero
        if not settings.attend_mask or settings.attention == "dense":
            return super().forward(vit, images, mask)
        tokens, _ = self.inputs(vit, images, mask)
        tokens, layers = self._split(vit, tokens, mask)
        return Latents(tokens, vit.num_prefix_tokens, mask.num_patches, layers=layers)

    def _split(
        self, vit: VisionTransformer, tokens: Tensor, mask: PatchMask
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Order prefix, visible, masked, so that the keys are a slice; then order back."""
        prefix = vit.num_prefix_tokens
        patches = tokens[:, prefix:]  # (B, N, D)
        ids = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)  # (B, K + M)
        index = ids[..., None].expand(-1, -1, patches.shape[-1])
        ordered = torch.cat([tokens[:, :prefix], patches.gather(1, index)], dim=1)
        bias = valid = None
        if mask.visible_valid is not None and mask.masked_valid is not None:
            bias = key_bias(_with_prefix(mask.visible_valid, prefix), tokens.dtype)
            valid = torch.cat([mask.visible_valid, mask.masked_valid], dim=1)

        def back(ordered: Tensor) -> Tensor:
            out = ordered[:, prefix:]
            fill = out.new_zeros(len(out), mask.num_patches, out.shape[-1])
            return torch.cat([ordered[:, :prefix], place_tokens(out, ids, valid, fill)], dim=1)

        ordered, layers = self.encode(vit, ordered, bias=bias, num_keys=prefix + mask.num_visible)
        return back(ordered), tuple(back(layer) for layer in layers)


@REGIMES.register("token")
class Token(Regime):
    """Masked patches become a learned token that everybody attends to (SimMIM, arXiv:2111.09886).

    Attributes:
        mask_token: (1, 1, D).
    """

    keeps_all_tokens = True

    def __init__(self, config: RegimeConfig, vit: VisionTransformer, seed: int = 0) -> None:
        super().__init__(config, vit, seed)
        generator = torch.Generator().manual_seed(seed_of(seed, "regime.mask_token"))
        values = torch.randn(1, 1, vit.embed_dim, generator=generator) * 0.02
        self.mask_token = nn.Parameter(values)

    def inputs(
        self, vit: VisionTransformer, images: Tensor, mask: PatchMask
    ) -> tuple[Tensor, Tensor | None]:
        """All patches, the mask token at masked ones; see :class:`Regime`."""
        patches = _replace(_embed(vit, images), mask.is_masked, self.mask_token[0, 0])
        return add_positions(vit, patches), None


def build_regime(config: RegimeConfig, vit: VisionTransformer, seed: int = 0) -> Regime:
    """The regime that ``config`` names.

    Raises:
        UserError: if the name is unknown or the backbone does not fit.
    """
    return REGIMES.get(config.name)(config, vit, seed)
