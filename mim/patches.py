"""Images to patches and back."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, row by row; within a patch: row, column, channel (MAE's order).

    Args:
        images: (B, C, H, W) with H and W divisible by the patch.
        patch_size: (height, width) of a patch in pixels.

    Returns:
        (B, N, P) with N = rows * columns and P = patch pixels * C.
    """
    p, q = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`: (B, N, P) -> (B, C, H, W).

    Args:
        patches: (B, N, P).
        patch_size: (height, width) of a patch in pixels.
        grid: (rows, columns) of patches.
    """
    p, q = patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=q, h=grid[0])
