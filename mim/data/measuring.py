"""What the values of training images are: their range, and mean and deviation of each channel.

Found once by looking at up to 1,024 images spread over the set, kept in ~/.cache/mim under the
set's fingerprint, and written into the config of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mim.core.config import DataConfig, MeasuredConfig
from mim.core.errors import setting_error
from mim.data.images.decode import UnreadableImage
from mim.data.images.deep import finite
from mim.data.images.transforms import eval_transform
from mim.data.places.kept import found_once
from mim.data.sources.base import IMAGENET, ImageSource, spread_indices
from mim.data.sources.reading import read_images

MEASURED = 1024
"""The most images that are looked at."""
_BITS = (8, 10, 12, 14, 16, 24, 32)
_AT_ONCE = 64
_FORMAT = 1

T = TypeVar("T")


def measure(
    source: ImageSource, config: DataConfig, train: Callable[[DataConfig], ImageSource]
) -> MeasuredConfig:
    """What the settings leave to be measured, and what is known already.

    Args:
        source: the images of either split, without measured values.
        config: of the data.
        train: opens the training images by a config.

    Raises:
        UserError: if no training image can be read.
    """
    known, deep = config.measured, config.range != "high_byte" and source.has_deep()
    if config.range == "auto" and deep and known.range is None:
        images = train(config)
        found = _kept(images, config, "range", lambda: value_range(images, config.nonfinite))
        known = replace(known, range=None if found is None else (found[0], found[1]))
    config = replace(config, measured=known)
    if known.mean is None and _needs_statistics(source, config, deep):
        images = train(config)
        find = partial(statistics, images, config, spread_indices(len(images), MEASURED))
        mean, std = _kept(images, config, "statistics", find)
        known = replace(known, mean=tuple(mean), std=tuple(max(s, 1e-6) for s in std))
    return known


def _needs_statistics(source: ImageSource, config: DataConfig, deep: bool) -> bool:
    if (config.mean is not None and config.std is not None) or config.stats == "source":
        return False
    has_own = source.mean != IMAGENET[0]
    unfit = len(source.mean) != config.channels and config.channels not in (1, 3)
    return config.stats == "measured" or (deep and not has_own) or unfit


def _kept(source: ImageSource, config: DataConfig, what: str, find: Callable[[], T]) -> T:
    """What an earlier run found in the same images, or what is found now."""
    read = ("image_size", "channels", "pages", "nonfinite", "range", "resize", "max_pixels")
    parts = [_FORMAT, what, source.fingerprint(), str(config.measured.range)]
    parts += [str(getattr(config, name)) for name in read]
    return found_once(parts, find)


def value_range(source: ImageSource, nonfinite: float | None = None) -> list[float] | None:
    """The values that become 0 and 1; None where no image looked at has more than 8 bits.

    Integers from 0 on take the range of the fewest bits of 8, 10, 12, 14, 16, 24 and 32 that hold
    the largest one; others, and floats, the least and the largest value. Floats from 0 to 1 keep
    that range.
    """
    low, high, has_floats = np.inf, -np.inf, False
    chosen = spread_indices(len(source), MEASURED)
    for start in range(0, len(chosen), _AT_ONCE):
        part = chosen[start : start + _AT_ONCE]
        source.ahead(torch.tensor(part))
        for index in part:
            try:
                pixels = source.raw(index)
                if pixels is None or pixels.values.dtype.itemsize == 1:
                    continue
                values = finite(pixels.values, nonfinite)
            except (UnreadableImage, ValueError):
                continue
            has_floats |= values.dtype.kind == "f"
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if low > high:
        return None
    if low >= 0 and not has_floats:
        return [0.0, float(2 ** next((b for b in _BITS if high < 2**b), 64) - 1)]
    if low >= 0 and high <= 1:
        return [0.0, 1.0]
    return [low, high if high > low else low + 1.0]


def statistics(
    source: ImageSource, config: DataConfig, indices: list[int]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images at positions, on the scale 0 to 1.

    Images are as evaluations see them: scaled to ``data.image_size``, the centre, not augmented.
    Sums over bytes are whole numbers, so that neither order nor batches change a digit.

    Raises:
        UserError: if none can be read.
    """
    square = config.as_square()
    sums = torch.zeros(2, config.channels, dtype=torch.float64)
    count = 0
    for part in torch.tensor(indices).split(_AT_ONCE):
        images, _, _ = read_images(source, part, replace=False)
        if not images:
            continue
        pixels = eval_transform(images, square)
        sums += _sums(pixels)
        count += pixels[:, 0].numel()
    if not count:
        raise setting_error("data.source", config.source, "has no image that can be read")
    first, second = (sums / count).unbind()
    std = (second - first.square()).clamp(min=0).sqrt()
    mean, deviation = ([float(f"{x:.6g}") for x in values.tolist()] for values in (first, std))
    return tuple(mean), tuple(deviation)


def _sums(pixels: Tensor) -> Tensor:
    """(2, C): sums of values from 0 to 1, and of their squares."""
    if pixels.dtype == torch.uint8:
        whole = pixels.long()
        first, second = whole.sum((0, 2, 3)), whole.square().sum((0, 2, 3))
        return torch.stack([first.double() / 255, second.double() / 255**2])
    values = pixels.double()
    return torch.stack([values.sum((0, 2, 3)), values.square().sum((0, 2, 3))])
