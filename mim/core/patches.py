"""Images to patches and back; images of different sizes as padded patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mim.core.device import to_device

Grid: TypeAlias = tuple[int, int]


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut (B, C, H, W) images into patches (B, N, P), row by row.

    The order within a patch is row, column, channel, as in MAE; H and W are divisible by the patch,
    whose size is (height, width) in pixels.
    """
    p, q = patch_size
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)


def patches_at(images: Tensor, patch_size: tuple[int, int], ids: Tensor) -> Tensor:
    """Cut the patches ``ids`` (B, T) only, as :func:`patchify` does: (B, T, P)."""
    return _cut(images, ids, *patch_size)


# An operation of its own, since torch.compile on a CPU would cut value by value, and once for each
# use: a tenth of a step.
@torch.library.custom_op("mim::patches_at", mutates_args=())
def _cut(images: Tensor, ids: Tensor, p: int, q: int) -> Tensor:
    batch, channels, height, width = images.shape
    columns = width // q
    indices = torch.arange(height * columns, device=images.device)
    # The image's rows of q pixels, one below the other, and which of them each patch holds.
    pieces = indices.view(height // p, p, columns).transpose(1, 2).reshape(-1, p)  # (N, p)
    planes = torch.arange(batch * channels, device=images.device).view(batch, 1, channels, 1)
    pieces = pieces[ids][:, :, None] + planes * len(indices)  # (B, T, C, p)
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
    patches = gradient.new_zeros(batch, grid[0] * grid[1], gradient.shape[-1])
    patches = patches.scatter_add(1, ids[..., None].expand_as(gradient), gradient)
    return unpatchify(patches, (p, q), grid), None, None, None


_cut.register_autograd(_uncut, setup_context=_note_cut)


def values_at(values: Tensor, ids: Tensor) -> Tensor:
    """Gather (B, T, D) at the patches ``ids`` (B, T) int64 of (B, N, D)."""
    return values.gather(1, ids[..., None].expand(-1, -1, values.shape[-1]))


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Invert :func:`patchify`: (B, N, P) on a grid of (rows, columns) -> (B, C, H, W)."""
    p, q = patch_size
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=q, h=grid[0])


@dataclass(frozen=True, eq=False)
class Patches:
    """Images of different sizes, cut into patches and padded to the longest.

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
        """Build from padded values (B, N, P) and the grid of each image."""
        images, longest = values.shape[:2]
        if len(grids) != images or max((r * c for r, c in grids), default=0) > longest:
            raise ValueError(f"{images} images of {longest} patches at most have other grids")
        sizes = to_device(torch.tensor(grids, dtype=torch.int64).view(-1, 2), values.device)
        ids = torch.arange(longest, device=values.device).expand(images, -1)  # (B, N)
        valid = ids < sizes.prod(dim=1, keepdim=True)
        columns = sizes[:, 1:]
        coords = torch.stack([ids // columns, ids % columns], dim=-1)  # (B, N, 2)
        return cls(values, tuple(grids), valid, coords * valid[..., None])

    @classmethod
    def pad(cls, images: Sequence[Tensor], grids: Sequence[Grid]) -> Patches:
        """Build from the patches (N_i, P) of each image."""
        longest = max(len(image) for image in images)
        padded = [F.pad(image, (0, 0, 0, longest - len(image))) for image in images]
        return cls.of(torch.stack(padded), grids)

    @classmethod
    def cat(cls, parts: Sequence[Patches]) -> Patches:
        """Concatenate batches."""
        longest = max(part.values.shape[1] for part in parts)
        values = [F.pad(p.values, (0, 0, 0, longest - p.values.shape[1])) for p in parts]
        return cls.of(torch.cat(values), [grid for part in parts for grid in part.grids])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Patches:
        """Slice the images; their padding stays."""
        return Patches(self.values[rows], self.grids[rows], self.valid[rows], self.coords[rows])

    @property
    def device(self) -> torch.device:
        """Where the patches are."""
        return self.values.device

    @property
    def lengths(self) -> list[int]:
        """Patches of each image."""
        return [rows * columns for rows, columns in self.grids]

    def with_values(self, values: Tensor) -> Patches:
        """Replace the values (B, N, ...); padding stays 0."""
        return replace(self, values=values.masked_fill(~self.valid[..., None], 0))

    def left_out(self, images: Tensor) -> Patches:
        """Set some images, (B,) bool, to 0."""
        return replace(self, values=self.values.masked_fill(images[:, None, None], 0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Patches:
        values, valid, coords = map(change, (self.values, self.valid, self.coords))
        return Patches(values, self.grids, valid, coords)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Patches:
        """Move to another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Patches:
        """Copy to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def images(self, patch_size: tuple[int, int]) -> list[Tensor]:
        """Each image as (C, H, W)."""
        return [
            unpatchify(values[None, : grid[0] * grid[1]], patch_size, grid)[0]
            for values, grid in zip(self.values, self.grids, strict=True)
        ]


Images: TypeAlias = Tensor | Patches
"""(B, C, H, W) of one size, or images of different sizes."""
