"""Masks: which patches are hidden, how they are chosen, and who may attend to whom."""

from mim.masks.attention import key_bias
from mim.masks.generators import (
    MASKS,
    MaskGenerator,
    build_mask_generator,
    hidden_count,
    sample_masks,
)
from mim.masks.patch_mask import PatchMask

__all__ = [
    "MASKS",
    "MaskGenerator",
    "PatchMask",
    "build_mask_generator",
    "hidden_count",
    "key_bias",
    "sample_masks",
]
