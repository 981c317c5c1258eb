"""The keyed augmentation, the evaluation transform, image modes, normalising."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.data import (
    crop_parameters,
    eval_transform,
    normalize,
    prepare,
    train_transform,
)
from mim.data.images.transforms import restore


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    shape = (height, width, channels) if channels == 3 else (height, width)
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (100, 100, (0.2, 1.0), (3 / 4, 4 / 3)),
        (60, 160, (0.2, 1.0), (3 / 4, 4 / 3)),
        (40, 400, (0.5, 1.0), (3 / 4, 4 / 3)),
        (300, 30, (0.6, 1.0), (3 / 4, 4 / 3)),
        (200, 200, (0.1, 0.2), (1 / 4, 4.0)),
    ],
    ids=["square", "wide", "very-wide", "very-tall", "thin-crops"],
)
def test_crops_are_distributed_as_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 4000
    keys = image_keys(0, 0, range(count), purpose="augment")
    sizes = torch.tensor([height, width]).expand(count, 2)
    ours, _ = crop_parameters(keys, sizes[:, 0], sizes[:, 1], scale=scale, ratio=ratio)
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw = RandomResizedCrop.get_params
        theirs = torch.tensor([draw(image, list(scale), list(ratio)) for _ in range(count)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= sizes).all()
    for column, name in enumerate(("top", "left", "height", "width")):
        a, b = ours[:, column].double(), theirs[:, column].double()
        # The largest gap between two empirical distributions; 1.95 is its 0.1 % point.
        points = torch.cat([a, b]).unique()
        share_a = torch.searchsorted(a.sort().values, points, right=True) / count
        share_b = torch.searchsorted(b.sort().values, points, right=True) / count
        gap = (share_a - share_b).abs().max().item()
        assert gap < 1.95 * (2 / count) ** 0.5, name


def test_a_crop_that_never_fits_is_the_largest_central_one() -> None:
    keys = image_keys(0, 0, range(50), purpose="augment")
    heights, widths = torch.full((50,), 10), torch.full((50,), 1000)
    boxes, _ = crop_parameters(keys, heights, widths, scale=(0.9, 1.0), ratio=(0.75, 4 / 3))
    assert boxes.tolist() == [[0, (1000 - 13) // 2, 10, 13]] * 50  # 10 * 4/3 rounds to 13


def test_half_the_images_are_mirrored_independently_of_their_crop() -> None:
    keys = image_keys(0, 0, range(4000), purpose="augment")
    size = torch.full((4000,), 64)
    boxes, mirrored = crop_parameters(keys, size, size)
    assert abs(mirrored.double().mean() - 0.5) < 0.03
    for column in range(4):
        pair = torch.stack([mirrored.double(), boxes[:, column].double()])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.06, column


def test_the_augmentation_is_a_function_of_image_and_key() -> None:
    config = DataConfig(image_size=16)
    images = [noise(20 + i, 30 - i, seed=i) for i in range(8)]
    keys = image_keys(3, 1, range(8), purpose="augment")
    together = train_transform(images, keys, config)
    assert together.shape == (8, 3, 16, 16)
    assert together.dtype == torch.uint8
    for i in range(8):
        alone = train_transform([images[i]], keys[i : i + 1], config)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=0)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])
    shuffled = train_transform([images[i] for i in order], keys[order], config)
    assert torch.equal(shuffled, together[order])
    other = train_transform(images, image_keys(3, 2, range(8), purpose="augment"), config)
    assert all(not torch.equal(a, b) for a, b in zip(together, other, strict=True))


def test_the_crop_shows_the_pixels_of_its_box() -> None:
    image = noise(40, 50)
    config = DataConfig(image_size=(24, 32))
    keys = image_keys(0, 0, range(20), purpose="augment")
    boxes, mirrored = crop_parameters(keys, torch.full((20,), 40), torch.full((20,), 50))
    out = train_transform([image] * 20, keys, config)
    assert mirrored.any() and not mirrored.all()
    for row, ((top, left, height, width), flip) in enumerate(
        zip(boxes.tolist(), mirrored.tolist(), strict=True)
    ):
        cut = image.crop((left, top, left + width, top + height))
        lines = cut.resize(
            (32, height), Image.Resampling.BICUBIC
        )  # first, whatever Pillow would do
        expected = lines.resize((32, 24), Image.Resampling.BICUBIC)
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert np.array_equal(out[row].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_without_flip_or_augmentation_nothing_is_mirrored_or_cut() -> None:
    image = noise(16, 16)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    keys = image_keys(0, 0, range(8), purpose="augment")
    whole = DataConfig(image_size=16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=False)
    for config in (whole, DataConfig(image_size=16, augment="none")):
        out = train_transform([image] * 8, keys, config)
        assert torch.equal(out, pixels.expand(8, -1, -1, -1))


def test_evaluation_leaves_an_image_of_the_right_size_alone() -> None:
    image = noise(24, 32)
    out = eval_transform([image], DataConfig(image_size=(24, 32)))
    assert np.array_equal(out[0].permute(1, 2, 0).numpy(), np.asarray(image))


@pytest.mark.parametrize("size", [(37, 91), (91, 37), (7, 1000), (24, 31), (23, 32), (5, 5)])
def test_evaluation_covers_any_shape_and_keeps_the_centre(size: tuple[int, int]) -> None:
    height, width = size
    ramp = np.tile(np.linspace(0, 255, width), (height, 1)).round().astype(np.uint8)
    out = eval_transform([Image.fromarray(ramp)], DataConfig(image_size=(24, 32), channels=1))
    assert out.shape == (1, 1, 24, 32)
    values = out[0, 0].double()
    # Left and right lose the same, to one column (8 of 255).
    assert abs(values.mean() - 127.5) < 4.5
    assert (values.diff(dim=1) >= 0).all()


def test_evaluation_keeps_the_aspect_ratio() -> None:
    image = noise(48, 96)
    out = eval_transform([image], DataConfig(image_size=(24, 32)))
    halved = np.asarray(image.resize((48, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(out[0].permute(1, 2, 0).numpy(), halved[:, 8:40])


def test_every_mode_reaches_the_wanted_channels() -> None:
    gray = noise(8, 8, channels=1)
    colour = noise(8, 8)
    alpha = colour.copy()
    alpha.putalpha(gray)
    palette = colour.quantize(16)
    clear = palette.copy()
    clear.info["transparency"] = bytes(range(16))
    images = [gray, colour, alpha, palette, clear, colour.convert("CMYK"), gray.convert("1")]
    images += [gray.convert("LA"), colour.convert("YCbCr"), gray.convert("I"), gray.convert("F")]
    for image in images:
        for channels, mode in ((1, "L"), (3, "RGB")):
            result = prepare(image, channels)
            assert isinstance(result, Image.Image)
            assert (result.mode, result.size) == (mode, (8, 8)), image.mode
    rgb = prepare(alpha, 3)
    assert isinstance(rgb, Image.Image)
    assert np.array_equal(np.asarray(rgb), np.asarray(colour))


def test_sixteen_bits_keep_their_upper_eight() -> None:
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(prepare(deep, 1)).tolist() == [[0, 1, 128, 255]]


def test_exif_orientation_is_applied() -> None:
    image = noise(6, 10)
    image.getexif()[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    upright = prepare(image, 3)
    assert isinstance(upright, Image.Image)
    assert upright.size == (6, 10)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), k=-1))


def test_arrays_of_many_channels_pass_and_others_are_refused() -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 12, 5), dtype=np.uint8)
    config = DataConfig(image_size=12, channels=5)
    assert np.array_equal(eval_transform([values], config)[0].permute(1, 2, 0).numpy(), values)
    keys = image_keys(0, 0, range(1), purpose="augment")
    five = train_transform([values], keys, config)[0]
    last = train_transform([values[:, :, 4:]], keys, DataConfig(image_size=12, channels=1))[0]
    assert torch.equal(five[4:], last)  # all channels are cut alike
    with pytest.raises(UserError, match=r"data\.channels: 4"):
        prepare(values, 4)
    with pytest.raises(UserError, match=r"data\.channels: 5"):
        prepare(noise(8, 8), 5)


def test_normalizing_by_hand_and_back() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    mean, std = (0.5, 0.1, 0.0), (0.5, 0.2, 0.25)
    normal = normalize(images, mean, std)
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.flatten(), torch.tensor([-1.0, 0.5, 4.0]))
    back = restore(normal, mean, std)
    torch.testing.assert_close(back.flatten(), torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (3, 1, 300, 200), (0, 3, 4, 4)])
def test_normalizing_bytes_in_parts_is_the_formula(shape: tuple[int, ...]) -> None:
    """Large and small batches, an empty one, and channels last give the formula bit for bit."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    mean, std = (0.3, 0.5, 0.6)[: shape[1]], (0.2, 0.1, 0.3)[: shape[1]]
    expected = images.float() / 255
    for channel in range(shape[1]):
        plane = expected[:, channel] - torch.tensor(mean[channel])
        expected[:, channel] = plane / torch.tensor(std[channel])
    kept = images.clone()
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(normalize(given, mean, std), expected)
    assert torch.equal(images, kept)
    assert torch.equal(normalize(images.float() / 255, mean, std), expected)


@pytest.mark.parametrize("size", [32, 40, 144])
def test_the_result_is_written_where_it_is_wanted(size: int) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (48, 50, 3), dtype=np.uint8) for _ in range(6)]
    keys = image_keys(0, 0, range(6), purpose="augment")
    for config in (DataConfig(image_size=size), DataConfig(image_size=size, augment="none")):
        out = torch.full((6, 3, size, size), 7, dtype=torch.uint8)
        assert train_transform(images, keys, config, out) is out
        assert torch.equal(out, train_transform(images, keys, config))


def test_small_arrays_are_cut_together_as_they_are_alone() -> None:
    """Arrays of one size, of several, and PIL images give the same bytes."""
    rng = np.random.default_rng(2)
    arrays = [rng.integers(0, 256, (30, 32, 3), dtype=np.uint8) for _ in range(9)]
    keys = image_keys(0, 0, range(10), purpose="augment")
    config = DataConfig(image_size=32)
    together = train_transform(arrays, keys[:9], config)
    pil = train_transform([Image.fromarray(a) for a in arrays], keys[:9], config)
    odd = rng.integers(0, 256, (31, 32, 3), dtype=np.uint8)
    assert torch.equal(together, pil)
    assert torch.equal(together, train_transform([*arrays, odd], keys, config)[:9])
