"""timm's Hiera: patches that merge inside mask units, whole units dropped."""

from __future__ import annotations

from timm.models.hiera import Hiera
from torch import Tensor, nn

from mim.core.errors import UserError, setting_error
from mim.model.backbones.family import Embedded, Grid, Merging, RegimeTraits, register_family
from mim.model.backbones.swin import spread


@register_family(Hiera)
class HieraFamily(Merging):
    """Hiera (Ryali et al. 2023, arXiv:2306.00989): a mask hides its mask units.

    Early blocks attend inside a unit and each unit ends as one token, so that units can be left
    out. Embedded patches overlap (7 x 7 pixels every 4): pixels of hidden units are 0 before they
    are embedded, as in timm's own masked forward, in every regime.
    """

    takes_padding = False

    @property
    def grid(self) -> Grid:
        rows, columns = self.vit.mask_spatial_shape
        return int(rows), int(columns)

    @property
    def patch_size(self) -> Grid:
        (high, wide), (down, across) = self.vit.patch_stride, self.vit.mask_unit_size
        return int(high * down), int(wide * across)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.vit.blocks)

    @property
    def pool_norm(self) -> nn.Module:
        return self.vit.head.norm

    def length(self, patches: float) -> float:
        return patches * self.vit.mu_size

    def refusal(self) -> str | None:
        vit = self.vit
        ends = tuple(stride**vit.q_pool for stride in vit.q_stride)
        if tuple(vit.mask_unit_size) != ends or vit.q_pool != len(vit.stage_ends) - 1:
            units = " x ".join(map(str, vit.mask_unit_size))
            return f"has mask units of {units} that do not end as one token each"
        return None

    def check(self, regime: RegimeTraits) -> None:
        """Refuse masks and orders, which its attention does not take."""
        super().check(regime)
        if regime.hides_keys:
            reason = "needs keys that nobody reads, and the attention of a Hiera takes no mask; "
            reason += "choose the regime drop or token, or false"
            raise setting_error(*(regime.hidden_by or ("model.regime.name", regime.name)), reason)
        if regime.order != "bidirectional":
            reason = "is not possible: the attention of a Hiera takes no mask"
            raise setting_error("model.regime.order", regime.order, reason)

    def embed(self, images: Tensor, is_masked: Tensor | None = None) -> Tensor:
        if is_masked is not None:
            images = self.hide_pixels(images, is_masked)
        return self.vit.patch_embed(images)  # (B, tokens, D)

    def hide(self, patches: Tensor, is_masked: Tensor, fill: Tensor | float) -> Tensor:
        units = spread(is_masked.view(-1, *self.grid), self.vit.mask_unit_size)
        return super().hide(patches, units.flatten(1), fill)

    def place(self, patches: Tensor) -> Embedded:
        """Add positions, and order the tokens so that units stand side by side."""
        return Embedded(self.vit.unroll(self.vit._pos_embed(patches)))

    def take(self, embedded: Embedded, ids: Tensor, valid: Tensor | None = None) -> Embedded:
        """Take whole units; a ``UserError`` where images show different numbers of them."""
        if valid is not None:
            raise UserError(
                "mask: images of a batch show different numbers of mask units, and the attention "
                "of a Hiera takes no mask for padding; use one ratio for all"
            )
        units = embedded.tokens.unflatten(1, (self.vit.mu_size, -1))  # (B, tokens, N, D)
        index = ids[:, None, :, None].expand(-1, units.shape[1], -1, units.shape[-1])
        return Embedded(units.gather(2, index).flatten(1, 2))
