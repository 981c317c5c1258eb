"""Corruptions: as published, drawn by the image's key alone, nothing at severity 0."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import color

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import CORRUPTIONS, Corrupted, Subset, corrupt, eval_loader, open_source
from mim.data.corruptions import BENCHMARK, _disk, _streak

PHOTOS = DataConfig(source="photos", image_size=32, batch_size=64)


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    source = open_source(PHOTOS, "val")
    loader = eval_loader(source, PHOTOS, batch_size=1, indices=[0])
    pixels: NDArray[np.uint8] = next(iter(loader)).images[0].permute(1, 2, 0).numpy()
    return pixels


def gray(value: float, size: int = 64) -> NDArray[np.uint8]:
    return np.full((size, size, 3), round(255 * value), np.uint8)


def moved(image: NDArray[np.uint8], name: str, severity: int, key: int = 7) -> NDArray[np.float64]:
    changed = corrupt(image, name, severity, key)
    return (changed.astype(np.float64) - image) / 255


def test_the_benchmark_is_imagenet_cs() -> None:
    assert len(BENCHMARK) == 15 and set(BENCHMARK) - set(CORRUPTIONS) == {"frost"}


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_each_severity_changes_images_of_any_shape(name: str, photo: NDArray[np.uint8]) -> None:
    assert corrupt(photo, name, 0, 1) is photo
    results = [corrupt(photo, name, severity, 1) for severity in range(1, 6)]
    for result in results:
        assert result.shape == photo.shape and result.dtype == np.uint8
        assert (result != photo).mean() > 0.005
    # As published, two severities of glass and motion blur are all but one for small images.
    assert len({result.tobytes() for result in results}) >= (4 if "blur" in name else 5)
    wide = np.concatenate([photo, photo], axis=1)[:20]
    assert corrupt(wide, name, 3, 1).shape == wide.shape
    large = photo.repeat(5, 0).repeat(6, 1)  # ImageNet-C's parameters
    assert corrupt(large, name, 2, 1).shape == large.shape
    if name != "saturate":
        assert corrupt(photo[:, :, :1], name, 2, 1).shape == (32, 32, 1)


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_what_is_drawn_follows_from_the_key_alone(name: str, photo: NDArray[np.uint8]) -> None:
    first = corrupt(photo, name, 4, 11)
    np.random.seed(3)
    torch.manual_seed(3)
    random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert np.array_equal(corrupt(photo, name, 4, 11), first)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    draws = "noise glass motion snow fog elastic"
    if any(word in name for word in draws.split()):
        assert not np.array_equal(corrupt(photo, name, 4, 12), first)


def test_images_are_the_same_in_any_batch_worker_and_order() -> None:
    source = Subset(open_source(PHOTOS, "val"), range(12))
    config = PHOTOS
    corrupted = Corrupted(source, config, "gaussian_noise", 3, seed=0)

    def pixels(images: Corrupted, batch_size: int, workers: int = 0) -> dict[int, bytes]:
        data = DataConfig(source="photos", image_size=32, workers=workers)
        batches = list(eval_loader(images, data, batch_size=batch_size))
        found = torch.cat([batch.images for batch in batches])
        ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
        return {i: image.numpy().tobytes() for i, image in zip(ids, found, strict=True)}

    whole = pixels(corrupted, 12)
    assert len(set(whole.values())) == 12
    assert pixels(corrupted, 5) == pixels(corrupted, 4, workers=1) == whole
    back = Corrupted(Subset(source, range(11, -1, -1)), config, "gaussian_noise", 3, seed=0)
    assert pixels(back, 12) == whole
    assert pixels(Corrupted(source, config, "gaussian_noise", 3, seed=1), 12) != whole
    clean = pixels(Corrupted(source, config, "gaussian_noise", 0, seed=0), 12)
    plain = torch.cat([batch.images for batch in eval_loader(source, config)])
    assert list(clean.values()) == [image.numpy().tobytes() for image in plain]


def test_noises_have_the_published_strength() -> None:
    middle = gray(0.5)
    value = middle[0, 0, 0] / 255
    for severity, scale in ((1, 0.04), (3, 0.08), (5, 0.10)):  # CIFAR-10-C's
        change = moved(middle, "gaussian_noise", severity)
        assert change.mean() == pytest.approx(0, abs=0.003)
        assert change.std() == pytest.approx(scale, rel=0.03)
    # One draw for all severities: they differ in strength alone.
    weak, strong = moved(middle, "gaussian_noise", 1), moved(middle, "gaussian_noise", 5)
    assert np.corrcoef(weak.ravel(), strong.ravel())[0, 1] > 0.99
    assert moved(middle, "shot_noise", 5).std() == pytest.approx((value / 50) ** 0.5, rel=0.03)
    assert moved(middle, "speckle_noise", 2).std() == pytest.approx(value * 0.1, rel=0.03)
    salted = corrupt(middle, "impulse_noise", 5, 7)
    assert (salted != middle).mean() == pytest.approx(0.07, abs=0.005)
    assert set(np.unique(salted)) == {0, 128, 255}
    assert (salted == 255).mean() == pytest.approx(0.035, abs=0.005)
    large = gray(0.5, 128)  # ImageNet-C's
    assert moved(large, "gaussian_noise", 1).std() == pytest.approx(0.08, rel=0.03)


def test_colours_are_those_of_hsv(photo: NDArray[np.uint8]) -> None:
    hsv = color.rgb2hsv(photo / 255)
    for name, channel, change in (
        ("brightness", 2, lambda v: v + 0.15),
        ("saturate", 1, lambda s: s * 1.5),
    ):
        wanted = hsv.copy()
        wanted[..., channel] = np.clip(change(wanted[..., channel]), 0, 1)
        expected = 255 * color.hsv2rgb(wanted)
        assert np.abs(corrupt(photo, name, 3, 0) - expected).max() <= 0.51
    # A gray image has no hue; like everybody's HSV, it takes red.
    red = corrupt(gray(0.5, 8), "saturate", 5, 0)[0, 0]
    assert red[0] == 128 and red[1] == red[2] == round(128 * 0.8)
    assert (corrupt(gray(0.0, 8), "brightness", 2, 0) == 26).all()


def test_digital_ones_by_hand(photo: NDArray[np.uint8]) -> None:
    halves = np.concatenate([gray(0.2, 8), gray(0.6, 8)])
    flat = corrupt(halves, "contrast", 2, 0) / 255  # half the distance from the mean, 0.4
    assert flat[0, 0, 0] == pytest.approx(0.3, abs=0.003)
    assert flat[-1, 0, 0] == pytest.approx(0.5, abs=0.003)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=58)
    assert np.array_equal(corrupt(photo, "jpeg_compression", 3, 0), np.asarray(Image.open(buffer)))
    box = Image.Resampling.BOX
    small = Image.fromarray(photo).resize((24, 24), box).resize((32, 32), box)
    assert np.array_equal(corrupt(photo, "pixelate", 4, 0), np.asarray(small))


def test_blurs_move_light_and_make_none() -> None:
    for radius, blur in ((0.3, 0.4), (1.5, 0.1), (3, 0.1), (10, 0.5)):
        disk = _disk(radius, blur)
        assert disk.sum() == pytest.approx(1) and np.allclose(disk, disk[::-1, ::-1])
    assert (_disk(3, 0.1) > 1e-6).sum() == 29  # places within 3 of the middle
    point = np.zeros((41, 41, 1), np.float32)
    point[20, 20] = 1
    streak = _streak(point, 5, 3, 0.0)[:, :, 0]
    assert streak.sum() == pytest.approx(1) and np.flatnonzero(streak.sum(1)).tolist() == [20]
    tail = streak[20][streak[20] > 0]
    expected = np.exp(-(np.arange(11) ** 2) / 18)
    assert np.allclose(sorted(tail, reverse=True), expected / expected.sum(), atol=1e-6)
    spot = gray(0.5, 33)
    spot[16, 16] = 255
    for name in ("defocus_blur", "gaussian_blur", "zoom_blur", "glass_blur", "motion_blur"):
        assert abs(moved(spot, name, 5).mean()) < 2e-3
        assert (corrupt(gray(0.5), name, 5, 0) == gray(0.5)).all()


def test_images_of_more_than_8_bits_keep_theirs(photo: NDArray[np.uint8]) -> None:
    """Float images are corrupted as bytes are, and their values are not cut down to 256 levels."""
    for name in CORRUPTIONS:
        for key in (1, 2):
            deep = corrupt(photo.astype(np.float32) / 255, name, 3, key)
            assert deep.dtype == np.float32 and deep.min() >= 0 and deep.max() <= 1
            gap = np.abs(deep * 255 - corrupt(photo, name, 3, key))
            assert gap.max() < 0.51, name
    faint = photo.astype(np.float32) / 255 / 1000  # one level of 8 bits
    for name in ("contrast", "brightness", "gaussian_blur", "fog"):
        assert len(np.unique(corrupt(faint, name, 3, 1))) > 200, name


def test_what_cannot_be_made_is_told(photo: NDArray[np.uint8]) -> None:
    with pytest.raises(UserError, match=r"corruption: 'frost' is not one of .*fog"):
        corrupt(photo, "frost", 1, 0)
    with pytest.raises(UserError, match="must be 3 for the corruption saturate"):
        corrupt(photo[:, :, :1], "saturate", 1, 0)
    with pytest.raises(UserError, match=r"data\.channels: 4 must be 1 or 3 for corruptions"):
        corrupt(np.zeros((8, 8, 4), np.uint8), "fog", 1, 0)
