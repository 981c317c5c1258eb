"""Common corruptions of images, made on the fly: noise, blur, weather, digital, at 5 severities.

The families, formulas and parameters are those of Hendrycks and Dietterich 2019
(https://arxiv.org/abs/1903.12261, code github.com/hendrycks/robustness): of CIFAR-10-C for small
images, of ImageNet-C for others. Lengths in pixels go with the image's side, over 32 (at least)
or 224. Left out are ``frost`` and ``spatter``, which need photographs and OpenCV's filters: an
ImageNet-C folder has them. Written here on numpy and scipy since the packages that exist draw from
numpy's global generator; here all that is drawn follows from the image's key alone, whatever the
severity, batch or process.

Shapes: H x W pixels, C channels, values from 0 to 1.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import choice_error, setting_error
from mim.core.rng import image_keys, random_bits
from mim.data.images.transforms import Pixels as Stored
from mim.data.images.transforms import eval_transform
from mim.data.sources.base import ImageSource

Pixels: TypeAlias = NDArray[np.floating[Any]]
Rng: TypeAlias = np.random.Generator
SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 128
"""Side in pixels below which the parameters are those of CIFAR-10-C."""


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption."""

    family: str
    """noise, blur, weather or digital."""
    apply: Callable[[Pixels, tuple[float, ...], float, np.random.Generator], Pixels]
    """(image (H, W, C), parameters, pixels over those of the parameters, generator) -> image."""
    large: tuple[Any, ...]
    """ImageNet-C's parameters of each severity."""
    small: tuple[Any, ...]
    """CIFAR-10-C's."""
    benchmark: bool = True
    """Whether it is one of the 15 over which the mean corruption error is taken."""

    def parameters(self, size: tuple[int, int], severity: int) -> tuple[tuple[float, ...], float]:
        """What ``apply`` takes for images of a (height, width)."""
        small = min(size) < SMALL
        value = (self.small if small else self.large)[severity - 1]
        found = value if isinstance(value, tuple) else (value,)
        # Below 32 pixels blurs would vanish if they shrank on.
        return found, max(min(size) / 32, 1.0) if small else min(size) / 224


def _gaussian_filter(x: Pixels, sigma: float, mode: str = "nearest", truncate: float = 4) -> Pixels:
    from scipy import ndimage  # slow to import

    over = (sigma, sigma) + (0,) * (x.ndim - 2)
    filtered: Pixels = ndimage.gaussian_filter(x, over, mode=mode, truncate=truncate)
    return filtered


def _gaussian_noise(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    return x + c[0] * rng.standard_normal(x.shape, np.float32)


def _shot_noise(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    return (rng.poisson(x * c[0]) / c[0]).astype(np.float32)


def _impulse_noise(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    changed, white = rng.random(x.shape) < c[0], rng.random(x.shape) < 0.5
    return np.where(changed, white, x).astype(np.float32)


def _speckle_noise(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    return x + x * c[0] * rng.standard_normal(x.shape, np.float32)


def _gaussian_blur(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    return _gaussian_filter(x, c[0] * unit)


def _disk(radius: float, blur: float) -> Pixels:
    """A disk that sums to 1, its rim smoothed."""
    from scipy import ndimage

    reach = 8 if radius <= 8 else math.ceil(radius)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    kernel = np.exp(-(taps**2) / (2 * blur**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, kernel, axis, mode="constant")
    kept: Pixels = disk / disk.sum()
    rows = kept.sum(1).nonzero()[0]  # the rest only costs time
    return kept[rows[0] : rows[-1] + 1, rows[0] : rows[-1] + 1]


def _defocus_blur(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    kernel = torch.from_numpy(_disk(c[0] * unit, c[1]))[None, None]
    reach = kernel.shape[-1] // 2
    pad = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    planes = torch.from_numpy(np.ascontiguousarray(pad)).permute(2, 0, 1)[:, None]  # (C, 1, h, w)
    return _image(torch.nn.functional.conv2d(planes, kernel)[:, 0])


def _image(planes: Tensor) -> Pixels:
    """(C, H, W) -> (H, W, C)."""
    found: Pixels = planes.permute(1, 2, 0).numpy()
    return found


def _glass_blur(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    """Each pixel takes the colour of a near one, one after the other from the last on."""
    sigma, reach, rounds = c[0] * unit, max(round(c[1] * unit), 1), int(c[2])
    height, width = x.shape[:2]
    blurred = _gaussian_filter(x, sigma)
    rows = np.arange(height - reach, reach, -1)
    columns = np.arange(width - reach, reach, -1)
    taken = list(range(height * width))
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, (len(rows), len(columns), 2))
        to = rows[:, None] * width + columns
        source = to + moves[..., 0] * width + moves[..., 1]
        for place, other in zip(to.ravel().tolist(), source.ravel().tolist(), strict=True):
            taken[place] = taken[other]
    shuffled = blurred.reshape(height * width, -1)[taken].reshape(x.shape)
    return _gaussian_filter(shuffled, sigma)


def _streak(x: Pixels, radius: float, sigma: float, angle: float) -> Pixels:
    """ImageMagick's motion blur: half a Gaussian along a line; ``angle`` in degrees."""
    steps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(steps**2) / (2 * max(sigma, 1e-3) ** 2))
    weights = (weights / weights.sum()).astype(np.float32)
    down = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    across = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    height, width = x.shape[:2]
    pad = int(max(abs(down).max(), abs(across).max()))
    edged = np.pad(x, ((pad, pad), (pad, pad)) + ((0, 0),) * (x.ndim - 2), mode="edge")
    result = np.zeros_like(x)
    for weight, dy, dx in zip(weights, down + pad, across + pad, strict=True):
        result += weight * edged[dy : dy + height, dx : dx + width]
    return result


def _motion_blur(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    return _streak(x, c[0] * unit, c[1] * unit, rng.uniform(-45, 45))


def _zoomed(x: Pixels, factor: float) -> Pixels:
    """The centre, ``factor`` times as large."""
    height, width = x.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    cut = x[top : top + rows, left : left + columns]
    planes = torch.from_numpy(np.ascontiguousarray(cut)).permute(2, 0, 1)[None]
    size = max(round(rows * factor), height), max(round(columns * factor), width)
    grown = torch.nn.functional.interpolate(planes, size, mode="bilinear", align_corners=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return _image(grown[:, top : top + height, left : left + width])


def _zoom_blur(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    factors = np.arange(1, c[0], c[1])
    zoomed = [_zoomed(x, float(factor)) for factor in factors]
    mean: Pixels = (x + np.sum(zoomed, axis=0)) / (len(factors) + 1)
    return mean


def _snow(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    mean, spread, zoom, least, radius, sigma, kept = c
    flakes = mean + spread * rng.standard_normal((*x.shape[:2], 1), np.float32)
    flakes = _zoomed(flakes, max(zoom * unit, 1.0))
    flakes = np.where(flakes < least, 0, np.clip(flakes, 0, 1)).astype(np.float32)
    flakes = _streak(flakes, radius * unit, sigma * unit, rng.uniform(-135, -45))
    gray = x if x.shape[2] == 1 else x @ np.array([[0.299], [0.587], [0.114]], np.float32)
    whitened = kept * x + (1 - kept) * np.maximum(x, gray * 1.5 + 0.5)
    snowed: Pixels = whitened + flakes + np.rot90(flakes, k=2)
    return snowed


def _plasma(side: int, decay: float, rng: Rng) -> NDArray[np.float64]:
    """(side, side) heights from 0 to 1 by the diamond-square algorithm; side is a power of 2."""
    heights = np.zeros((side, side))
    step, wobble = side, 100.0
    while step >= 2:
        half = step // 2

        def near(total: NDArray[np.float64], wobble: float = wobble) -> NDArray[np.float64]:
            return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

        corners = heights[::step, ::step]
        square = corners + np.roll(corners, -1, axis=0)
        square = square + np.roll(square, -1, axis=1)
        heights[half::step, half::step] = near(square)
        centres = heights[half::step, half::step]
        beside = corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = near(centres + np.roll(centres, 1, axis=0) + beside)
        above = corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = near(centres + np.roll(centres, 1, axis=1) + above)
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / max(heights.max(), 1e-12)


def _fog(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    height, width = x.shape[:2]
    side = 1 << max(max(height, width) - 1, 1).bit_length()
    plasma = _plasma(side, c[1], rng)[:height, :width, None]
    brightest = float(x.max())
    fogged: Pixels = (x + c[0] * plasma) * brightest / (brightest + c[0])
    return fogged


def _brightness(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    """Adds to the value of HSV; hue and saturation stay."""
    value = x.max(2, keepdims=True)
    raised = np.clip(value + c[0], 0, 1)
    black = value <= 0
    scaled: Pixels = np.where(black, raised, x * raised / np.where(black, 1, value))
    return scaled


def _saturate(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    """Scales and shifts the saturation of HSV; hue and value stay. Gray has the hue of red."""
    value = x.max(2, keepdims=True)
    lack = 1 - x / np.where(value <= 0, 1, value)  # 0 in the largest channel
    saturation = np.where(value <= 0, 0, lack.max(2, keepdims=True))
    new = np.clip(saturation * c[0] + c[1], 0, 1)
    gray = saturation <= 0
    of_red = np.array([0.0, 1.0, 1.0], np.float32)
    lack = np.where(gray, new * of_red, lack * new / np.where(gray, 1, saturation))
    changed: Pixels = value * (1 - lack)
    return changed


def _contrast(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    mean = x.mean((0, 1), keepdims=True)
    flattened: Pixels = (x - mean) * c[0] + mean
    return flattened


def _elastic(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    """A random affine map, then a smooth random shift of each pixel."""
    from scipy import ndimage

    strength, sigma, corners = (value * unit for value in c)
    height, width = x.shape[:2]
    centre, side = np.array([width // 2, height // 2]), min(height, width) // 3
    before = centre + side * np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])  # (x, y)
    after = before + rng.uniform(-corners, corners, before.shape)
    ones = np.ones((3, 1))
    # Where each pixel of the result comes from: the map that takes the moved corners back.
    back = np.linalg.solve(np.hstack([after, ones]), before)  # (3, 2)
    row, column = np.mgrid[:height, :width].astype(np.float64)
    from_x = column * back[0, 0] + row * back[1, 0] + back[2, 0]
    from_y = column * back[0, 1] + row * back[1, 1] + back[2, 1]
    shifts = [
        strength * _gaussian_filter(rng.uniform(-1, 1, (height, width)), sigma, "reflect", 3)
        for _ in range(2)
    ]
    planes = []
    for channel in range(x.shape[2]):
        warped = ndimage.map_coordinates(x[..., channel], [from_y, from_x], order=1, mode="mirror")
        place = [row + shifts[1], column + shifts[0]]
        planes.append(ndimage.map_coordinates(warped, place, order=1, mode="reflect"))
    return np.stack(planes, axis=2)


def _picture(x: Pixels) -> Image.Image:
    pixels = _bytes(x)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _from_picture(image: Image.Image) -> Pixels:
    pixels = np.asarray(image, np.float32) / 255
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _pixelate(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    height, width = x.shape[:2]
    few = max(int(width * c[0]), 1), max(int(height * c[0]), 1)
    box = Image.Resampling.BOX
    return _from_picture(_picture(x).resize(few, box).resize((width, height), box))


def _jpeg(x: Pixels, c: tuple[float, ...], unit: float, rng: Rng) -> Pixels:
    buffer = io.BytesIO()
    _picture(x).save(buffer, "JPEG", quality=int(c[0]))
    with Image.open(buffer) as image:
        return _from_picture(image)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        "noise", _gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10)
    ),
    "shot_noise": Corruption("noise", _shot_noise, (60, 25, 12, 5, 3), (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(
        "noise", _impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07)
    ),
    "defocus_blur": Corruption(
        "blur",
        _defocus_blur,
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "glass_blur": Corruption(
        "blur",
        _glass_blur,
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ),
    "motion_blur": Corruption(
        "blur",
        _motion_blur,
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    ),
    "zoom_blur": Corruption(
        "blur",
        _zoom_blur,
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    ),
    "snow": Corruption(
        "weather",
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": Corruption(
        "weather",
        _fog,
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    ),
    "brightness": Corruption(
        "weather", _brightness, (0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3)
    ),
    "contrast": Corruption(
        "digital", _contrast, (0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15)
    ),
    "elastic_transform": Corruption(
        "digital",
        _elastic,
        (
            (488, 170.8, 24.4),
            (488, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ),
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    ),
    "pixelate": Corruption(
        "digital", _pixelate, (0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65)
    ),
    "jpeg_compression": Corruption("digital", _jpeg, (25, 18, 15, 10, 7), (80, 65, 58, 50, 40)),
    "speckle_noise": Corruption(
        "noise", _speckle_noise, (0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2), False
    ),
    "gaussian_blur": Corruption(
        "blur", _gaussian_blur, (1, 2, 3, 4, 6), (0.4, 0.6, 0.7, 0.8, 1), False
    ),
    "saturate": Corruption(
        "digital",
        _saturate,
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        False,
    ),
}
"""All that can be made, by ImageNet-C's names."""

BENCHMARK = (
    *(name for name, kind in CORRUPTIONS.items() if kind.benchmark and kind.family != "digital"),
    "frost",
    *(name for name, kind in CORRUPTIONS.items() if kind.benchmark and kind.family == "digital"),
)
"""ImageNet-C's 15, over which its mean corruption error is taken."""


def _bytes(x: Pixels) -> NDArray[np.uint8]:
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)


def corrupt(image: Stored, name: str, severity: int, key: int) -> Stored:
    """Corrupt an image (H, W, C), C of 1 or 3, by one of :data:`CORRUPTIONS`.

    One of more than 8 bits, float32 from 0 to 1, stays so, but for ``pixelate`` and
    ``jpeg_compression``, which know 256 levels.
    Severity 0 leaves it unchanged, 5 is the strongest. What is drawn follows from the key alone,
    see :func:`mim.core.rng.image_keys`.

    Raises:
        UserError: for an unknown name, or channels that it cannot have.
    """
    if name not in CORRUPTIONS:
        raise choice_error("corruption", name, CORRUPTIONS)
    check_channels(name, image.shape[2])
    if severity == 0:
        return image
    kind = CORRUPTIONS[name]
    parameters, unit = kind.parameters((image.shape[0], image.shape[1]), severity)
    rng = np.random.default_rng(key & (1 << 64) - 1)
    is_bytes, values = image.dtype == np.uint8, image.astype(np.float32)
    changed = kind.apply(values / 255 if is_bytes else values, parameters, unit, rng)
    return _bytes(changed) if is_bytes else changed.clip(0, 1).astype(np.float32)


def check_channels(name: str, channels: int) -> None:
    """Refuses images that a corruption is not made for.

    Raises:
        UserError: for channels other than 1 and 3, and for gray images without a saturation.
    """
    if channels not in (1, 3):
        raise setting_error("data.channels", channels, "must be 1 or 3 for corruptions")
    if name == "saturate" and channels == 1:
        raise setting_error("data.channels", channels, "must be 3 for the corruption saturate")


class Corrupted(ImageSource):
    """The images of a source as evaluations see them, at their final size, corrupted.

    What is drawn for an image follows from the seed, the corruption's name and the image's id.
    """

    def __init__(
        self, source: ImageSource, config: DataConfig, name: str, severity: int, seed: int
    ) -> None:
        self.source, self.config = source, config
        self.corruption, self.severity = name, severity
        self.name, self.classes, self.labels = source.name, source.classes, source.labels
        self.sample_ids, self.mean, self.std = source.sample_ids, source.mean, source.std
        self.ledger, self.weights = source.ledger, source.weights
        # Severities share what is drawn: they differ in strength alone.
        keys = image_keys(seed, -1, source.sample_ids, purpose=f"corruption/{name}")
        self.keys = random_bits(keys, 1)[:, 0]

    def image(self, index: int) -> Stored:
        pixels = eval_transform([self.source.image(index)], self.config)[0]  # (C, H, W)
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        return corrupt(image, self.corruption, self.severity, int(self.keys[index]))

    def describe(self, index: int) -> str:
        return self.source.describe(index)
