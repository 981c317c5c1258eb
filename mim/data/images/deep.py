"""Images of more than 8 bits: integers, floats, any number of channels, pages, DICOM.

They become float32, by one linear scale: ``data.range`` says which values are 0 and 1, and what
lies outside is cut off. 8-bit images are no business of this file: they stay bytes.

Shapes: H x W pixels, C channels.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import Image

from mim.core.config import DataConfig
from mim.data.images.transforms import upright

ZIP = b"PK\x03\x04"
TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
DICOM_AT = slice(128, 132)  # where DICOM's four letters stand
PERCENTILES = (0.5, 99.5)
_MOST_CHANNELS_FIRST = 64  # a longer first axis is one of space
_BIT_DEPTH_AT = 24  # of a PNG
_BITS, _SAMPLES, _FORMAT = 258, 277, 339  # TIFF tags

Values: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Depth:
    """How images of more than 8 bits are read, see the settings of the same names."""

    range: tuple[float, float] | str | None = None
    """Values that become 0 and 1, or percentile or window. None, where nothing was measured, takes
    integers by the largest of their type, and no floats."""
    channels: int | None = None
    """Tells the channels of an array from its rows."""
    pages: str = "first"
    page: int | None = None
    """Of a file whose pages are images."""
    nonfinite: float | None = None


def depth_of(config: DataConfig) -> Depth | None:
    """The depth of a config; None for ``high_byte``."""
    if config.range == "high_byte":
        return None
    span = config.measured.range if config.range == "auto" else config.range
    return Depth(span, config.channels, config.pages, nonfinite=config.nonfinite)


@dataclass(frozen=True)
class Pixels:
    """An image as it is stored."""

    values: Values
    """(H, W, C)."""
    window: tuple[float, float] | None = None
    """What a DICOM file wants to be shown from black to white."""
    is_inverted: bool = False
    """Whether the least value is white."""


def array_shape(
    file: IO[bytes], max_pixels: int, dtypes: Sequence[DTypeLike] = ()
) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """Shape and type in the header of an ``.npy``.

    Raises:
        ValueError: where it promises no image, or too large a one.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    fits = dtype in dtypes if dtypes else dtype.kind in "buif"
    if len(shape) not in (2, 3) or not fits or 0 in shape:
        raise ValueError(f"an array {shape} of {dtype} is no image")
    if np.prod(shape) > 4 * max_pixels or (len(shape) == 2 and np.prod(shape) > max_pixels):
        raise ValueError(f"more pixels than data.max_pixels={max_pixels}")
    return shape, dtype


def _member(archive: zipfile.ZipFile) -> str:
    """The array of an ``.npz`` that is its image: the only one, or the one called image."""
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    usual = [name for name in names if name in ("image.npy", "arr_0.npy")]
    if len(names) != 1 and not usual:
        found = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
        raise ValueError(f"an .npz holds one array, or one called image; this one has {found}")
    return usual[0] if usual else names[0]


def _array(data: bytes, max_pixels: int, channels: int | None) -> Values:
    """(H, W, C) of an ``.npy`` or ``.npz``."""
    if data.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = _member(archive)
            with archive.open(name) as file:
                array_shape(file, max_pixels)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return channels_last(arrays[name.removesuffix(".npy")], channels)
    array_shape(io.BytesIO(data), max_pixels)
    return channels_last(np.load(io.BytesIO(data), allow_pickle=False), channels)


def channels_last(values: Values, channels: int | None) -> Values:
    """(H, W), (H, W, C) or (C, H, W) as (H, W, C); ``channels`` says which where both could be."""
    if values.ndim == 2:
        return values[:, :, None]
    first, _, last = values.shape
    if last == channels:
        return values
    is_first = first == channels or (first < last and first <= _MOST_CHANNELS_FIRST)
    return np.moveaxis(values, 0, 2) if is_first else values


def is_deep_array(starts: bytes, file: BinaryIO, max_pixels: int) -> bool:
    """Whether an ``.npy`` or ``.npz`` has more than 8 bits, from its header."""
    if not starts.startswith(ZIP):
        return array_shape(file, max_pixels)[1].itemsize > 1
    with zipfile.ZipFile(file) as archive, archive.open(_member(archive)) as member:
        return array_shape(member, max_pixels)[1].itemsize > 1


def is_deep_image(image: Image.Image, starts: bytes) -> bool:
    """Whether an opened image has more than 8 bits; ``starts`` are the first bytes of its file."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return True
    if image.format == "PNG":
        return starts[_BIT_DEPTH_AT] > 8
    tags = getattr(image, "tag_v2", {})
    return max(tags.get(_BITS, (8,))) > 8 or tags.get(_SAMPLES, 1) > 4


def read_array(data: bytes, max_pixels: int, depth: Depth) -> Pixels | None:
    """The image of an ``.npy``, ``.npz`` or DICOM file; None for any other."""
    if data.startswith((b"\x93NUMPY", ZIP)):
        return Pixels(_array(data, max_pixels, depth.channels))
    return _dicom(data, max_pixels, depth) if data[DICOM_AT] == b"DICM" else None


def read_image(image: Image.Image, data: bytes, max_pixels: int, depth: Depth) -> Pixels | None:
    """An opened image with all its bits; None where that is what PIL gives anyway."""
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    is_deep = is_deep_image(image, data)
    if not is_deep and (pages == 1 or depth.pages == "first"):
        return None
    if image.format == "PNG" and image.mode not in ("I", "I;16", "I;16B"):
        return Pixels(_deep_png(data))
    if is_deep and len(image.getbands()) > 1:
        return read_tiff(data, max_pixels, depth)
    chosen = chosen_pages(pages, depth, image.width * image.height, max_pixels)
    parts = []
    for page in chosen:
        if image.format == "TIFF":
            image.seek(page)
        values = np.asarray(upright(image))
        tags = getattr(image, "tag_v2", {})
        if image.mode == "I" and values.dtype == np.int32 and tags.get(_FORMAT, (1,))[0] == 1:
            values = values.view(np.uint32)  # PIL takes it for signed
        parts.append(values if values.ndim == 3 else values[:, :, None])
    return Pixels(_side_by_side(parts))


def chosen_pages(count: int, depth: Depth, pixels: int, max_pixels: int) -> list[int]:
    """Which pages of a file make the image.

    Raises:
        ValueError: if it has too many pixels, or has not the page.
    """
    if depth.page is not None:
        if depth.page >= count:
            raise ValueError(f"it has {count} pages now")
        return [depth.page]
    if depth.pages != "channels":
        return [0]
    if count * pixels > 4 * max_pixels:
        raise ValueError(f"{count} pages have more pixels than data.max_pixels={max_pixels} allows")
    return [*range(count)]


def _side_by_side(parts: Sequence[Values]) -> Values:
    shapes = {part.shape for part in parts}
    if len(shapes) > 1:
        sizes = ", ".join(f"{shape[0]} x {shape[1]}" for shape in sorted(shapes))
        raise ValueError(f"its pages differ ({sizes}) and cannot be channels of one image")
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


def _deep_png(data: bytes) -> Values:
    """(H, W, C) of a 16-bit PNG in colour, which PIL cuts down to 8 bits."""
    import torch

    try:
        from torchvision.io import ImageReadMode, decode_png
    except ImportError as error:  # torchvision means to take it out some day
        raise ValueError("a 16-bit PNG in colour: save it as TIFF or .npy") from error
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        planes = decode_png(content, ImageReadMode.UNCHANGED, apply_exif_orientation=True)
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return planes.permute(1, 2, 0).numpy()


def read_tiff(data: bytes, max_pixels: int, depth: Depth) -> Pixels:
    """A TIFF that PIL cannot read, or would cut down to 8 bits."""
    import tifffile  # which scikit-image brings, and few images need

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            first = file.pages.first
            size = first.imagewidth * first.imagelength
            if size > max_pixels:
                raise ValueError(f"{size:,} pixels are more than data.max_pixels={max_pixels}")
            parts = []
            for page in chosen_pages(len(file.pages), depth, size, max_pixels):
                values, axes = file.pages[page].asarray(), file.pages[page].axes
                if "S" in axes:
                    values = np.moveaxis(values, axes.index("S"), -1)
                parts.append(values if values.ndim == 3 else values[:, :, None])
    except (tifffile.TiffFileError, RuntimeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return Pixels(_side_by_side(parts))


def _dicom(data: bytes, max_pixels: int, depth: Depth) -> Pixels:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut
    except ImportError as error:
        raise ValueError("DICOM needs the package pydicom: pip install pydicom") from error
    try:
        found = pydicom.dcmread(io.BytesIO(data))
        size = int(found.Rows) * int(found.Columns)
        if size > max_pixels:
            raise ValueError(f"{size:,} pixels are more than data.max_pixels={max_pixels}")
        pages = int(found.get("NumberOfFrames") or 1)
        chosen = chosen_pages(pages, depth, size, max_pixels)
        stored = found.pixel_array
        frames = stored if pages > 1 else stored[None]
        parts = [apply_modality_lut(frames[page], found) for page in chosen]
    except Exception as error:  # pydicom and its decoders raise many kinds
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    parts = [part if part.ndim == 3 else part[:, :, None] for part in parts]
    window = None
    centre, width = found.get("WindowCenter"), found.get("WindowWidth")
    if centre is not None and width is not None:
        centres, widths = (np.atleast_1d(np.asarray(v, dtype=float)) for v in (centre, width))
        middle, half = centres[0] - 0.5, max(widths[0] - 1, 1) / 2  # DICOM part 3, C.11.2.1.2
        window = (float(middle - half), float(middle + half))
    return Pixels(_side_by_side(parts), window, found.PhotometricInterpretation == "MONOCHROME1")


def count_pages(image: Image.Image | None, data: bytes) -> int:
    """Pages of a TIFF that is opened, or of a DICOM file; 1 for any other."""
    if image is not None:
        return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1
    if data[DICOM_AT] != b"DICM":
        return 1
    import pydicom

    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    return int(header.get("NumberOfFrames") or 1)


def finite(values: Values, nonfinite: float | None) -> Values:
    """The values, with ``nonfinite`` in the place of NaN and infinity.

    Raises:
        ValueError: if there are such values and nothing stands in for them.
    """
    if values.dtype.kind not in "buif":
        raise ValueError(f"pixels of {values.dtype} are no numbers")
    if values.dtype.kind != "f" or (is_finite := np.isfinite(values)).all():
        return values
    if nonfinite is None:
        many = f"{values.size - int(is_finite.sum()):,} of {values.size:,}"
        raise ValueError(f"{many} values are NaN or infinite (data.nonfinite replaces them)")
    return np.where(is_finite, values, values.dtype.type(nonfinite))


def scaled(pixels: Pixels, depth: Depth) -> NDArray[np.uint8] | NDArray[np.float32]:
    """(H, W, C) uint8 as they are, or float32 from 0 to 1 by the range.

    Raises:
        ValueError: for values that are no numbers, NaN, or floats of which no range is known.
    """
    values = finite(pixels.values, depth.nonfinite)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        whole = np.ascontiguousarray(values)
        return 255 - whole if pixels.is_inverted else whole
    low, high = _ends(pixels, values, depth)
    work: Values = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    unit = (work - low) / (high - low if high > low else 1.0)
    grey = unit.clip(0, 1).astype(np.float32)
    return np.ascontiguousarray(1 - grey if pixels.is_inverted else grey)


def _ends(pixels: Pixels, values: Values, depth: Depth) -> tuple[float, float]:
    """The values that become 0 and 1."""
    if depth.range == "percentile":
        low, high = np.percentile(values, PERCENTILES)
        return float(low), float(high)
    if depth.range == "window":
        if pixels.window is None:
            raise ValueError("it names no window, which data.range=window needs")
        return pixels.window
    if isinstance(depth.range, tuple):
        return depth.range
    if values.dtype.kind == "f":
        raise ValueError("floating-point values need a data.range, such as [0, 1] or percentile")
    return 0.0, float(np.iinfo(values.dtype).max)
