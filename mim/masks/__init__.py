"""Masks: which patches are hidden, how they are chosen, and who may attend to whom."""

# The modules of generators are imported for their registration.
from mim.masks import file, guided, patterns
from mim.masks.generators import (
    MASKS,
    MaskGenerator,
    build_mask_generator,
    hidden_count,
    sample_masks,
)
from mim.masks.patch_mask import PatchMask
from mim.masks.statistics import mask_statistics

__all__ = [
    "MASKS",
    "MaskGenerator",
    "PatchMask",
    "build_mask_generator",
    "file",
    "guided",
    "hidden_count",
    "mask_statistics",
    "patterns",
    "sample_masks",
]
