"""Images at their own aspect ratio: resized to whole patches within a budget, padded in a batch.

An image keeps its proportions up to the rounding to whole patches, and is never enlarged by more
than that; one of more than ``data.max_patches`` patches is made smaller. The training augmentation
is a crop of the image's own proportions and a mirror image, both drawn from the image's key, so
that an image is cut alike whatever batch, worker or process it is in.

The size is that of timm's NaFlex loaders (SigLIP 2, arXiv:2502.14786; NaViT, arXiv:2307.06304).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data.naflex_transforms import get_image_size_for_seq
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import setting_error
from mim.core.patches import Grid, Images, Patches, patchify
from mim.core.rng import uniforms
from mim.data.images.transforms import (
    Picture,
    cut_out,
    dtype_of,
    prepare,
    resize,
    resizer,
    size_of,
)


def own_grid(height: int, width: int, patch: Grid, max_patches: int) -> Grid:
    """(rows, columns) of patches of an image, at most ``max_patches``; sizes are in pixels."""
    _, (tall, wide) = get_image_size_for_seq((height, width), patch, max_patches, max_ratio=1.0)
    return tall // patch[0], wide // patch[1]


def _cut(
    image: Picture, box: tuple[int, int, int, int], mirrored: bool, config: DataConfig, patch: Grid
) -> tuple[Tensor, Grid]:
    """The patches (N, P) of a box of an image, and their grid."""
    grid = own_grid(box[2], box[3], patch, config.max_patches)
    size = grid[0] * patch[0], grid[1] * patch[1]
    pixels = resize(cut_out(image, box), size, resizer(config))
    if mirrored:
        pixels = pixels[:, ::-1]
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)  # (C, H, W)
    return patchify(planes[None], patch)[0], grid


def train_patches(
    images: Sequence[Picture], keys: Tensor, config: DataConfig, patch: Grid, names: Sequence[str]
) -> Patches:
    """The training images of one batch of any sizes and modes, by their keys (B,) int64.

    ``patch`` is in pixels, and ``names`` are what messages call the images.

    Raises:
        UserError: if an image is smaller than a patch; names it.
    """
    if config.augment == "none":
        return eval_patches(images, config, patch, names)
    draws = uniforms(keys, 4).tolist()  # (B, 4): area, top, left, mirror
    low, high = config.crop_scale
    cut = []
    for image, (area, down, right, mirror), name in zip(images, draws, names, strict=True):
        upright, height, width = _upright(image, config, patch, name)
        side = (low + (high - low) * area) ** 0.5  # the same share of each side
        tall = max(round(height * side), patch[0])
        wide = max(round(width * side), patch[1])
        box = (int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide)
        cut.append(_cut(upright, box, config.flip and mirror < 0.5, config, patch))
    return _batch(cut, dtype_of(images), config, patch)


def eval_patches(
    images: Sequence[Picture], config: DataConfig, patch: Grid, names: Sequence[str]
) -> Patches:
    """Uncropped images, resized to whole patches; arguments as :func:`train_patches`."""
    cut = []
    for image, name in zip(images, names, strict=True):
        upright, height, width = _upright(image, config, patch, name)
        cut.append(_cut(upright, (0, 0, height, width), False, config, patch))
    return _batch(cut, dtype_of(images), config, patch)


def _batch(
    cut: list[tuple[Tensor, Grid]], dtype: torch.dtype, config: DataConfig, patch: Grid
) -> Patches:
    if not cut:  # every image was unreadable
        empty = torch.zeros(0, 1, patch[0] * patch[1] * config.channels, dtype=torch.uint8)
        return Patches.of(empty, ())
    return Patches.pad([same_scale(values, dtype) for values, _ in cut], [grid for _, grid in cut])


def same_scale(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images with the type of their batch: bytes, or float32 from 0 to 1."""
    if images.dtype == dtype:
        return images
    return images.float() / 255


def cat_images(parts: Sequence[Images]) -> Images:
    """Several batches of the same kind as one."""
    patches = [part for part in parts if isinstance(part, Patches)]
    if patches:
        dtype = max((part.values.dtype for part in patches), key=lambda kind: kind.itemsize)
        return Patches.cat([p.with_values(same_scale(p.values, dtype)) for p in patches])
    images = [part for part in parts if isinstance(part, Tensor)]
    dtype = max((part.dtype for part in images), key=lambda kind: kind.itemsize)
    return torch.cat([same_scale(part, dtype) for part in images])


def _upright(
    image: Picture, config: DataConfig, patch: Grid, name: str
) -> tuple[Picture, int, int]:
    """The image with ``data.channels`` channels, its height and its width."""
    upright = prepare(image, config.channels)
    height, width = size_of(upright)
    if height < patch[0] or width < patch[1]:
        size = f"{name} has {height} x {width} pixels, less than a patch of {patch[0]} x {patch[1]}"
        reason = f"keeps sizes, and {size}; leave it out, take smaller patches, or choose square"
        raise setting_error("data.aspect", "keep", reason)
    return upright, height, width
