"""Targets of small images, and a teacher whose features are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mim.core.config import TargetConfig
from mim.core.patches import patchify
from mim.model.targets import Target, TargetContext, build_target

Make = Callable[..., Target]


class KnownTeacher:
    """Block k's features are the patches' pixels, repeated to the width, to the power k + 1."""

    def __init__(self, context: TargetContext) -> None:
        self.context = context

    def layers(self, images: Tensor) -> list[Tensor]:
        patches = patchify(images, self.context.patch_size)
        copies = -(-self.context.width // patches.shape[-1])
        tokens = patches.repeat(1, 1, copies)[..., : self.context.width]
        return [tokens ** (k + 1) for k in range(self.context.depth)]

    def mlp_outputs(self, images: Tensor) -> list[Tensor]:
        return [tokens + 1 for tokens in self.layers(images)]

    def tokens(self, images: Tensor) -> Tensor:
        return self.layers(images)[0]


@pytest.fixture
def make() -> Make:
    """``make(name, patch, channels, grid, **settings)``."""

    def build(
        name: str,
        patch: tuple[int, int] = (2, 2),
        channels: int = 1,
        grid: tuple[int, int] = (2, 2),
        *,
        width: int = 12,
        depth: int = 4,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        has_class_token: bool = False,
        **settings: Any,
    ) -> Target:
        context = TargetContext(patch, channels, grid, width, depth, mean, std, has_class_token)
        return build_target(TargetConfig(name=name, **settings), context)

    return build


@pytest.fixture
def teach() -> Callable[[Target], KnownTeacher]:
    """A teacher for a target."""
    return lambda target: KnownTeacher(target.context)


@pytest.fixture
def images_of() -> Callable[..., Tensor]:
    """Random images that fit a target."""

    def draw(target: Target, count: int = 2, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = (count, target.context.channels, *target.context.image_size)
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return draw
