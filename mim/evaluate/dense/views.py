"""Views of an image and of what is marked on it: scaled, cut or padded, mirrored; their batches.

A view is numbers only, so that the image, its mask and its boxes are moved alike. What is drawn
for a training view depends on the image's key alone.

Shapes: B images, H x W pixels of the result.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from mim.core.config import DataConfig
from mim.core.rng import image_keys, permutation, uniforms
from mim.data.images.transforms import Picture, Pixels, dtype_of, size_of, write_planes
from mim.data.loader import Batch, StepBatches, steps_per_epoch
from mim.data.sources.base import ImageSource

T = TypeVar("T")
_MOST = 1 << 26  # pixels of a scaled image that is held as a whole


@dataclass(frozen=True)
class View:
    """Scaled to ``scaled``, then ``size`` pixels from ``corner`` on, then perhaps mirrored.

    What lies outside the scaled image is padding.
    """

    scaled: tuple[int, int]
    """(height, width) of the whole image after scaling."""
    corner: tuple[int, int]
    """(top, left) in the scaled image of what is cut out."""
    size: tuple[int, int]
    """(height, width) of the result."""
    mirrored: bool = False

    @property
    def kept(self) -> tuple[int, int]:
        """(height, width), from the top left, of the part of the result that is not padding."""
        (height, width), (top, left) = self.scaled, self.corner
        return min(height - top, self.size[0]), min(width - left, self.size[1])

    def move(
        self, value: T, fill: int | tuple[int, ...] = 0, resample: int = Image.Resampling.BILINEAR
    ) -> T:
        """Move an image, a mask or torchvision's ``BoundingBoxes``, all by the same operations.

        Boxes are cut at the rim of what is kept of the image.

        Args:
            value: of the size of the original image.
            fill: of the padding, one value or one a channel.
            resample: how an image is scaled; nearest for a mask.
        """
        rows, columns = self.kept
        if isinstance(value, Image.Image) and math.prod(self.scaled) > _MOST:
            value = cast(T, self._scaled_part(value, resample))
        else:
            value = F.resize(value, list(self.scaled), resample)
            value = F.crop(value, *self.corner, rows, columns)
        value = F.pad(value, [0, 0, self.size[1] - columns, self.size[0] - rows], fill)
        return F.horizontal_flip(value) if self.mirrored else value

    def _scaled_part(self, image: Image.Image, resample: int) -> Image.Image:
        """What is kept of an image, scaled alone: the whole of a thin one does not fit in memory.

        It is that of the whole but for rounding: one level of a pixel, a row of a mask.
        """
        (top, left), (rows, columns) = self.corner, self.kept
        down, across = image.height / self.scaled[0], image.width / self.scaled[1]
        box = (left * across, top * down, (left + columns) * across, (top + rows) * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return image.resize((columns, rows), Image.Resampling(resample), box)

    def pixels(
        self,
        image: Picture,
        fill: int | tuple[int, ...],
        resample: int = Image.Resampling.BILINEAR,
    ) -> NDArray[Any]:
        """:meth:`move` of an image, as (H, W) or (H, W, C) where it has channels.

        ``fill`` is from 0 to 255 for float images, too.
        """
        if isinstance(image, Image.Image):
            return np.array(self.move(image, fill, resample))
        channels = image.shape[2]
        fills: Any = (fill,) * channels if isinstance(fill, int) else fill
        if image.dtype == np.float32:
            fills = [value / 255 for value in fills]
        elif channels in (1, 3):
            image = image.squeeze(2) if channels == 1 else image
            return self.pixels(Image.fromarray(image), fill, resample)
        planes = [Image.fromarray(image[:, :, channel]) for channel in range(channels)]
        moved = [self.move(plane, f, resample) for plane, f in zip(planes, fills, strict=True)]
        return np.stack([np.asarray(plane) for plane in moved], axis=2)

    def boxes(self, boxes: Tensor, original: tuple[int, int]) -> Tensor:
        """:meth:`move` of boxes (n, 4) as left, top, right, bottom.

        Args:
            boxes: in pixels of the original image.
            original: its (height, width).
        """
        form = tv_tensors.BoundingBoxFormat.XYXY
        given = tv_tensors.BoundingBoxes(boxes, format=form, canvas_size=original)
        return self.move(given).as_subclass(Tensor)

    def original_boxes(self, boxes: Tensor, original: tuple[int, int]) -> Tensor:
        """The inverse of :meth:`boxes` for a view that is not mirrored, cut at the image's rim."""
        down, across = self.scaled[0] / original[0], self.scaled[1] / original[1]
        top, left = self.corner
        moved = boxes + boxes.new_tensor([left, top, left, top])
        moved = moved / boxes.new_tensor([across, down, across, down])
        height, width = original
        limit = boxes.new_tensor([width, height, width, height])
        return moved.maximum(boxes.new_zeros(4)).minimum(limit)


def _scaled(original: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(round(original[0] * factor), 1), max(round(original[1] * factor), 1)


def cover_factor(original: tuple[int, int], size: tuple[int, int]) -> float:
    """Factor by which an image just covers ``size``."""
    return max(size[0] / original[0], size[1] / original[1])


def fit_factor(original: tuple[int, int], size: tuple[int, int]) -> float:
    """Factor by which an image just fits into ``size``."""
    return min(size[0] / original[0], size[1] / original[1])


def training_view(
    key: Tensor,
    original: tuple[int, int],
    size: tuple[int, int],
    factor: float,
    scale: tuple[float, float],
    flip: bool,
) -> View:
    """The view of one image in one epoch.

    Args:
        key: (1,) int64, of :func:`mim.core.rng.image_keys`.
        original: (height, width) of the image.
        size: of the result.
        factor: by which the image is scaled where the drawn scale is 1.
        scale: from and to of the scale, which is drawn uniformly.
        flip: whether half of the images are mirrored.
    """
    draw = uniforms(key, 4)[0].tolist()
    drawn = scale[0] + (scale[1] - scale[0]) * draw[0]
    scaled = _scaled(original, factor * drawn)
    room = max(scaled[0] - size[0], 0), max(scaled[1] - size[1], 0)
    corner = int(draw[1] * (room[0] + 1)), int(draw[2] * (room[1] + 1))
    return View(scaled, corner, size, flip and draw[3] < 0.5)


def whole_view(original: tuple[int, int], factor: float) -> View:
    """All of an image, scaled."""
    scaled = _scaled(original, factor)
    return View(scaled, (0, 0), scaled)


def fitted_view(original: tuple[int, int], size: tuple[int, int]) -> View:
    """All of an image, scaled until it fits, padded at the right or below."""
    scaled = _scaled(original, fit_factor(original, size))
    return View((min(scaled[0], size[0]), min(scaled[1], size[1])), (0, 0), size)


def stack_pixels(pixels: Sequence[NDArray[Any]]) -> Tensor:
    """(H, W) or (H, W, C) arrays -> (B, C, H, W): uint8, or float32 where any of them is."""
    whole: list[Pixels] = [each if each.ndim == 3 else each[:, :, None] for each in pixels]
    height, width, channels = whole[0].shape
    stacked = torch.empty(len(whole), channels, height, width, dtype=dtype_of(whole))
    for image, planes in zip(whole, stacked, strict=True):
        write_planes(image, planes)
    return stacked


class DenseBatches(StepBatches):
    """Step -> training views with what is marked on them, a pure function.

    Args:
        source: the training images.
        data: size, channels, batch_size and flip are read.
        seed: order and views follow from it.
        scale: from and to of the random scale.
        fill: value 0 to 255 of the padding, one or one a channel.
    """

    def __init__(
        self,
        source: ImageSource,
        data: DataConfig,
        seed: int,
        scale: tuple[float, float],
        fill: int | tuple[int, ...],
    ) -> None:
        super().__init__(source, data)
        self.seed, self.scale, self.fill = seed, scale, fill
        self.per_epoch = steps_per_epoch(source, data)
        self.share = slice(None)  # of a batch, for one of several processes

    @abstractmethod
    def read(self, index: int, key: Tensor) -> tuple[NDArray[Any], Any]:
        """The pixels of an image's view by its key (1,), and what is marked there."""

    @abstractmethod
    def collate(self, marks: Sequence[Any], **images: Any) -> Batch:
        """A batch of these fields and of what is marked on its images."""

    def view(self, image: Picture, key: Tensor, factor: float) -> View:
        """The training view of an image, ``factor`` being its scale 1."""
        size = self.config.size
        return training_view(key, size_of(image), size, factor, self.scale, self.config.flip)

    def batch(self, number: int) -> Batch:
        epoch, position = divmod(number, self.per_epoch)
        order = permutation(self.seed, epoch, len(self.source))
        count = self.config.batch_size
        indices = order[position * count : (position + 1) * count][self.share]
        ids = self.source.sample_ids[indices]
        keys = image_keys(self.seed, epoch, ids, purpose="augment")
        pixels, marks = zip(*map(self.read, indices.tolist(), keys.split(1)), strict=True)
        return self.collate(
            marks,
            images=stack_pixels(pixels),
            labels=None,
            sample_ids=ids,
            epoch=epoch,
            step=number,
        )
