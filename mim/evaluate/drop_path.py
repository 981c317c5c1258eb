"""Drop path whose draws follow from the images, however many processes share a batch.

Shapes: B images.
"""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from mim.core.rng import image_keys, uniforms
from mim.data import Batch


class DropPathDraws:
    """What the drop paths of a model draw for the present images: (B, count) in [0, 1)."""

    def __init__(self) -> None:
        self.count = 0
        self.values: Tensor | None = None

    def draw(self, batch: Batch, seed: int) -> Tensor:
        """(B, count) from the keys of a batch's images, on the CPU."""
        keys = image_keys(seed, batch.epoch, batch.sample_ids, purpose="drop-path")
        return uniforms(keys, self.count)


class KeyedDropPath(DropPath):
    """timm's DropPath whose draws are given; without any it is timm's own."""

    def __init__(self, plain: DropPath, draws: DropPathDraws, column: int) -> None:
        super().__init__(plain.drop_prob, plain.scale_by_keep)
        self.draws, self.column = draws, column

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> the same, some rows 0."""
        values = self.draws.values
        if not self.training or self.drop_prob == 0 or values is None:
            kept_by_timm: Tensor = super().forward(x)
            return kept_by_timm
        keep = 1 - self.drop_prob
        kept = (values[:, self.column] < keep).to(x.dtype)
        if self.scale_by_keep:
            kept = kept / keep
        return x * kept.view(-1, *[1] * (x.ndim - 1))


def key_drop_paths(model: nn.Module) -> DropPathDraws:
    """Puts a :class:`KeyedDropPath` in the place of each drop path; returns what feeds them."""
    draws = DropPathDraws()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath):
                setattr(module, name, KeyedDropPath(child, draws, draws.count))
                draws.count += 1
    return draws


def draws_of(model: nn.Module) -> DropPathDraws | None:
    """What feeds the drop paths of a model that :func:`key_drop_paths` has seen; None without."""
    found = (module.draws for module in model.modules() if isinstance(module, KeyedDropPath))
    return next(found, None)
