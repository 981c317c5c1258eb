"""Generators of shaped masks that do not look at the image.

Only integer arithmetic and operations that IEEE 754 rounds exactly (+, -, *, /, square root) act
on what is drawn, so that every device and every batch gives the same masks; logarithms and
exponentials, which do not promise that, come from a table.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mim.core.errors import setting_error
from mim.core.fields import Count, Settings, Span, SpanToOne
from mim.core.rng import random_bits, uniforms
from mim.masks.generators import MASKS, Grid, MaskGenerator, MaskRequest, RankedMask, rank_by

_SHAPES = 4  # the keys' stream for places and shapes; 0 orders patches, 1 draws ratios
# Of block: rectangles tried between two looks at which images are done, how many such parts, the
# first part's stream, and how many failures in a row end it (BEiT's).
_ATTEMPTS, _PARTS, _PARTS_STREAM, _FAILURES = 8, 32, 16, 10


@functools.cache
def _log_spaced(low: float, high: float, steps: int = 1024) -> tuple[float, ...]:
    """Exponentiate the middles of ``steps`` equal parts of [log low, log high]."""
    start, width = math.log(low), (math.log(high) - math.log(low)) / steps
    return tuple(math.exp(start + (step + 0.5) * width) for step in range(steps))


def _log_uniform(span: tuple[float, float], drawn: Tensor) -> Tensor:
    """Turn uniforms into log-uniforms over ``span``, float64."""
    table = torch.tensor(_log_spaced(*span), dtype=torch.float64, device=drawn.device)
    return table[(drawn * len(table)).long()]


def _pick(drawn: Tensor, choices: Tensor | int) -> Tensor:
    """Turn uniforms into integers, uniform over 0..choices-1."""
    return (drawn * choices).long()


def _shuffled(keys: Tensor, count: int) -> Tensor:
    """Permute 0..count-1 by key: (B, count) int64."""
    return random_bits(keys, count).argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def _within(start: Tensor, length: Tensor, size: int) -> Tensor:
    """(B, size) bool, True on start <= i < start + length; both (B,)."""
    i = torch.arange(size, device=start.device)
    return (i >= start[:, None]) & (i < (start + length)[:, None])


@dataclass(frozen=True)
class BlockSettings(Settings):
    """Settings of the generator block: rectangles that pile up."""

    area: SpanToOne = (16 / 196, 1.0)
    """Share of the grid a rectangle covers, from and to; never more than is still to be hidden."""
    aspect: Span = (0.3, 1 / 0.3)
    """Height over width of a rectangle, from and to; drawn log-uniformly."""
    exact: bool = True
    """Whether the last rectangle is cut so that the number of hidden patches is exact; false
    keeps rectangles whole, as BEiT does, and may hide fewer."""


@MASKS.register("block", BlockSettings)
class BlockMask(MaskGenerator):
    """Rectangles that pile up (BEiT, arXiv:2106.08254; DINOv2, arXiv:2304.07193).

    A rectangle has an area between ``area[0]`` of the grid and what is still to be hidden (at most
    ``area[1]`` of the grid) and a log-uniform aspect; one that does not fit the grid, or adds
    nothing, is drawn again, until ten in a row have failed or 256 are drawn.

    ``exact``: a rectangle that adds more than is still to be hidden is cut to its first cells in
    reading order, or to its last (by key); should the draws fail, keyed random patches fill up.
    Otherwise BEiT's rule: such a rectangle fails too, and the count may fall short. An image in
    which no rectangle found a place then still gets its number of random patches.

    BEiT's own settings are the defaults; DINOv2's are ``area: [4 / N, 0.5]``. BEiT also refuses
    rectangles as long as the grid, which this allows, so that a grid of one line has some.
    """

    settings: BlockSettings

    def draw(self, request: MaskRequest) -> Tensor:
        keys = request.keys
        missing = request.counts()  # (B,)
        failures = torch.zeros_like(missing)
        hidden = torch.zeros(len(keys), *request.grid, dtype=torch.bool, device=keys.device)
        for part in range(_PARTS):
            # Images that are done leave, some attempts at a time: each look waits for a GPU.
            going = ((missing > 0) & (failures < _FAILURES)).nonzero()[:, 0]
            if not len(going):
                break
            state = hidden[going], missing[going], failures[going]
            hidden[going], missing[going], failures[going] = self._attempts(
                keys[going], _PARTS_STREAM + part, *state
            )
        flat = hidden.flatten(1)
        if not self.settings.exact:
            missing = missing.where(~flat.any(dim=1), 0)
        short = (missing > 0).nonzero()[:, 0]
        if len(short):
            rest = rank_by(flat[short].long(), keys[short])  # those not hidden first
            flat[short] |= rest < missing[short, None]
        return flat

    def _attempts(
        self, keys: Tensor, stream: int, hidden: Tensor, missing: Tensor, failures: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Try some rectangles in each image, and update the last three arguments.

        Args:
            keys: (B,) int64.
            stream: of the keys' numbers.
            hidden: (B, rows, columns) bool, what is hidden so far.
            missing: (B,) int64, how many patches are still to be hidden.
            failures: (B,) int64, how many rectangles in a row have failed.
        """
        settings = self.settings
        rows, cols = hidden.shape[1:]
        low, high = (share * rows * cols for share in settings.area)
        drawn = uniforms(keys, 4 * _ATTEMPTS, stream).view(-1, _ATTEMPTS, 4)  # (B, T, 4)
        aspects = _log_uniform(settings.aspect, drawn[:, :, 0])  # (B, T)
        backwards = random_bits(keys, 1, _SHAPES)[:, 0] < 0  # (B,)
        for attempt in range(_ATTEMPTS):
            aspect = aspects[:, attempt]
            area = low + (missing.double().clamp(max=high) - low) * drawn[:, attempt, 1]
            height = (area * aspect).sqrt().round().clamp(min=1)
            width = (area / aspect).sqrt().round().clamp(min=1)
            fits = (failures < _FAILURES) & (height <= rows) & (width <= cols)
            top = _pick(drawn[:, attempt, 2], rows - height + 1)
            left = _pick(drawn[:, attempt, 3], cols - width + 1)
            in_rows = _within(top, height, rows) & fits[:, None]
            in_cols = _within(left, width, cols)
            new = in_rows[:, :, None] & in_cols[:, None, :] & ~hidden  # (B, rows, cols)
            added = new.sum(dim=(1, 2))
            if settings.exact:
                place = new.flatten(1).cumsum(dim=1)  # (B, N), from 1 at the first new patch
                after = torch.where(backwards, added - missing, 0)[:, None]
                until = torch.where(backwards, added, missing)[:, None]
                new &= ((place > after) & (place <= until)).view_as(new)
                added = added.minimum(missing)
            else:
                added = added.where(added <= missing, 0)
                new &= (added > 0)[:, None, None]
            hidden = hidden | new
            missing = missing - added
            failures = torch.where(added > 0, 0, failures + 1)
        return hidden, missing, failures


@functools.cache
def _bayer(side: int) -> Tensor:
    """(side, side) int64, Bayer's ordered-dither matrix (Bayer 1973); side is a power of two."""
    if side == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    inner = 4 * _bayer(side // 2)
    upper, lower = torch.cat([inner, inner + 2], dim=1), torch.cat([inner + 3, inner + 1], dim=1)
    return torch.cat([upper, lower])


@MASKS.register("grid")
class GridMask(RankedMask):
    """A regular lattice at any ratio (MAE's grid-wise sampling, arXiv:2111.06377, figure 6).

    Patches are hidden in the order of a Bayer matrix, from its highest value down, which lies over
    the grid with a keyed shift. On a grid of even sides a ratio of 0.75 leaves one patch of each
    2 x 2 visible and 0.5 makes a checkerboard; other ratios refine the next coarser lattice.
    """

    def ranks(self, request: MaskRequest) -> Tensor:
        rows, cols = request.grid
        keys = request.keys
        side = 1 << (max(rows, cols) - 1).bit_length()
        bits = random_bits(keys, 2, _SHAPES) & (side - 1)  # (B, 2)
        row = (torch.arange(rows, device=keys.device) + bits[:, :1]) % side  # (B, rows)
        col = (torch.arange(cols, device=keys.device) + bits[:, 1:]) % side  # (B, cols)
        bayer = _bayer(side).to(keys.device)[row[:, :, None], col[:, None, :]].flatten(1)  # (B, N)
        # The matrix is at least as large as the grid: no value occurs twice, there are no ties.
        return bayer.argsort(dim=1, descending=True).argsort(dim=1)


@dataclass(frozen=True)
class AlignedSettings(Settings):
    """Settings of the generator aligned: units larger than a patch."""

    unit: Count | tuple[Count, Count] = 32
    """Side in pixels of the square that is hidden as one, or (height, width)."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.unit, self.unit) if isinstance(self.unit, int) else self.unit


@MASKS.register("aligned", AlignedSettings)
class AlignedMask(MaskGenerator):
    """Random squares larger than a patch (SimMIM, arXiv:2111.09886: 32 pixels).

    The image is cut into units of ``unit`` pixels, each of which is hidden or visible as a whole;
    the count is exact in units.
    """

    settings: AlignedSettings

    def _unit(self, grid: Grid) -> Grid:
        """(height, width) of a unit in patches; a ``UserError`` where it fits no patch or grid."""
        unit, size = self.settings.unit, self.settings.size
        if self.patch_size is None:
            reason = "is in pixels: build the generator with the patch size (patch_size=...)"
            raise setting_error("mask.aligned.unit", unit, reason)
        for side, patch in zip(size, self.patch_size, strict=True):
            if side % patch:
                names = " x ".join(map(str, self.patch_size))
                reason = f"is no multiple of the patch size, {names} pixels"
                raise setting_error("mask.aligned.unit", unit, reason)
        height, width = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        if grid[0] % height or grid[1] % width:
            names = f"{height} x {width} patches"
            reason = f"makes units of {names}, which do not divide a grid of {grid[0]} x {grid[1]}"
            raise setting_error("mask.aligned.unit", unit, reason)
        return height, width

    def draw(self, request: MaskRequest) -> Tensor:
        height, width = self._unit(request.grid)
        rows, cols = request.grid[0] // height, request.grid[1] // width
        units = rows * cols
        hidden = _shuffled(request.keys, units) < request.counts(units)[:, None]  # (B, units)
        hidden = hidden.view(-1, rows, 1, cols, 1).expand(-1, rows, height, cols, width)
        return hidden.reshape(len(hidden), -1)  # (B, N)

    def check_sizes(self) -> None:
        if self.settings.size != self.patch_size:
            reason = "does not divide the grid of every image with data.aspect=keep"
            unit = self.settings.unit
            raise setting_error("mask.aligned.unit", unit, f"{reason}; choose one patch")

    def check(self, grid: Grid) -> None:
        height, width = self._unit(grid)
        rows, cols = grid[0] // height, grid[1] // width
        self.check_units((rows, cols), rows * cols, "mask unit")


class LineMask(MaskGenerator):
    """Whole lines of patches, uniformly at random; the count is exact in lines."""

    axis: ClassVar[int]
    """0 for rows, 1 for columns."""

    def draw(self, request: MaskRequest) -> Tensor:
        lines = request.grid[self.axis]
        hidden = _shuffled(request.keys, lines) < request.counts(lines)[:, None]  # (B, lines)
        return hidden.unsqueeze(2 - self.axis).expand(-1, *request.grid).flatten(1)

    def check(self, grid: Grid) -> None:
        self.check_units(grid, grid[self.axis], self.name)


@MASKS.register("column")
class ColumnMask(LineMask):
    """Whole columns of patches."""

    axis = 1


@MASKS.register("row")
class RowMask(LineMask):
    """Whole rows of patches."""

    axis = 0


@dataclass(frozen=True)
class InverseBlockSettings(Settings):
    """Settings of the generator inverse_block: one visible rectangle."""

    aspect: Span = (0.5, 2.0)
    """Height over width of the rectangle, from and to; drawn log-uniformly."""
    roll: bool = False
    """Whether the rectangle may leave the grid on one side and come in on the other, so that
    every patch is visible equally often."""


@MASKS.register("inverse_block", InverseBlockSettings)
class InverseBlockMask(MaskGenerator):
    """One visible rectangle (CAPI, arXiv:2502.08769).

    It has exactly K = N - hidden patches: its height follows from a log-uniform aspect, within
    what the grid allows, its width is K / height rounded up, and what is then too much is cut from
    the end of its first or last column (by key). Its place is uniform over those where it fits;
    with ``roll``, as in CAPI, over all places of a grid whose opposite sides are joined.
    """

    settings: InverseBlockSettings

    def draw(self, request: MaskRequest) -> Tensor:
        settings = self.settings
        rows, cols = request.grid
        drawn = uniforms(request.keys, 5, _SHAPES)  # (B, 5)
        visible = request.num_patches - request.counts()  # (B,)
        height = (visible * _log_uniform(settings.aspect, drawn[:, 0])).sqrt().round().long()
        height = height.maximum(-(-visible // cols)).minimum(visible.clamp(max=rows))
        width = -(-visible // height.clamp(min=1))
        excess = height * width - visible  # below height: some of the cut column stays
        places = rows - height + 1, cols - width + 1
        top = _pick(drawn[:, 1], rows if settings.roll else places[0])
        left = _pick(drawn[:, 2], cols if settings.roll else places[1])
        # Places as seen from the rectangle's corner, (B, rows) and (B, cols).
        down = (torch.arange(rows, device=top.device) - top[:, None]) % rows
        right = (torch.arange(cols, device=top.device) - left[:, None]) % cols
        inside = (down < height[:, None])[:, :, None] & (right < width[:, None])[:, None, :]
        first, upper = drawn[:, 3:4] < 0.5, drawn[:, 4:5] < 0.5
        cut_col = right == torch.where(first[:, 0], 0, width - 1)[:, None]
        cut_row = torch.where(
            upper, down < excess[:, None], (down >= (height - excess)[:, None])
        )  # (B, rows); rows outside the rectangle are hidden anyway
        cut = cut_row[:, :, None] & cut_col[:, None, :]
        return (~inside | cut).flatten(1)


@dataclass(frozen=True)
class MultiblockSettings(Settings):
    """Settings of the generator multiblock: hidden targets inside a visible context."""

    targets: Count = 4
    """Number of target rectangles, which may overlap."""
    aspect: Span = (0.75, 1.5)
    """Height over width of a target, from and to."""
    context_scale: SpanToOne = (0.85, 1.0)
    """Share of the grid the context covers, from and to; what lies outside it is hidden first."""


@MASKS.register("multiblock", MultiblockSettings)
class MultiblockMask(RankedMask):
    """Targets and a context after I-JEPA (arXiv:2301.08243), at any ratio.

    All that is hidden is predicted; I-JEPA's own draws are the generator ``target_blocks``.
    Patches outside the context, a keyed rectangle of the grid's shape, are hidden first, in keyed
    order; then those nearest to any of the targets, each of which has a keyed centre and aspect.
    The distance is that of the target's own shape, so that all targets grow by one factor until
    the count is exact. At a low ratio (below 0.15 with the default settings) what lies outside
    the context may take up the whole count.
    """

    settings: MultiblockSettings

    def ranks(self, request: MaskRequest) -> Tensor:
        settings, keys = self.settings, request.keys
        rows, cols = request.grid
        drawn = uniforms(keys, 3 * (1 + settings.targets), _SHAPES)  # (B, 3 + 3 T)
        low, high = settings.context_scale
        side = (low + (high - low) * drawn[:, 0]).sqrt()  # (B,), the same share of each side
        height = (side * rows).round().clamp(min=1)
        width = (side * cols).round().clamp(min=1)
        top = _pick(drawn[:, 1], rows - height + 1)
        left = _pick(drawn[:, 2], cols - width + 1)
        in_rows, in_cols = _within(top, height, rows), _within(left, width, cols)
        context = in_rows[:, :, None] & in_cols[:, None, :]  # (B, rows, cols)

        low, high = settings.aspect
        drawn = drawn[:, 3:].view(-1, settings.targets, 3, 1)  # (B, T, 3, 1)
        aspect = (low + (high - low) * drawn[:, :, 0]).sqrt()  # (B, T, 1): height at area 1
        row = torch.arange(rows, device=keys.device) + 0.5
        col = torch.arange(cols, device=keys.device) + 0.5
        down = (row - drawn[:, :, 1] * rows).abs() / aspect  # (B, T, rows)
        right = (col - drawn[:, :, 2] * cols).abs() * aspect  # (B, T, cols)
        distance = down[:, :, :, None].maximum(right[:, :, None, :]).amin(dim=1)  # (B, rows, cols)
        return rank_by(distance.where(context, -1.0).flatten(1), keys)
