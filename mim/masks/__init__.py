"""Masks: which patches are hidden, how they are chosen, and who may attend to whom."""

from mim.masks.file import FileMask
from mim.masks.generators import (
    MASKS,
    MaskGenerator,
    build_mask_generator,
    hidden_count,
    repeat_keys,
    sample_masks,
)
from mim.masks.guided import AttentionMask, LearnedMask
from mim.masks.patch_mask import PatchMask
from mim.masks.patterns import (
    AlignedMask,
    BlockMask,
    ColumnMask,
    GridMask,
    InverseBlockMask,
    MultiblockMask,
    RowMask,
)
from mim.masks.squares import SquaresMask
from mim.masks.statistics import mask_statistics
from mim.masks.target_blocks import TargetBlocksMask

__all__ = [
    "MASKS",
    "AlignedMask",
    "AttentionMask",
    "BlockMask",
    "ColumnMask",
    "FileMask",
    "GridMask",
    "InverseBlockMask",
    "LearnedMask",
    "MaskGenerator",
    "MultiblockMask",
    "PatchMask",
    "RowMask",
    "SquaresMask",
    "TargetBlocksMask",
    "build_mask_generator",
    "hidden_count",
    "mask_statistics",
    "repeat_keys",
    "sample_masks",
]
