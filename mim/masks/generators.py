"""Mask generators: pure functions of the grid and one key an image.

The number of hidden patches is ``hidden_count(ratio, N) = floor(ratio * N + 0.5)``, computed in
float64: the nearest integer, halves up. Every generator uses this one rule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mim.config import MaskConfig
from mim.errors import setting_error
from mim.keys import image_keys, random_bits, uniforms
from mim.masks.patch_mask import PatchMask
from mim.registry import Registry

Grid = tuple[int, int]


def hidden_count(ratio: float, patches: int) -> int:
    """How many of ``patches`` a ratio hides: the nearest integer, halves up."""
    return math.floor(ratio * patches + 0.5)


class MaskGenerator(ABC):
    """Draws masks.

    Args:
        config: the settings under ``mask``.
    """

    def __init__(self, config: MaskConfig) -> None:
        self.config = config

    @abstractmethod
    def __call__(self, grid: Grid, keys: Tensor) -> PatchMask:
        """Masks for images with the given keys.

        Args:
            grid: (rows, columns) of patches.
            keys: (B,) int64 from :func:`mim.keys.image_keys`; there are no masks without keys.
        """

    def check(self, grid: Grid) -> None:
        """Refuse settings that make no sense on this grid.

        Raises:
            UserError: if the ratio would hide no patch, or all of them.
        """
        patches = grid[0] * grid[1]
        for ratio in self.config.ratio_range:
            hidden = hidden_count(ratio, patches)
            if not 0 < hidden < patches:
                which = "no patch" if hidden == 0 else "every patch"
                reason = f"hides {which} of a grid of {grid[0]} x {grid[1]}"
                raise setting_error("mask.ratio", ratio, reason)

    def hidden_counts(self, grid: Grid, keys: Tensor) -> Tensor | int:
        """How many patches each image hides: an int where all hide as many, else (B,) int64."""
        patches = grid[0] * grid[1]
        low, high = self.config.ratio_range
        if hidden_count(low, patches) == hidden_count(high, patches):
            return hidden_count(low, patches)
        drawn = low + (high - low) * uniforms(keys, 1, stream=1)[:, 0]  # (B,)
        return torch.floor(drawn * patches + 0.5).long()


MASKS: Registry[type[MaskGenerator]] = Registry("mask.name")


@MASKS.register("random")
class RandomMask(MaskGenerator):
    """Hides patches uniformly at random, without replacement (MAE, arXiv:2111.06377)."""

    def __call__(self, grid: Grid, keys: Tensor) -> PatchMask:
        noise = random_bits(keys, grid[0] * grid[1])  # (B, N)
        ranks = noise.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
        return PatchMask.from_ranks(ranks, self.hidden_counts(grid, keys))


def build_mask_generator(config: MaskConfig, grid: Grid | None = None) -> MaskGenerator:
    """The generator that ``config`` names, checked against the grid where one is given.

    Raises:
        UserError: if the name is unknown or the settings do not fit the grid.
    """
    generator = MASKS.get(config.name)(config)
    if grid is not None:
        generator.check(grid)
    return generator


def sample_masks(
    config: MaskConfig,
    grid: Grid,
    *,
    seed: int,
    epoch: int,
    sample_ids: Tensor | list[int],
) -> PatchMask:
    """The masks that training uses for these images in this epoch.

    Args:
        config: the settings under ``mask``.
        grid: (rows, columns) of patches.
        seed: the run's seed.
        epoch: the pass over the data.
        sample_ids: (B,) stable ids of the images.

    Returns:
        A mask of B rows; a pure function of the arguments, on any device and in any batch.
    """
    generator = build_mask_generator(config, grid)
    return generator(grid, image_keys(seed, epoch, sample_ids, purpose="mask"))
