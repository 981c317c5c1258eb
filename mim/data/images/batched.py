"""Cutting and resizing many images of one size at once, on any device, with the loader's own bytes.

Both libraries that resize images one by one (``transforms.resize``) count in whole
numbers: a row of output is a sum of input rows times weights that are rounded to so many binary
places, and so is a column, with bytes between the two. Sums of such products are exact in float64
whatever their order. Two matrix products therefore give the very same bytes, on a CPU and on a GPU
alike, and an image is the same whether it comes from a file, from memory or from the accelerator.

The weights are those of Pillow's Resample.c and of torch's antialiased bicubic for uint8
(``compute_index_ranges_int16_weights``); so for bilinear.

Shapes: B images, C channels, h x w pixels as they are, H x W as resized, T taps of a filter.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_PIL_PLACES = 22  # PRECISION_BITS
_TORCH_PLACES, _TORCH_LARGEST = 22, 1 << 15  # at most these places; weights fit int16
_TABLE = 1 << 20  # numbers; for lines of up to 37 pixels, to as many, a CPU looks weights up
_PART = 1 << 16  # numbers; memory that a CPU takes in so small parts is not given back each time
_SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}  # of a filter, in pixels of the result


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, in the order of operations of Pillow's ``bicubic_filter``."""
    x = x.abs()
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


@functools.cache
def _table(size: int, out_size: int, how: str) -> Tensor:
    """(parts, out_size, size): the weights of every part of a line, by first pixel, then length."""
    first = torch.arange(size)
    start = first.repeat_interleave(size - first)
    length = torch.cat([torch.arange(1, size - at + 1) for at in range(size)])
    return _computed_weights(start, length, size, out_size, how)


def resize_weights(start: Tensor, length: Tensor, size: int, out_size: int, how: str) -> Tensor:
    """The weights that resize a part of each line of ``size`` pixels to ``out_size`` pixels.

    Pixels outside the part do not count, as if it had been cropped first. ``start`` and ``length``
    (B,) int64 are of each part, and ``how`` is one of :func:`mim.data.images.transforms.resizer`,
    whose rounding is meant.

    Returns:
        (B, out_size, size) float64, whole multiples of a power of 2, that sum to 1 in each row but
        for rounding.
    """
    if start.device.type == "cpu" and size * (size + 1) // 2 * out_size * size <= _TABLE:
        place = start * size - start * (start - 1) // 2 + length - 1
        return _table(size, out_size, how)[place]
    return _computed_weights(start, length, size, out_size, how)


def _computed_weights(start: Tensor, length: Tensor, size: int, out_size: int, how: str) -> Tensor:
    device, kind = start.device, how.partition(" ")[2] or "bicubic"
    reach, kernel = _SUPPORT[kind], _bicubic if kind == "bicubic" else _bilinear
    scale = length.double() / out_size  # (B,)
    spread = scale.clamp(min=1.0)
    support = (reach * spread)[:, None]
    places = torch.arange(out_size, dtype=torch.float64, device=device)
    centre = (places + 0.5) * scale[:, None]  # (B, out_size)
    # Towards zero, like a cast to int in C.
    first = (centre - support + 0.5).trunc().long().clamp(min=0)
    last = (centre + support + 0.5).trunc().long().minimum(length[:, None])
    taps = math.ceil(reach * max(1.0, size / out_size)) * 2 + 1
    place = first[:, :, None] + torch.arange(taps, device=device)  # (B, out_size, T)
    weights = kernel((place - centre[:, :, None] + 0.5) * (1.0 / spread)[:, None, None])
    weights = torch.where(place < last[:, :, None], weights, torch.zeros_like(weights))
    total = weights[:, :, 0].clone()
    for tap in range(1, taps):  # one after the other, as both libraries add them
        total += weights[:, :, tap]
    weights /= total[:, :, None]
    weights = _rounded_weights(weights, how)
    lines = torch.zeros(len(start), out_size, size + taps, dtype=torch.float64, device=device)
    lines.scatter_(2, start[:, None, None] + place, weights)
    return lines[:, :, :size]


def _rounded_weights(weights: Tensor, how: str) -> Tensor:
    """(B, out_size, T) rounded to the places that the library keeps, half away from zero."""
    if how.startswith("pil"):
        unit = weights.new_full((1, 1, 1), 2.0**_PIL_PLACES)
    else:
        largest = weights.amax(dim=(1, 2))  # (B,)
        ladder = 2.0 ** torch.arange(1, _TORCH_PLACES + 1, device=weights.device).double()
        fits = torch.floor(0.5 + largest[:, None] * ladder) < _TORCH_LARGEST  # (B, 22)
        unit = 2.0 ** fits.long().cumprod(1).sum(1).double()[:, None, None]
    scaled = weights * unit
    return torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).trunc_().div_(unit)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products, rounded half up to 0 to 255; still float64."""
    half = torch.full((1, 1, 1), 0.5, dtype=torch.float64, device=a.device)
    return torch.baddbmm(half, a, b).floor_().clamp_(0, 255)


def crop_resize(
    images: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int], how: str
) -> Tensor:
    """Crop each image (B, C, h, w), resize it, mirror it where asked.

    ``boxes`` (B, 4) int64 are (top, left, height, width), ``mirrored`` is (B,) bool, both on the
    device of the images. ``how`` is one of :func:`mim.data.images.transforms.resizer`.
    Returns (B, C, H, W) uint8.
    """
    if images.device.type != "cpu":
        return _crop_resize(images, boxes, mirrored, size, how).contiguous()
    result = images.new_empty((*images.shape[:2], *size))
    count = max(1, _PART // max(1, images[:1].numel()))
    parts = (tensor.split(count) for tensor in (images, boxes, mirrored, result))
    for part, box, mirror, into in zip(*parts, strict=True):
        into.copy_(_crop_resize(part, box, mirror, size, how))
    return result


def _crop_resize(
    images: Tensor, boxes: Tensor, mirrored: Tensor, size: tuple[int, int], how: str
) -> Tensor:
    count, channels, height, width = images.shape
    rows = resize_weights(boxes[:, 0], boxes[:, 2], height, size[0], how)  # (B, H, h)
    columns = resize_weights(boxes[:, 1], boxes[:, 3], width, size[1], how)  # (B, W, w)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    lines = images.permute(0, 2, 1, 3).reshape(count, height * channels, width).double()
    across = _product(lines, columns.mT).reshape(count, height, channels * size[1])
    down = _product(rows, across).to(torch.uint8)  # (B, H, C W)
    return down.reshape(count, size[0], channels, size[1]).permute(0, 2, 1, 3)
