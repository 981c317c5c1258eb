"""Resizing in batches gives the bytes of Pillow and of torch, and JPEG the pixels of PIL."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.data import train_transform
from mim.data.images.batched import crop_resize
from mim.data.images.decode import UnreadableImage, decode
from mim.data.images.transforms import resize, resizer


@pytest.mark.parametrize("how", ["pil", "torch"])
@pytest.mark.parametrize(
    ("given", "wanted"),
    [((32, 32), (32, 32)), ((48, 20), (24, 40)), ((100, 80), (16, 16)), ((7, 5), (9, 3))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_batched_crops_are_the_librarys_own_bytes(
    how: str, given: tuple[int, int], wanted: tuple[int, int], channels: int
) -> None:
    rng = np.random.default_rng(0)
    count = 24
    images = rng.integers(0, 256, (count, *given, channels), dtype=np.uint8)
    images[: count // 2] = images[: count // 2] // 128 * 255  # overshoots, so that clipping counts
    boxes = []
    for _ in range(count):
        height, width = (int(rng.integers(1, side + 1)) for side in given)
        top = int(rng.integers(0, given[0] - height + 1))
        boxes.append((top, int(rng.integers(0, given[1] - width + 1)), height, width))
    mirrored = torch.from_numpy(rng.random(count) < 0.5)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    got = crop_resize(batch, torch.tensor(boxes), mirrored, wanted, how)
    assert got.shape == (count, channels, *wanted) and got.dtype == torch.uint8
    for index, (top, left, height, width) in enumerate(boxes):
        cut = images[index, top : top + height, left : left + width]
        alone = resize(cut, wanted, how)
        alone = alone[:, ::-1] if mirrored[index] else alone
        assert np.array_equal(got[index].permute(1, 2, 0).numpy(), alone), boxes[index]


def test_the_bytes_are_those_of_one_call_of_pillow_where_nothing_shrinks() -> None:
    values = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    whole = Image.fromarray(values).resize((32, 40), Image.Resampling.BICUBIC)
    assert np.array_equal(resize(values, (40, 32), "pil"), np.asarray(whole))


def test_the_library_follows_from_the_config_alone() -> None:
    assert resizer(DataConfig(image_size=127)) == "pil"
    assert resizer(DataConfig(image_size=(64, 128))) == "torch"
    assert resizer(DataConfig(image_size=224, resize="pil")) == "pil"
    for name, value in (("resize", "lanczos"), ("decode", "opencv")):
        with pytest.raises(UserError, match=rf"data\.{name}: '{value}' is not one of auto"):
            DataConfig(**{name: value})
    with pytest.raises(UserError, match=r"data\.decode: 'nvjpeg' needs data\.workers=0"):
        DataConfig(decode="nvjpeg", workers=2)


def test_both_libraries_agree_but_for_rounding() -> None:
    rng = np.random.default_rng(2)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((300, 200))
    keys = image_keys(0, 0, range(8), purpose="augment")
    a, b = (
        train_transform([smooth] * 8, keys, DataConfig(image_size=144, resize=how)).int()
        for how in ("pil", "torch")
    )
    assert 0 < (a - b).abs().max() <= 2


def _jpeg(mode: str = "RGB", seed: int = 0, **options: object) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (13, 11, 3), dtype=np.uint8)).resize((83, 61))
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def _rgb(picture: object) -> np.ndarray:
    return np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)


@pytest.mark.parametrize(
    "data",
    [
        _jpeg(),
        _jpeg(quality=60, subsampling=2),
        _jpeg(progressive=True, subsampling=1),
        _jpeg("L"),
        _jpeg("CMYK"),
    ],
    ids=["plain", "420", "progressive", "gray", "cmyk"],
)
def test_every_decoder_gives_pils_pixels(data: bytes) -> None:
    expected = _rgb(decode(data, "x", 10**6, "pil"))
    for decoder in ("auto", "torchvision"):
        assert np.array_equal(_rgb(decode(data, "x", 10**6, decoder)), expected)
    assert isinstance(decode(_jpeg(), "x", 10**6, "auto"), np.ndarray)
    assert isinstance(decode(_jpeg(), "x", 10**6, "pil"), Image.Image)


def test_a_jpeg_that_is_cut_anywhere_is_unreadable_for_every_decoder() -> None:
    data = _jpeg(quality=90)
    for end in range(1, len(data) - 2, 41):
        for decoder in ("auto", "pil"):
            with pytest.raises(UnreadableImage):
                decode(data[:end], "x", 10**6, decoder)


def test_exif_rotation_is_left_to_pil() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _jpeg(exif=exif)
    assert isinstance(decode(data, "x", 10**6), Image.Image)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nvjpeg_falls_back_and_says_so_in_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mim.data.images import decode as module

    module._has_nvjpeg.cache_clear()
    data = _jpeg()
    for _ in range(2):
        assert np.array_equal(
            _rgb(decode(data, "x", 10**6, "nvjpeg")), _rgb(decode(data, "x", 10**6))
        )
    (record,) = caplog.records
    assert record.getMessage().startswith("data.decode: nvjpeg is not to be had (")
    assert "\n" not in record.getMessage()
