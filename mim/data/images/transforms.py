"""Images to tensors: the keyed training augmentation, the fixed evaluation transform, normalising.

The augmentation is MAE's (He et al. 2022, https://arxiv.org/abs/2111.06377): a random resized crop
with bicubic interpolation and a mirror image. What it draws depends only on the image's key, so
an image is cut alike whatever batch, worker or process it is in.

Shapes: B images, C channels, H x W pixels of the result.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

from mim.core.config import DataConfig
from mim.core.device import to_device
from mim.core.errors import UserError, setting_error
from mim.core.patches import Images, Patches
from mim.core.rng import uniforms
from mim.data.images.batched import crop_resize

Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
"""(height, width, channels): bytes, or float32 from 0 to 1 of images of more than 8 bits."""
Picture: TypeAlias = Image.Image | Pixels
"""What a source gives: a PIL image of any mode, or pixels."""

_TRIES = 10
_TORCH_FROM = 128  # pixels; below, torch's call costs more than its arithmetic saves
_ALONE_FROM = 65  # pixels; below, the calls for each image cost more than dense products
_AT_ONCE = 1 << 17  # numbers; what is normalised at once stays in a core's cache
_LONGEST = 16  # times the final size; a longer image loses its ends before it is scaled
_ORIENTATION = 0x0112  # EXIF tag
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
LUMINANCE = (0.299, 0.587, 0.114)
"""Share of red, green and blue in gray: ITU-R 601, PIL's own."""


def upright(image: Image.Image) -> Image.Image:
    """An image as EXIF says it is seen; the same object where that is as it is stored."""
    try:
        if image.getexif().get(_ORIENTATION, 1) not in range(2, 9):
            return image
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return image  # damaged EXIF says nothing


def prepare(image: Picture, channels: int) -> Picture:
    """Make an image upright with 1 (grayscale), 3 (RGB) or 4 (RGBA) channels; an array of as many
    channels is taken as it is.

    EXIF orientation is applied, and where it is damaged the image stays as stored. Alpha is left
    out, but for 4 channels; 16-bit images keep their upper 8 bits.

    Raises:
        UserError: if the image cannot be turned into this number of channels.
    """
    if isinstance(image, np.ndarray):
        given = image.shape[2]
        if given == channels:
            return image
        if given not in (1, 3) or channels not in _MODES:
            reason = f"does not fit images of {given} channels"
            raise setting_error("data.channels", channels, reason)
        if image.dtype == np.float32:
            return _float_channels(image, channels)
        image = Image.fromarray(image[:, :, 0] if given == 1 else image)
    if channels not in _MODES:
        raise setting_error("data.channels", channels, "must be 1, 3 or 4 for this source's images")
    image = upright(image)
    if image.mode == _MODES[channels]:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL would clip at 255 and turn most of a 16-bit image white.
        upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        image = Image.fromarray(upper.astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    elif channels == 4 and image.mode in ("CMYK", "YCbCr", "HSV"):  # have no way to RGBA
        image = image.convert("RGB")
    try:
        return image.convert(_MODES[channels])
    except ValueError as error:
        raise UserError(f"data: cannot turn a {image.mode} image to {_MODES[channels]}") from error


def _float_channels(image: Pixels, channels: int) -> Pixels:
    """Float pixels of 1 or 3 channels with 1, 3 or 4, as PIL would."""
    if channels == 1:
        return (image @ np.array(LUMINANCE, dtype=np.float32))[:, :, None]
    colours = image if image.shape[2] == 3 else image.repeat(3, axis=2)
    opaque = np.ones((*image.shape[:2], channels - 3), dtype=np.float32)
    return np.concatenate([colours, opaque], axis=2)


def crop_parameters(
    keys: Tensor,
    heights: Tensor,
    widths: Tensor,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
    clamp: bool = False,
) -> tuple[Tensor, Tensor]:
    """The crop and the mirror of each key, distributed as in torchvision's RandomResizedCrop.

    An area and an aspect ratio are drawn until the crop fits, ten times at most; then the largest
    central crop of an allowed ratio is taken. With ``clamp`` the first is cut to the image instead,
    as in MAE's linear probe, whose crops are larger. A key always uses the same count of numbers.

    Args:
        keys: (B,) int64, from :func:`mim.core.rng.image_keys` with purpose "augment".
        heights: (B,) int64, of the images, as are widths.
        scale: smallest and largest fraction of the area, drawn uniformly.
        ratio: smallest and largest width over height, its logarithm drawn uniformly.

    Returns:
        boxes (B, 4) int64 as (top, left, height, width), and mirrored (B,) bool.
    """
    draws = uniforms(keys, 2 * _TRIES + 3)  # (B, 23)
    areas, ratios = draws[:, :_TRIES], draws[:, _TRIES : 2 * _TRIES]  # (B, 10) each
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * areas)
    aspect = torch.exp(low + (high - low) * ratios)
    width = torch.round(torch.sqrt(area * aspect)).long()  # (B, 10)
    height = torch.round(torch.sqrt(area / aspect)).long()
    if clamp:
        width, height = (x.clamp(min=1) for x in (width, height))
        width, height = width.minimum(widths[:, None]), height.minimum(heights[:, None])
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)  # (B, 1), 0 where none fits
    crop = torch.stack([height.gather(1, first)[:, 0], width.gather(1, first)[:, 0]], dim=1)
    room = torch.stack([heights, widths], dim=1) - crop  # (B, 2)
    corner = torch.floor(draws[:, -3:-1] * (room + 1)).long().minimum(room)

    whole = widths.double() / heights
    central_height = torch.where(whole < ratio[0], torch.round(widths / ratio[0]).long(), heights)
    central_width = torch.where(whole > ratio[1], torch.round(heights * ratio[1]).long(), widths)
    central = torch.stack([central_height, central_width], dim=1).clamp(min=1)
    central = central.minimum(torch.stack([heights, widths], dim=1))
    middle = (torch.stack([heights, widths], dim=1) - central) // 2

    found = fits.any(dim=1, keepdim=True)
    boxes = torch.where(found, torch.cat([corner, crop], 1), torch.cat([middle, central], 1))
    return boxes, draws[:, -1] < 0.5


def size_of(image: Picture) -> tuple[int, int]:
    """(height, width)."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    return image.height, image.width


def resizer(config: DataConfig) -> str:
    """What makes the images of a config: "pil", "torch", "pil bilinear" or "torch bilinear".

    Without a second word it is bicubic. It follows from the config alone, never from where an image
    comes from.
    """
    library: str = config.resize
    if library == "auto":
        library = "torch" if max(config.size) >= _TORCH_FROM else "pil"
    return library if config.interpolation == "bicubic" else f"{library} {config.interpolation}"


def resize(image: Picture, size: tuple[int, int], how: str) -> Pixels:
    """(H, W, C), by antialiased interpolation: lines first, then columns.

    The image is one of :func:`prepare`, and ``how`` one of :func:`resizer`.
    :func:`mim.data.images.batched.crop_resize` gives the same bytes.
    """
    library, _, mode = how.partition(" ")
    mode = mode or "bicubic"
    is_float = isinstance(image, np.ndarray) and image.dtype == np.float32
    if library == "torch" or is_float:
        pixels = _pixels(image)
        if pixels.shape[:2] == size:
            return pixels
        if not pixels.flags.writeable:  # a warning of torch's; nothing is written
            pixels = pixels.copy()
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, C, h, w), channels last
        done = functional.interpolate(planes, size, mode=mode, antialias=True)
        done = done.clamp_(0, 1) if is_float else done  # bytes cannot overshoot either
        return done[0].permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray):
        if image.shape[2] != 3:
            split = [Image.fromarray(image[:, :, channel]) for channel in range(image.shape[2])]
            return np.concatenate([resize(plane, size, how) for plane in split], axis=2)
        image = Image.fromarray(image)
    height, width = size
    resample = Image.Resampling[mode.upper()]
    # Left to itself, Pillow chooses which way to go first, and not in all versions alike.
    if image.width != width and image.height > height:
        image = image.resize((width, image.height), resample)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    return _pixels(image)


def _pixels(image: Picture) -> Pixels:
    """(h, w, C)."""
    pixels: Pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def cut_out(image: Picture, box: tuple[int, int, int, int]) -> Picture:
    """The box (top, left, height, width) of an image."""
    top, left, height, width = box
    if isinstance(image, np.ndarray):
        return image[top : top + height, left : left + width]
    if box == (0, 0, image.height, image.width):
        return image
    return image.crop((left, top, left + width, top + height))


def dtype_of(images: Sequence[Picture]) -> torch.dtype:
    """uint8, or float32 for a batch in which any image has more than 8 bits."""
    deep = any(isinstance(image, np.ndarray) and image.dtype == np.float32 for image in images)
    return torch.float32 if deep else torch.uint8


def _output(out: Tensor | None, images: Sequence[Picture], config: DataConfig) -> Tensor:
    """(B, C, H, W) to write to."""
    shape = (len(images), config.channels, *config.size)
    return torch.empty(shape, dtype=dtype_of(images)) if out is None else out


def write_planes(pixels: Pixels, plane: Tensor) -> None:
    """Write (H, W, C) to (C, H, W), as bytes or from 0 to 1."""
    values: NDArray[Any] = pixels.transpose(2, 0, 1)
    if plane.dtype == torch.float32 and values.dtype == np.uint8:
        values = values.astype(np.float32) / 255
    plane.numpy()[:] = values


def train_transform(
    images: Sequence[Picture], keys: Tensor, config: DataConfig, out: Tensor | None = None
) -> Tensor:
    """The training images (B, C, H, W) of one batch, by their keys (B,) int64.

    Augmented as ``data.augment`` says; written to ``out`` where it is given.
    """
    if config.augment == "none" and not config.color_jitter:
        return eval_transform(images, config, out)
    upright = [prepare(image, config.channels) for image in images]
    if config.color_jitter:
        upright = list(map(jitter, upright, keys, [config.color_jitter] * len(upright)))
    if config.augment == "none":
        return eval_transform(upright, config, out)
    if config.augment == "padded_crop":
        whole = [torch.from_numpy(cover_all(image, config).copy()) for image in upright]
        planes = _output(out, images, config)
        return padded_crops([x.permute(2, 0, 1) for x in whole], keys, config, planes)
    sizes = torch.tensor([size_of(image) for image in upright], dtype=torch.int64).reshape(-1, 2)
    boxes, mirrored = drawn_crops(keys, sizes, config)
    how, planes = resizer(config), _output(out, images, config)
    if (stacked := _small_stack(upright, config)) is not None:
        return planes.copy_(crop_resize(stacked, boxes, mirrored, config.size, how))
    for row, (image, box) in enumerate(zip(upright, boxes.tolist(), strict=True)):
        write_planes(resize(cut_out(image, tuple(box)), config.size, how), planes[row])
    for row in mirrored.nonzero()[:, 0].tolist():  # torch mirrors planes several times as fast
        planes[row] = planes[row].flip(-1)
    return planes


def drawn_crops(keys: Tensor, sizes: Tensor, config: DataConfig) -> tuple[Tensor, Tensor]:
    """:func:`crop_parameters` of images of sizes (B, 2) as a config says."""
    scale, ratio, clamp = config.crop_scale, config.crop_ratio, config.crop_fit == "clamp"
    boxes, mirrored = crop_parameters(
        keys, sizes[:, 0], sizes[:, 1], scale=scale, ratio=ratio, clamp=clamp
    )
    return boxes, mirrored & config.flip


def jitter(image: Picture, key: Tensor, strength: float) -> Pixels:
    """(h, w, 3) with torchvision's ColorJitter of three parts, by the image's key."""
    pixels = torch.from_numpy(_pixels(image).copy()).permute(2, 0, 1)
    draws = uniforms(key[None], 6, stream=2)[0]
    factors = (1 + strength * (2 * draws[:3] - 1)).tolist()
    change = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)
    for part in draws[3:].argsort().tolist():
        pixels = change[part](pixels, factors[part])
    return pixels.permute(1, 2, 0).numpy()


def cover_all(image: Picture, config: DataConfig) -> Pixels:
    """(h, w, C): an image of :func:`prepare` resized until it covers the size, uncropped."""
    box, scaled, _ = covering(size_of(image), config.size)
    return resize(cut_out(image, box), scaled, resizer(config))


def padded_crops(images: Sequence[Tensor], keys: Tensor, config: DataConfig, out: Tensor) -> Tensor:
    """Random crops of images (C, h, w) with ``data.pad`` reflected pixels around them, mirrored.

    What is drawn follows from the keys (B,); written to ``out`` (B, C, H, W).
    """
    height, width = config.size
    for row, (image, (down, right, mirror)) in enumerate(
        zip(images, uniforms(keys, 3).tolist(), strict=True)
    ):
        padded = vision.pad(image, [config.pad], padding_mode="reflect")
        top = int(down * (padded.shape[1] - height + 1))
        left = int(right * (padded.shape[2] - width + 1))
        cut = padded[:, top : top + height, left : left + width]
        cut = cut.flip(-1) if config.flip and mirror < 0.5 else cut
        is_byte = cut.dtype == torch.uint8 and out.dtype == torch.float32
        out[row] = cut / 255 if is_byte else cut
    return out


def _small_stack(images: Sequence[Picture], config: DataConfig) -> Tensor | None:
    """(B, C, h, w) uint8 where small arrays of one size are cut faster together than one by one."""
    arrays = [image for image in images if isinstance(image, np.ndarray)]
    shapes = {image.shape for image in arrays}
    if len(arrays) < len(images) or len(shapes) != 1 or dtype_of(arrays) != torch.uint8:
        return None
    if max(*shapes.pop()[:2], *config.size) >= _ALONE_FROM:
        return None
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def covering(
    given: tuple[int, int], size: tuple[int, int], share: float = 1.0
) -> tuple[tuple[int, int, int, int], tuple[int, int], tuple[int, int]]:
    """How an image of a (height, width) is scaled until it covers ``size``, and then cropped.

    With a ``share`` below 1 it covers ``size`` divided by it, with torchvision's rounding (Resize,
    CenterCrop). Of a long thin image only the middle is scaled: all of it would become as much
    larger.

    Returns:
        The box (top, left, height, width) that is scaled, the (height, width) it is scaled to, and
        (top, left) of the centre in that.
    """
    outer = tuple(math.floor(side / share) for side in size)
    scale = max(outer[0] / given[0], outer[1] / given[1])
    kept, corner, scaled, centre = [], [], [], []
    for whole, final, cover in zip(given, size, outer, strict=True):
        most = math.ceil(_LONGEST * final / scale)
        # As much at either end, so that the centre stays where it is.
        away = max(0, (whole - most) // 2)
        kept.append(whole - 2 * away)
        corner.append(away)
        # Rounding must not leave a side one pixel short.
        exact = kept[-1] * scale
        scaled.append(max(round(exact) if share == 1 else int(exact), cover))
        spare = scaled[-1] - final
        centre.append(spare // 2 if share == 1 else round(spare / 2))
    return (corner[0], corner[1], kept[0], kept[1]), (scaled[0], scaled[1]), (centre[0], centre[1])


def cover(image: Picture, size: tuple[int, int], how: str, share: float = 1.0) -> Pixels:
    """(H, W, C): scaled as :func:`covering` says, then the centre."""
    box, scaled, (top, left) = covering(size_of(image), size, share)
    return resize(cut_out(image, box), scaled, how)[top : top + size[0], left : left + size[1]]


def eval_transform(
    images: Sequence[Picture], config: DataConfig, out: Tensor | None = None
) -> Tensor:
    """Images (B, C, H, W) as evaluations see them: resized, then cropped.

    An image of the size is unchanged where ``data.eval_crop`` leaves nothing out. Written to
    ``out`` where it is given.
    """
    how, planes = resizer(config), _output(out, images, config)
    for row, image in enumerate(images):
        upright = prepare(image, config.channels)
        write_planes(cover(upright, config.size, how, config.eval_share), planes[row])
    return planes


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """(C, 1, 1) float32 on the device of ``like``."""
    return to_device(torch.tensor(values, dtype=torch.float32), like.device)[:, None, None]


@overload
def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor: ...
@overload
def normalize(images: Patches, mean: Sequence[float], std: Sequence[float]) -> Patches: ...
def normalize(images: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Normalise (B, C, H, W), or patches, to float32; padding holds 0.

    Images are uint8, or float32 from 0 to 1.
    ``mean`` and ``std`` are of each channel on the scale 0 to 1.
    """
    if isinstance(images, Patches):
        values = images.values.unflatten(-1, (-1, len(mean)))  # (B, N, pixels, C)
        values = values.permute(0, 3, 1, 2)  # channels as those of an image
        values = normalize(values, mean, std).permute(0, 2, 3, 1)
        return images.with_values(values.flatten(-2))
    means, stds = _per_channel(mean, images), _per_channel(std, images)
    if images.dtype == torch.float32:
        return (images - means) / stds
    if images.dtype != torch.uint8 or images.device.type != "cpu":
        return (images.to(torch.float32) / 255 - means) / stds
    # On a CPU the way to memory and back, four times, costs more than the arithmetic.
    normalized = torch.empty(images.shape, dtype=torch.float32)
    count = max(1, _AT_ONCE // max(1, images[:1].numel()))
    for part, into in zip(images.split(count), normalized.split(count), strict=True):
        torch.div(part, 255, out=into).sub_(means).div_(stds)
    return normalized


def restore(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The inverse of :func:`normalize`: (B, C, H, W) float32 on the scale 0 to 1, or beyond it."""
    return images.to(torch.float32) * _per_channel(std, images) + _per_channel(mean, images)
