"""Cosine transforms, and the target that predicts them patch by patch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mim.core.errors import setting_error
from mim.core.fields import Count, Settings
from mim.core.patches import patchify
from mim.model.targets.base import TARGETS, Target, TargetContext
from mim.model.teacher import Teacher


def cosine_basis(size: int) -> Tensor:
    """The orthonormal DCT-II: (size, size) float64, row k the cosine of frequency k / (2 size)."""
    place = torch.arange(size, dtype=torch.float64) + 0.5
    order = torch.arange(size, dtype=torch.float64)[:, None]
    basis = torch.cos(math.pi / size * order * place) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def zigzag(height: int, width: int) -> list[tuple[int, int]]:
    """All (row, column) along the anti-diagonals, to and fro from (0, 0), as JPEG orders them."""
    cells = [(row, column) for row in range(height) for column in range(width)]
    return sorted(cells, key=lambda c: (c[0] + c[1], c[0] if (c[0] + c[1]) % 2 else c[1]))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def filter_images(images: Tensor, vertical: Tensor, horizontal: Tensor, gain: Tensor) -> Tensor:
    """Multiply the cosine transform of images (B, C, H, W) by ``gain`` (H, W).

    ``vertical`` (H, H) and ``horizontal`` (W, W) are :func:`cosine_basis`.
    """
    x = _at_least_float32(images)
    down, across, gain = (m.to(x.dtype) for m in (vertical, horizontal, gain))
    with torch.autocast(x.device.type, enabled=False):  # a target is never rounded to half
        return down.T @ (down @ x @ across.T * gain) @ across


@dataclass(frozen=True)
class FrequencySettings(Settings):
    """Each patch's cosine transform."""

    coefficients: Count | None = None
    """How many of a patch's coefficients per channel, lowest frequencies first; by default all."""
    whiten: bool = True
    """Whether a coefficient is measured against the 1 / frequency amplitudes of natural images;
    false, with all coefficients and mse, is the loss of pixels."""


@TARGETS.register("frequency", FrequencySettings)
class Frequency(Target):
    """Each patch's orthonormal 2-D cosine transform (DCT-II), low frequencies first.

    Of ``model.target.frequency.coefficients`` per channel, in zig-zag order; the vector's order
    is (coefficient, channel). With ``whiten`` a coefficient is divided by the amplitude that
    natural images have there on average, which falls as 1 / frequency (Field 1987), so that fine
    structure weighs as much as coarse; the lowest ones are then measured as a patch's mean is.
    The transform preserves distances: without whitening, all coefficients and ``mse`` are the
    target ``pixels`` in other coordinates, loss for loss. Masked frequency modelling
    (arXiv:2206.07706) predicts the image's transform instead, from an input without some of it.
    """

    shows_pixels = True
    _analysis: Tensor
    _synthesis: Tensor

    settings: FrequencySettings

    def __init__(self, settings: FrequencySettings, context: TargetContext) -> None:
        super().__init__(settings, context)
        height, width = context.patch_size
        pixels = height * width
        count = pixels if settings.coefficients is None else settings.coefficients
        if count > pixels:
            reason = f"is more than the {pixels} pixels of a patch of {height} x {width}"
            raise setting_error("model.target.frequency.coefficients", count, reason)
        self.dim = count * context.channels
        chosen = zigzag(height, width)[:count]
        down, across = cosine_basis(height), cosine_basis(width)
        waves = torch.stack([torch.outer(down[u], across[v]).flatten() for u, v in chosen])
        gain = torch.ones(count, dtype=torch.float64)
        if settings.whiten:
            lowest = 1 / max(height, width)
            above = [max(1.0, math.hypot(u / height, v / width) / lowest) for u, v in chosen]
            gain = torch.tensor(above, dtype=torch.float64) / math.sqrt(pixels)
        self.register_buffer("_analysis", waves * gain[:, None], persistent=False)  # (K, p * q)
        self.register_buffer("_synthesis", waves / gain[:, None], persistent=False)

    def _transform(self, x: Tensor, matrix: Tensor, equation: str) -> Tensor:
        x = _at_least_float32(x)
        channels = x.unflatten(-1, (-1, self.context.channels))  # (B, N, p * q or K, C)
        with torch.autocast(x.device.type, enabled=False):
            return torch.einsum(equation, channels, matrix.to(x.dtype)).flatten(-2)

    @torch.no_grad()
    def forward(self, images: Tensor, teacher: Teacher | None = None) -> Tensor:
        patches = patchify(images, self.context.patch_size)
        return self._transform(patches, self._analysis, "bnpc,kp->bnkc")

    def to_pixels(self, prediction: Tensor, images: Tensor, target: Tensor | None = None) -> Tensor:
        """The inverse transform; coefficients that are no part of the target are 0."""
        return self._transform(prediction, self._synthesis, "bnkc,kp->bnpc")
