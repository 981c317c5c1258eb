"""timm's Swin, first and second version: windows that shift, patches that merge."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from mim.core.errors import setting_error
from mim.model.backbones.family import Embedded, Grid, Merging, RegimeTraits, register_family


@register_family(SwinTransformer, SwinTransformerV2)
class Swin(Merging):
    """Swin (Liu et al. 2021, arXiv:2103.14030; 2022, arXiv:2111.09883) as SimMIM pre-trains it.

    A mask hides squares of the final stride (32 pixels for patches of 4 and four stages), so that
    each latent, a place of the last feature map, stands for one; the mask token stands at all
    patches of a hidden square before the first block. The shifted windows bring their own
    attention masks through timm's blocks, and timm pads where a window does not divide the map.
    """

    @property
    def _merged(self) -> int:
        """Patches that one place of the last map covers in each direction."""
        return 2 ** (len(self.vit.layers) - 1)

    @property
    def grid(self) -> Grid:
        rows, columns = self.vit.patch_embed.grid_size
        return rows // self._merged, columns // self._merged

    @property
    def patch_size(self) -> Grid:
        height, width = self.vit.patch_embed.patch_size
        return height * self._merged, width * self._merged

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.vit.layers for block in stage.blocks]

    @property
    def stages(self) -> list[nn.Module]:
        return [part for stage in self.vit.layers for part in (stage.downsample, *stage.blocks)]

    def length(self, patches: float) -> float:
        return patches * self._merged**2

    def refusal(self) -> str | None:
        if type(self.vit.patch_embed) is PatchEmbed:
            return None
        return f"embeds patches by {type(self.vit.patch_embed).__name__}, which may mix patches"

    def check(self, regime: RegimeTraits) -> None:
        """Refuse what drops tokens or needs a mask other than the windows' own."""
        super().check(regime)
        if not regime.keeps_all_tokens:
            reason = f"leaves tokens out, and the windows of a {self.kind} need the whole grid; "
            reason += "choose token"
            raise setting_error("model.regime.name", regime.name, reason)
        if regime.hides_keys:
            reason = f"needs keys that nobody reads, and a window of a {self.kind} that is hidden "
            reason += "as a whole would have nothing to read; choose the regime token, or false"
            raise setting_error(*(regime.hidden_by or ("model.regime.name", regime.name)), reason)
        if regime.order != "bidirectional":
            reason = f"is not possible in the windows of a {self.kind}"
            raise setting_error("model.regime.order", regime.order, reason)

    def embed(self, images: Tensor, is_masked: Tensor | None = None) -> Tensor:
        return self.vit.patch_embed(images)  # (B, rows, columns, D)

    def hide(self, patches: Tensor, is_masked: Tensor, fill: Tensor | float) -> Tensor:
        return super().hide(patches, spread(is_masked.view(-1, *self.grid), self._merged), fill)

    def place(self, patches: Tensor) -> Embedded:
        return Embedded(patches)  # positions stand in the windows' attention alone

    def run(self, embedded: Embedded, **options: Any) -> Tensor:
        x = super().run(embedded, **options)
        return self.vit.norm(x).flatten(1, 2) if options.get("stop") is None else x  # row by row

    def features(self, images: Tensor) -> Tensor:
        return self.vit.forward_features(images).flatten(1, 2)


def spread(units: Tensor, times: int | Grid) -> Tensor:
    """Repeat (B, rows, columns) of units ``times`` in each direction, for their patches."""
    down, across = (times, times) if isinstance(times, int) else times
    return units.repeat_interleave(down, 1).repeat_interleave(across, 2)
