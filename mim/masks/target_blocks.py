"""Target blocks and a context around them, drawn as I-JEPA draws them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mim.core.errors import setting_error
from mim.core.fields import Count, Natural, Settings, Span, SpanToOne
from mim.core.rng import image_keys, uniforms
from mim.masks.generators import MASKS, Grid, MaskGenerator, MaskRequest

# Streams of the keys: sizes, places of targets, and of contexts (one for each attempt).
_SIZES, _TARGETS, _CONTEXTS = 4, 5, 32
_TRIES = 20  # places of a context before one target fewer is taken out of it
_OTHERS = 2048  # images from which the distribution of a context's size is known


@dataclass(frozen=True)
class TargetBlocksSettings(Settings):
    """Settings of the generator target_blocks; it does not use ``mask.ratio``."""

    targets: Count = 4
    """Number of target blocks, which may overlap."""
    scale: SpanToOne = (0.15, 0.2)
    """Share of the grid that a target block covers, from and to."""
    aspect: Span = (0.75, 1.5)
    """Height over width of a target block, from and to. It goes up with the scale."""
    context_scale: SpanToOne = (0.85, 1.0)
    """Share of the grid that the context covers before the targets are taken out, from and to."""
    min_keep: Natural = 10
    """A context has more patches than this; else another place is drawn."""
    batch: Count = 128
    """Number of images to whose smallest context each context is cut; 1 does not cut."""
    sizes: Literal["image", "epoch"] = "image"
    """What has a size of blocks of its own: image (in each epoch), or epoch (the same for all
    images, which then need little padding)."""


@MASKS.register("target_blocks", TargetBlocksSettings)
class TargetBlocksMask(MaskGenerator):
    """I-JEPA's target blocks and context (Assran et al. 2023, arXiv:2301.08243).

    The target blocks of an image share one size; their places, and that of the context's
    rectangle, are uniform over those that leave the last row and column free, as in I-JEPA's code.
    The context is the rectangle less the targets. What is in neither is hidden, and I-JEPA does
    not predict it: the decoder ``block_predictor`` predicts each target block by itself, other
    decoders predict all that is hidden.

    I-JEPA draws the sizes once a batch and cuts the contexts of a batch to the smallest, by taking
    patches from the end. Here a mask does not depend on the batch. So each image draws sizes of its
    own, and is cut to the smallest of ``batch`` contexts of these sizes, its own and ``batch - 1``
    whose smallest is drawn from their distribution. Each image's mask is then distributed as in
    I-JEPA; what differs is that images of a batch no longer have the same number of patches, so
    that the shorter ones are padded.
    """

    settings: TargetBlocksSettings
    has_targets = True

    def draw(self, request: MaskRequest) -> Tensor:
        sizes, targets = self._sizes(request), self.targets(request)
        context = _contexts(self.settings, request.keys, request.grid, sizes, targets)  # (B, N)
        most = self._smallest(request, sizes)  # (B,)
        return ~(context & (context.cumsum(dim=1) <= most[:, None]))

    def targets(self, request: MaskRequest) -> Tensor:
        return _targets(self.settings, request.keys, request.grid, self._sizes(request))

    def _drawn(self, request: MaskRequest) -> Tensor:
        """(B, 3) uniforms: of the targets' size, the context's, and the batch's smallest."""
        keys = request.keys
        if self.settings.sizes == "epoch":
            keys = image_keys(0, request.epoch, keys.new_zeros(1), "mask.sizes").expand(len(keys))
        return uniforms(keys, 3, _SIZES)

    def _sizes(self, request: MaskRequest) -> Tensor:
        """(B, 4) int64: height and width of the targets, height and width of the context."""
        s, drawn = self.settings, self._drawn(request)
        targets = _size(request.grid, s.scale, s.aspect, drawn[:, 0])
        context = _size(request.grid, s.context_scale, (1.0, 1.0), drawn[:, 1])
        return torch.stack([*targets, *context], dim=1)

    def _smallest(self, request: MaskRequest, sizes: Tensor) -> Tensor:
        """(B,) int64: the smallest of ``batch - 1`` other contexts of the same sizes."""
        if self.settings.batch == 1:
            return torch.full_like(request.keys, request.num_patches)
        kinds, kind = sizes.unique(dim=0, return_inverse=True)
        drawn, smallest = self._drawn(request)[:, 2], torch.empty_like(kind)
        for number, size in enumerate(kinds.tolist()):
            counts, chances = _smallest_of_others(self.settings, request.grid, tuple(size))
            mine = kind == number
            place = torch.searchsorted(chances, drawn[mine].cpu(), right=True)
            smallest[mine] = counts[place].to(smallest.device)
        return smallest

    def check(self, grid: Grid) -> None:
        s, patches = self.settings, grid[0] * grid[1]
        if min(grid) < 2 or int(patches * s.scale[0]) < 1:
            reason = f"makes no target block on a grid of {grid[0]} x {grid[1]}"
            raise setting_error("mask.target_blocks.scale", list(s.scale), reason)
        low = torch.zeros(1, dtype=torch.float64, device="cpu")
        height, width = _size(grid, s.context_scale, (1.0, 1.0), low)
        if int(height * width) <= s.min_keep:
            reason = f"is no fewer than a context of {int(height)} x {int(width)} patches has"
            raise setting_error("mask.target_blocks.min_keep", s.min_keep, reason)

    def check_sizes(self) -> None:
        reason = "takes images of one size, and data.aspect is keep"
        raise setting_error("mask.name", self.name, reason)


def _size(
    grid: Grid, scale: tuple[float, float], aspect: tuple[float, float], drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """Height and width, each (B,) int64 and less than the grid's, of one uniform an image."""
    rows, cols = grid
    area = (rows * cols * (scale[0] + drawn * (scale[1] - scale[0]))).floor()
    ratio = aspect[0] + drawn * (aspect[1] - aspect[0])
    height, width = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    return height.clamp(1, rows - 1), width.clamp(1, cols - 1)


def _rectangles(grid: Grid, sizes: Tensor, places: Tensor) -> Tensor:
    """(..., rows, columns) bool of rectangles by ``sizes`` (..., 2) at ``places`` (..., 2)."""
    sides = []
    for axis, length in enumerate(grid):
        size = sizes[..., axis, None]  # (..., 1)
        start = (places[..., axis, None] * (length - size)).long()
        i = torch.arange(length, device=places.device)
        sides.append((i >= start) & (i < start + size))
    return sides[0][..., :, None] & sides[1][..., None, :]


def _targets(settings: TargetBlocksSettings, keys: Tensor, grid: Grid, sizes: Tensor) -> Tensor:
    """(B, T, N) bool."""
    count = settings.targets
    places = uniforms(keys, 2 * count, _TARGETS).view(-1, count, 2)  # (B, T, 2)
    return _rectangles(grid, sizes[:, None, :2].expand(-1, count, -1), places).flatten(2)


def _contexts(
    settings: TargetBlocksSettings, keys: Tensor, grid: Grid, sizes: Tensor, targets: Tensor
) -> Tensor:
    """(B, N) bool, given the ``targets`` (B, T, N), before the batch's smallest is known."""
    context = torch.zeros(len(keys), grid[0] * grid[1], dtype=torch.bool, device=keys.device)
    for attempt in range(_TRIES * settings.targets + 1):
        going = (context.sum(dim=1) <= settings.min_keep).nonzero()[:, 0]
        if not len(going):
            break
        places = uniforms(keys[going], 2, _CONTEXTS + attempt)  # (b, 2)
        inside = _rectangles(grid, sizes[going, 2:], places).flatten(1)
        taken = targets[going, : settings.targets - attempt // _TRIES].any(dim=1)
        context[going] = inside & ~taken
    return context


@functools.lru_cache(maxsize=256)
def _smallest_of_others(
    settings: TargetBlocksSettings, grid: Grid, size: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Numbers of patches, ascending, and the chances that the smallest has at most so many."""
    keys = image_keys(0, -1, torch.arange(_OTHERS), "mask.others")
    sizes = torch.tensor(size).expand(_OTHERS, -1)
    targets = _targets(settings, keys, grid, sizes)
    drawn = _contexts(settings, keys, grid, sizes, targets).sum(dim=1)
    counts, times = drawn.unique(return_counts=True)
    below = times.cumsum(dim=0).double() / _OTHERS
    return counts, 1 - (1 - below) ** (settings.batch - 1)
