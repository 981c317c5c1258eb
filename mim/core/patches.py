"""Images to patches and back; images of several sizes as padded patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mim.core.device import to_device

Grid: TypeAlias = tuple[int, int]


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


def patches_at(images: Tensor, patch_size: tuple[int, int], ids: Tensor) -> Tensor:
    """Some patches of each image, as :func:`patchify` cuts them; the others are not copied.

    Args:
        images: (B, C, H, W) with H and W divisible by the patch.
        patch_size: (height, width) of a patch in pixels.
        ids: (B, T) int64, which patches.

    Returns:
        (B, T, P).
    """
    return _cut(images, ids, *patch_size)


# An operation of its own, since torch.compile on a CPU would cut value by value, and once for each
# use: a tenth of a step.
@torch.library.custom_op("mim::patches_at", mutates_args=())
def _cut(images: Tensor, ids: Tensor, p: int, q: int) -> Tensor:
    batch, channels, height, width = images.shape
    columns = width // q
    places = torch.arange(height * columns, device=images.device)
    # The image's rows of q pixels, one below the other, and which of them each patch holds.
    pieces = places.view(height // p, p, columns).transpose(1, 2).reshape(-1, p)  # (N, p)
    planes = torch.arange(batch * channels, device=images.device).view(batch, 1, channels, 1)
    pieces = pieces[ids][:, :, None] + planes * len(places)  # (B, T, C, p)
    rows = images.reshape(-1, q).index_select(0, pieces.flatten())
    return rows.view(*ids.shape, channels, p * q).transpose(2, 3).flatten(2)


@_cut.register_fake
def _(images: Tensor, ids: Tensor, p: int, q: int) -> Tensor:
    return images.new_empty(*ids.shape, images.shape[1] * p * q)


def _note_cut(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, p, q = inputs
    ctx.save_for_backward(ids)
    ctx.form = (images.shape, p, q)


def _uncut(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (ids,) = ctx.saved_tensors
    (batch, _, height, width), p, q = ctx.form
    grid = (height // p, width // q)
    whole = gradient.new_zeros(batch, grid[0] * grid[1], gradient.shape[-1])
    whole = whole.scatter_add(1, ids[..., None].expand_as(gradient), gradient)
    return unpatchify(whole, (p, q), grid), None, None, None


_cut.register_autograd(_uncut, setup_context=_note_cut)


def values_at(values: Tensor, ids: Tensor) -> Tensor:
    """What stands at some patches: (B, N, D) and ids (B, T) int64 -> (B, T, D)."""
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify`: (B, N, P) -> (B, C, H, W).

    Args:
        patches: (B, N, P).
        patch_size: (height, width) of a patch in pixels.
        grid: (rows, columns) of patches.
    """
    p, q = patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=q, h=grid[0])


@dataclass(frozen=True, eq=False)
class Patches:
    """Images of several sizes, cut into patches; shorter ones are padded to the longest.

    Args:
        values: (B, N, P), patches as :func:`patchify` gives them; padding stands last and holds 0.
        grids: (rows, columns) of each image.

    Attributes:
        valid: (B, N) bool, False for padding.
        coords: (B, N, 2) int64, row and column of each patch; 0 for padding.

    Raises:
        ValueError: if an image has more patches than N, or there are not as many grids as images.
    """

    values: Tensor
    grids: tuple[Grid, ...]
    valid: Tensor
    coords: Tensor

    @classmethod
    def of(cls, values: Tensor, grids: Sequence[Grid]) -> Patches:
        """From padded values (B, N, P) and the grid of each image."""
        images, longest = values.shape[:2]
        if len(grids) != images or max((r * c for r, c in grids), default=0) > longest:
            raise ValueError(f"{images} images of {longest} patches at most have other grids")
        sizes = torch.tensor(grids, dtype=torch.int64).view(-1, 2)
        sizes = to_device(sizes, values.device)
        places = torch.arange(longest, device=values.device).expand(images, -1)  # (B, N)
        valid = places < sizes.prod(dim=1, keepdim=True)
        columns = sizes[:, 1:]
        coords = torch.stack([places // columns, places % columns], dim=-1)  # (B, N, 2)
        return cls(values, tuple(grids), valid, coords * valid[..., None])

    @classmethod
    def pad(cls, images: Sequence[Tensor], grids: Sequence[Grid]) -> Patches:
        """From the patches (N_i, P) of each image."""
        longest = max(len(image) for image in images)
        padded = [F.pad(image, (0, 0, 0, longest - len(image))) for image in images]
        return cls.of(torch.stack(padded), grids)

    @classmethod
    def cat(cls, parts: Sequence[Patches]) -> Patches:
        """Several batches as one."""
        longest = max(part.values.shape[1] for part in parts)
        values = [F.pad(p.values, (0, 0, 0, longest - p.values.shape[1])) for p in parts]
        return cls.of(torch.cat(values), [grid for part in parts for grid in part.grids])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Patches:
        """A slice of the images; its padding stays."""
        moved = (value[rows] for value in (self.values, self.valid, self.coords))
        values, valid, coords = moved
        return Patches(values, self.grids[rows], valid, coords)

    @property
    def device(self) -> torch.device:
        """Where the patches are."""
        return self.values.device

    @property
    def lengths(self) -> list[int]:
        """Patches of each image."""
        return [rows * columns for rows, columns in self.grids]

    def with_values(self, values: Tensor) -> Patches:
        """The same places with other values (B, N, ...); padding stays 0."""
        return replace(self, values=values.masked_fill(~self.valid[..., None], 0))

    def left_out(self, images: Tensor) -> Patches:
        """With 0 in all of some images, (B,) bool."""
        return replace(self, values=self.values.masked_fill(images[:, None, None], 0))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Patches:
        """The same on another device."""
        tensors = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("values", "valid", "coords")
        }
        return replace(self, **tensors)

    def pin_memory(self) -> Patches:
        """The same in page-locked memory."""
        tensors = {n: getattr(self, n).pin_memory() for n in ("values", "valid", "coords")}
        return replace(self, **tensors)

    def images(self, patch_size: tuple[int, int]) -> list[Tensor]:
        """Each image as (C, H, W)."""
        return [
            unpatchify(values[None, : grid[0] * grid[1]], patch_size, grid)[0]
            for values, grid in zip(self.values, self.grids, strict=True)
        ]


Images: TypeAlias = Tensor | Patches
"""(B, C, H, W) of one size, or images of several sizes."""
