"""What a batch of masks looks like, in numbers."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from mim.masks.generators import Grid
from mim.masks.patch_mask import PatchMask


class MaskStatistics(TypedDict):
    ratio_mean: float
    ratio_min: float
    ratio_max: float
    block_sizes: dict[int, int]
    hidden_share: Tensor


def mask_statistics(mask: PatchMask, grid: Grid) -> MaskStatistics:
    """Measure how much is hidden, in blocks of what size, and where.

    Returns:
        ``ratio_mean``, ``ratio_min``, ``ratio_max``: share of hidden patches over the images;
        ``block_sizes``: number of blocks of each size in all images, by ascending size; a block is
        a set of hidden patches that share sides (4-neighbourhood);
        ``hidden_share``: (rows, columns) float64, the share of the images that hide each patch.

    Raises:
        ValueError: if the grid has not as many patches as the mask.
    """
    from scipy import ndimage  # slow to import, and only pictures need it

    rows, cols = grid
    if rows * cols != mask.num_patches:
        raise ValueError(f"a grid of {rows} x {cols} has not {mask.num_patches} patches")
    hidden = mask.is_masked.cpu()  # (B, N)
    ratios = hidden.double().mean(dim=1)
    sides = np.zeros((3, 3, 3), dtype=bool)  # images are no neighbours
    sides[1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(hidden.view(-1, rows, cols).numpy(), structure=sides)
    sizes, counts = np.unique(np.bincount(labels.ravel())[1:], return_counts=True)
    return {
        "ratio_mean": float(ratios.mean()),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
        "block_sizes": {int(s): int(c) for s, c in zip(sizes, counts, strict=True)},
        "hidden_share": hidden.to(torch.float64).mean(dim=0).view(rows, cols),
    }
