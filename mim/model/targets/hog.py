"""Histograms of oriented gradients as target."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.core.errors import setting_error
from mim.core.fields import Count, Settings
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


@dataclass(frozen=True)
class HogSettings(Settings):
    """Histograms of oriented gradients."""

    bins: Count = 9
    """Directions a histogram tells apart, over 180 degrees."""
    cell: Count = 8
    """Side in pixels of the squares that have a histogram each; must divide the patch."""
    normalize: bool = True
    """Whether each histogram is divided by its length, so that contrast does not count."""


@TARGETS.register("hog", HogSettings)
class Hog(Target):
    """Histograms of oriented gradients of each channel (MaskFeat, arXiv:2112.09133).

    The vector of a patch is (cell row, cell column, channel, bin). Where
    ``model.target.hog.normalize`` is set, each histogram is divided by its length, so that
    contrast does not count; a cell without a gradient stays 0. MaskFeat's code differs in that it
    smooths the difference across (Sobel) and weighs votes by a Gaussian window over 16 pixels;
    here they are those of Dalal and Triggs without the window, as in scikit-image.
    """

    settings: HogSettings

    def __init__(self, settings: HogSettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        cell, (height, width) = settings.cell, context.patch_size
        if height % cell or width % cell:
            reason = f"does not divide the patch of {height} x {width} pixels"
            raise setting_error("model.target.hog.cell", cell, reason)
        if min(context.image_size) < 2:
            reason = "needs images of at least 2 x 2 pixels"
            raise setting_error("model.target.name", self.name, reason)
        self.dim = (height // cell) * (width // cell) * context.channels * settings.bins

    @torch.no_grad()
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        cell, (height, width) = self.settings.cell, self.context.patch_size
        if images.dtype.itemsize < 4:
            images = images.float()
        histograms = oriented_gradients(images, self.settings.bins, cell)  # (B, C, h, w, bins)
        if self.settings.normalize:
            square = histograms.square().sum(dim=-1, keepdim=True)
            histograms = histograms / (square + _EPSILON**2).sqrt()
        maps = histograms.movedim(-1, 2).flatten(1, 2)  # (B, C * bins, h, w)
        return patchify(maps, (height // cell, width // cell))
