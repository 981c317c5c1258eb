"""Histograms of oriented gradients as target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.core.errors import setting_error
from mim.core.fields import Count, Natural, Settings
from mim.core.patches import patchify
from mim.model.targets.base import TARGETS, Target, TargetContext
from mim.model.teacher import Teacher

_EPSILON = 1e-5


def oriented_gradients(images: Tensor, bins: int, cell: int) -> Tensor:
    """Compute histograms of gradient directions in cells of pixels (Dalal and Triggs 2005).

    A pixel's gradient is the difference of its two neighbours along each axis, 0 across the
    border. It votes with its length for the one bin that holds its direction, which is counted
    modulo 180 degrees from the direction of rows and turns from right to down. A cell's histogram
    is the mean of its pixels' votes. The same numbers as ``skimage.feature.hog`` of each channel.

    Args:
        images: (B, C, H, W) with H and W divisible by the cell.
        bins: of 180 / bins degrees each.
        cell: side of a cell in pixels.

    Returns:
        (B, C, H / cell, W / cell, bins).
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")  # a border's two neighbours are the same
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]  # (B, C, H, W)
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    angle = torch.atan2(down, across).remainder(math.pi)
    # A remainder may round up to pi itself, which is the direction 0.
    index = (angle * (bins / math.pi)).long() % bins
    length = torch.hypot(across, down)
    rows, columns = images.shape[2] // cell, images.shape[3] // cell

    def histogram(bin_: int) -> Tensor:
        votes = torch.where(index == bin_, length, 0.0)  # (B, C, H, W)
        return votes.unflatten(3, (columns, cell)).unflatten(2, (rows, cell)).mean(dim=(3, 5))

    # One bin at a time: all at once would hold the images ``bins`` times over.
    return torch.stack([histogram(bin_) for bin_ in range(bins)], dim=-1)


def sobel_gradients(images: Tensor, bins: int, cell: int, window: Tensor | None = None) -> Tensor:
    """Compute the histograms of MaskFeat: gradients by Sobel's filters, summed over each cell.

    A direction is the angle from the vertical axis, modulo 180 degrees.

    Args:
        images: (B, C, H, W) with H and W divisible by the cell.
        bins: of 180 / bins degrees each.
        cell: side of a cell in pixels.
        window: (H, W), multiplies the votes; None leaves them as they are.

    Returns:
        (B, C, H / cell, W / cell, bins).
    """
    rows, columns = (side // cell for side in images.shape[2:])
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    across = padded[..., :-2] - padded[..., 2:]  # (B, C, H + 2, W)
    across = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]  # (B, C, H, W)
    down = padded[..., :-2, :] - padded[..., 2:, :]
    down = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    index = (torch.atan2(across, down) / math.pi * bins).floor().long() % bins
    votes = torch.hypot(across, down)
    if window is not None:
        votes = votes * window.to(votes.dtype)
    counts = votes.new_zeros(*votes.shape[:2], bins, *votes.shape[2:])
    counts.scatter_(2, index[:, :, None], votes[:, :, None])
    cells = counts.unflatten(4, (columns, cell)).unflatten(3, (rows, cell)).sum(dim=(4, 6))
    return cells.movedim(2, -1)


def gaussian_window(side: int, rows: int, columns: int) -> Tensor:
    """Repeat a Gaussian of deviation ``side / 2``, which sums to 1, over (rows, columns) pixels."""
    place = (torch.arange(side) - (side - 1) / 2) / (side // 2)
    weight = torch.exp(-0.5 * place.square())
    window = torch.outer(weight, weight)
    return (window / window.sum()).repeat(rows // side, columns // side)


@dataclass(frozen=True)
class HogSettings(Settings):
    """Histograms of oriented gradients."""

    bins: Count = 9
    """Directions a histogram tells apart, over 180 degrees."""
    cell: Count = 8
    """Side in pixels of the squares that have a histogram each; must divide the patch."""
    normalize: bool = True
    """Whether each histogram is divided by its length, so that contrast does not count."""
    gradient: Literal["sobel", "central"] = field(default="sobel", metadata={"before": "central"})
    """sobel (MaskFeat's own features) or central (the difference of two neighbours, and directions
    from the horizontal axis: Dalal and Triggs, as in scikit-image)."""
    window: Natural = 0
    """Side in pixels of a Gaussian that weighs the votes, repeated over the image, with gradient
    sobel; must divide the image. 16 is that of mmselfsup's MaskFeat; 0, the authors', has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.gradient != "sobel":
            raise self.error("window", "needs model.target.hog.gradient=sobel")


@TARGETS.register("hog", HogSettings)
class Hog(Target):
    """Histograms of oriented gradients of each channel (MaskFeat, arXiv:2112.09133).

    The vector of a patch is (cell row, cell column, channel, bin). Where
    ``model.target.hog.normalize`` is set, each histogram is divided by its length, so that
    contrast does not count; a cell without a gradient stays 0. ``gradient: sobel`` gives the
    numbers of MaskFeat's code; ``central`` those of scikit-image.
    """

    settings: HogSettings
    _window: Tensor | None

    def __init__(self, settings: HogSettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        cell, (height, width) = settings.cell, context.patch_size
        if height % cell or width % cell:
            reason = f"does not divide the patch of {height} x {width} pixels"
            raise setting_error("model.target.hog.cell", cell, reason)
        if min(context.image_size) < 2:
            reason = "needs images of at least 2 x 2 pixels"
            raise setting_error("model.target.name", self.name, reason)
        window: Tensor | None = None
        if settings.window:
            if any(side % settings.window for side in context.image_size):
                shown = " x ".join(map(str, context.image_size))
                reason = f"does not divide images of {shown} pixels"
                raise setting_error("model.target.hog.window", settings.window, reason)
            window = gaussian_window(settings.window, *context.image_size)
        self.register_buffer("_window", window, persistent=False)
        self.dim = (height // cell) * (width // cell) * context.channels * settings.bins

    @torch.no_grad()
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        cell, (height, width) = self.settings.cell, self.context.patch_size
        if images.dtype.itemsize < 4:
            images = images.float()
        bins, normalize = self.settings.bins, self.settings.normalize
        if self.settings.gradient == "sobel":
            histograms = sobel_gradients(images, bins, cell, self._window)  # (B, C, h, w, bins)
            if normalize:
                histograms = F.normalize(histograms, dim=-1)
        else:
            histograms = oriented_gradients(images, bins, cell)
            if normalize:
                square = histograms.square().sum(dim=-1, keepdim=True)
                histograms = histograms / (square + _EPSILON**2).sqrt()
        maps = histograms.movedim(-1, 2).flatten(1, 2)  # (B, C * bins, h, w)
        return patchify(maps, (height // cell, width // cell))
