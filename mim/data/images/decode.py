"""Bytes of a file to an image, by one rule for each kind of odd file.

What is odd and still an image is taken as it is meant:

- grayscale, black and white, CMYK, palette, alpha: turned to ``data.channels`` channels by
  :func:`mim.data.images.transforms.prepare`; alpha is left out (kept with 4 channels);
- of more than 8 bits, or floats: float32 on the scale of ``data.range`` (``deep.py``); read
  without a :class:`Depth`, as masks are, they stay as they are stored;
- rotated by EXIF, or by XMP alone: upright; damaged EXIF: as stored;
- animated: the first picture;
- tiny: enlarged, down to 1 x 1;
- misnamed (a PNG called .jpg): by its content, never by its name.

JPEG is decoded in full, whatever is cut out of it later: on photographs of ImageNet's size the
reduced sizes of libjpeg save nothing (benchmarks/README.md).

What cannot be decoded whole is :class:`UnreadableImage`, and its reason says why: an empty file,
one that holds no image, one cut short or damaged (never half an image), one of more than
``data.max_pixels``, one with NaN or infinite pixels, what is no regular file.

Everything that opens an image of the user's opens it here. Only the formats of :data:`FORMATS` are
looked for: others of PIL's start programs (Ghostscript for EPS).
"""

from __future__ import annotations

import functools
import io
import logging
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from mim.core.errors import UserError
from mim.core.files import IMAGE_EXTENSIONS, NPY_ERRORS
from mim.data.images.deep import (
    DICOM_AT,
    TIFF,
    ZIP,
    Depth,
    Pixels,
    array_shape,
    channels_last,
    count_pages,
    is_deep_array,
    is_deep_image,
    read_array,
    read_image,
    read_tiff,
    scaled,
)
from mim.data.images.transforms import Picture

EXTENSIONS = IMAGE_EXTENSIONS
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""PIL's names of the formats that are looked for in a file, whatever it is called."""

# What PIL's decoders are known to raise on damaged files, and numpy.
DECODE_ERRORS: tuple[type[Exception], ...] = (
    *NPY_ERRORS,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_READABLE_MODES = {
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"),
    *("I", "I;16", "I;16L", "I;16B", "I;16N"),
}
_NUMPY = b"\x93NUMPY"
_MOST_BYTES = 1 << 31  # of an image's file
_MOST_TEXT = 1 << 26  # bytes of a PNG's text or colour profile; PIL refuses 1 MB, which some have
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = _MOST_TEXT


class UnreadableImage(UserError):
    """An image that cannot be decoded completely."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"unreadable image {name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        return UnreadableImage, (self.name, self.reason)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn what decoders raise on damaged files into :class:`UnreadableImage`."""
    try:
        yield
    except DECODE_ERRORS as error:
        raise UnreadableImage(name, " ".join(str(error).split()) or type(error).__name__) from error


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened for reading; a link may lead to it.

    Raises:
        OSError: if it cannot be opened, or is a pipe, a device or the like, which might never end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is no regular file")
        yield file


def read_file(path: Path) -> bytes:
    """The content of an image's file.

    Raises:
        OSError: see :func:`open_regular`.
        ValueError: if it is larger than 2 GB.
    """
    with open_regular(path) as file:
        check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def check_size(size: int) -> None:
    """Raises ValueError for more bytes than an image's file may have."""
    if size > _MOST_BYTES:
        raise ValueError(f"a file of {size:,} bytes is larger than {_MOST_BYTES:,}")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that the installed PIL reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file: BinaryIO, max_pixels: int | None = None) -> Image.Image:
    """Read the header of an image file; ``max_pixels`` is by default the limit of PIL.

    Raises:
        ValueError: if it begins no image, or one of too many pixels.
    """
    # PIL has a limit of its own, for all of the process; it must not lie below the setting.
    limit = Image.MAX_IMAGE_PIXELS
    if max_pixels is not None and limit is not None and max_pixels > limit:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(file, formats=_formats())
    except Image.UnidentifiedImageError as error:
        raise ValueError("the file holds no image") from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        reason = f"{image.width} x {image.height} pixels are more than data.max_pixels={max_pixels}"
        raise ValueError(reason)
    return image


def _array(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    array_shape(io.BytesIO(data), max_pixels, (np.uint8, np.uint16))
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.dtype == np.uint16:
        values = (values >> 8).astype(np.uint8)
    return values if values.ndim == 3 else values[:, :, None]


def check_header(path: Path, name: str, max_pixels: int, depth: Depth | None = None) -> bool:
    """Check the header of a file, without decoding; whether its pixels have more than 8 bits.

    Raises:
        UnreadableImage: if it begins no image, or one that is too large.
    """
    with decoding(name), open_regular(path) as file:
        return _is_deep(file, max_pixels, depth)


def is_deep(data: bytes, name: str, max_pixels: int, depth: Depth | None) -> bool:
    """:func:`check_header` of the content of a file."""
    with decoding(name):
        return _is_deep(io.BytesIO(data), max_pixels, depth)


def _is_deep(file: BinaryIO, max_pixels: int, depth: Depth | None) -> bool:
    starts = file.read(DICOM_AT.stop)
    file.seek(0)
    if not starts:
        raise ValueError("the file is empty")
    if depth is None and starts.startswith(_NUMPY):
        array_shape(file, max_pixels, (np.uint8, np.uint16))
        return False
    if depth is not None and starts.startswith((_NUMPY, ZIP)):
        return is_deep_array(starts, file, max_pixels)
    if depth is not None and starts[DICOM_AT] == b"DICM":
        return True
    try:
        return is_deep_image(open_image(file, max_pixels), starts) and depth is not None
    except ValueError:
        if depth is None or not starts.startswith(TIFF):
            raise
        return True


def pages_of(path: Path, name: str) -> int:
    """Pages of a file; 1 where it has none, or cannot be read."""
    try:
        with decoding(name), open_regular(path) as file:
            starts = file.read(DICOM_AT.stop)
            file.seek(0)
            if starts.startswith(TIFF):
                return count_pages(open_image(file), b"")
            return count_pages(None, file.read() if starts[DICOM_AT] == b"DICM" else b"")
    except UnreadableImage:
        return 1


@functools.cache
def _has_nvjpeg() -> bool:
    """Whether torchvision decodes on the GPU; says so once if it does not."""
    try:
        from torchvision.io import decode_jpeg, encode_jpeg

        small = encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8))
        decode_jpeg(small, device="cuda")
    except (ImportError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log = logging.getLogger("mim")
        log.warning("data.decode: nvjpeg is not to be had (%s); JPEG is decoded as by auto", reason)
        return False
    return True


def _jpeg(data: bytes, image: Image.Image, decoder: str) -> NDArray[np.uint8] | None:
    """(h, w, 3) of an upright RGB JPEG; None leaves the file to PIL, which knows why it is odd."""
    plain = image.format == "JPEG" and image.mode == "RGB" and "exif" not in image.info
    plain = plain and b"Orientation" not in image.info.get("xmp", b"")
    if decoder == "pil" or not plain:
        return None
    try:
        from torchvision.io import ImageReadMode, decode_jpeg  # slow to import
    except ImportError:  # torchvision means to take it out some day
        return None
    device = "cuda" if decoder == "nvjpeg" and _has_nvjpeg() else "cpu"
    content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        planes = decode_jpeg(content, mode=ImageReadMode.RGB, device=device)  # (3, h, w)
    except RuntimeError:
        return None
    return planes.permute(1, 2, 0).cpu().numpy()


def decode(
    data: bytes, name: str, max_pixels: int, decoder: str = "auto", depth: Depth | None = None
) -> Picture:
    """The image in the content of a file.

    Args:
        data: the content.
        name: what messages call it.
        max_pixels: ``data.max_pixels``.
        decoder: ``data.decode``.
        depth: how pixels of more than 8 bits are read; without it they stay as they are stored.

    Returns:
        A loaded PIL image of one of the modes that ``prepare`` knows, (H, W, C) uint8, or (H, W, C)
        float32 from 0 to 1.

    Raises:
        UnreadableImage: see the head of this file.
    """
    with decoding(name):
        if depth is None and data.startswith(_NUMPY):
            return _array(data, max_pixels)
        image = _opened(data, max_pixels, depth)
        if isinstance(image, Pixels):
            return scaled(image, depth or Depth())
        pixels = _jpeg(data, image, decoder)
        if pixels is not None:
            return pixels
        if depth is not None and (found := read_image(image, data, max_pixels, depth)) is not None:
            return scaled(found, depth)
        image.load()
        if image.mode not in _READABLE_MODES:
            raise ValueError(f"pixels of mode {image.mode} have no range to bring to 0 to 255")
        return image


def stored_values(data: bytes, name: str, max_pixels: int, depth: Depth) -> Pixels | None:
    """The values of an image as they are stored; None where it is a plain one of 8 bits.

    Raises:
        UnreadableImage: see the head of this file.
    """
    with decoding(name):
        image = _opened(data, max_pixels, depth)
        if isinstance(image, Pixels):
            return image
        return read_image(image, data, max_pixels, depth)


def _opened(data: bytes, max_pixels: int, depth: Depth | None) -> Image.Image | Pixels:
    """A file as PIL opens it; with a depth, the values of one that PIL does not know."""
    if not data:
        raise ValueError("the file is empty")
    if depth is not None and (found := read_array(data, max_pixels, depth)) is not None:
        return found
    try:
        return open_image(io.BytesIO(data), max_pixels)
    except ValueError:
        if depth is None or not data.startswith(TIFF):
            raise
        return read_tiff(data, max_pixels, depth)


def picture_of(values: NDArray[np.generic], name: str, depth: Depth | None) -> Picture:
    """An array (H, W), (H, W, C) or (C, H, W) of any numbers as an image.

    Raises:
        UnreadableImage: if it holds no image.
    """
    with decoding(name):
        depth = Depth() if depth is None else depth
        if values.ndim not in (2, 3):
            raise ValueError(f"an array {values.shape} is no image")
        return scaled(Pixels(channels_last(values, depth.channels)), depth)


def read_picture(
    path: str | Path,
    name: str,
    max_pixels: int,
    decoder: str = "auto",
    depth: Depth | None = None,
) -> Picture:
    """The image in a file on disk, by the same rules as those of a source; see :func:`decode`.

    Raises:
        UnreadableImage: see the head of this file.
    """
    with decoding(name):
        data = read_file(Path(path))
    return decode(data, name, max_pixels, decoder, depth)
