"""Targets that are images: against hand-worked numbers and a Fourier transform."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mim.core.config import LowPassConfig
from mim.core.errors import UserError
from mim.core.patches import patchify, unpatchify
from mim.model.targets import Target

Make = Callable[..., Target]
# 4 x 4 pixels in patches of 2 x 2: the patches are [0 1 2 3], [4 6 8 10], [5 5 5 5], [-1 1 -1 1].
IMAGE = torch.tensor([[0, 1, 4, 6], [2, 3, 8, 10], [5, 5, -1, 1], [5, 5, -1, 1]]).double()
PATCHES = [[0, 1, 2, 3], [4, 6, 8, 10], [5, 5, 5, 5], [-1, 1, -1, 1]]
TIGHT = {"rtol": 0, "atol": 1e-12}


def test_pixels(make: Make) -> None:
    target = make("pixels")
    assert target.dim == 4
    assert target(IMAGE[None, None])[0].tolist() == PATCHES
    prediction = torch.randn(1, 4, 4)
    assert torch.equal(target.to_pixels(prediction, IMAGE[None, None]), prediction)


def test_normalized_pixels_by_hand(make: Make) -> None:
    got = make("normalized_pixels")(IMAGE[None, None])[0]
    # Means 1.5, 7, 5, 0; sums of squared differences 5, 20, 0, 4, over 3: the unbiased variance.
    first = math.sqrt(5 / 3 + 1e-6)
    second = math.sqrt(20 / 3 + 1e-6)
    last = math.sqrt(4 / 3 + 1e-6)
    expected = [
        [-1.5 / first, -0.5 / first, 0.5 / first, 1.5 / first],
        [-3 / second, -1 / second, 1 / second, 3 / second],
        [0, 0, 0, 0],  # a flat patch stays finite
        [-1 / last, 1 / last, -1 / last, 1 / last],
    ]
    worked = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, worked, rtol=1e-14, atol=1e-14)


def test_normalized_pixels_are_normalised_over_all_channels_together(make: Make) -> None:
    target = make("normalized_pixels", channels=3)
    got = target(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert got.shape == (2, 4, 12) and target.dim == 12
    torch.testing.assert_close(got.mean(-1), torch.zeros(2, 4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.var(-1), torch.ones(2, 4).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["pixels", "normalized_pixels", "frequency"])
def test_a_perfect_prediction_is_the_image(name: str, make: Make, images_of: Any) -> None:
    target = make(name, (2, 4), 3)
    images = images_of(target)
    pixels = target.to_pixels(target(images), images)
    torch.testing.assert_close(unpatchify(pixels, (2, 4), (2, 2)), images, **TIGHT)


# --- Low pass ------------------------------------------------------------------------------------


def wave(height: int, width: int, row: int, column: int) -> Tensor:
    """(1, 1, H, W), ``row`` and ``column`` half cosine cycles over the image, mirrored smoothly."""
    down = torch.cos(math.pi / height * row * (torch.arange(height).double() + 0.5))
    across = torch.cos(math.pi / width * column * (torch.arange(width).double() + 0.5))
    return torch.outer(down, across)[None, None]


def filtered(target: Target, images: Tensor) -> Tensor:
    return unpatchify(target(images), target.context.patch_size, target.context.grid)


@pytest.mark.parametrize(
    ("row", "column", "stays"),
    [
        (0, 0, True),  # the mean
        (5, 0, True),  # 5 / 20 of Nyquist
        (6, 0, False),  # 6 / 20
        (0, 3, True),  # 3 / 12: as far, on the shorter side
        (0, 4, False),
        (3, 2, True),  # (0.15, 0.167): 0.224 together
        (4, 2, False),  # (0.2, 0.167): 0.26
        (19, 11, False),
    ],
)
def test_ideal_keeps_what_is_below_the_cutoff_and_nothing_else(
    row: int, column: int, stays: bool, make: Make
) -> None:
    target = make("low_pass", (5, 3), grid=(4, 4), low_pass=LowPassConfig(cutoff=0.25))
    image = wave(20, 12, row, column)
    torch.testing.assert_close(filtered(target, image), image * stays, **TIGHT)


def test_gaussian_halves_the_power_at_the_cutoff(make: Make) -> None:
    settings = LowPassConfig(cutoff=0.25, filter="gaussian")
    target = make("low_pass", (5, 3), grid=(4, 4), low_pass=settings)
    for row, power in ((0, 1.0), (5, 1 / 2), (10, 1 / 16)):
        image = wave(20, 12, row, 0)
        torch.testing.assert_close(filtered(target, image), image * math.sqrt(power), **TIGHT)


@pytest.mark.parametrize("filter_", ["ideal", "gaussian"])
def test_low_pass_is_the_fourier_filter_of_the_mirrored_image(
    filter_: str, make: Make, images_of: Any
) -> None:
    settings = LowPassConfig(cutoff=0.4, filter=filter_)
    target = make("low_pass", (4, 2), 3, (3, 5), low_pass=settings)
    images = images_of(target)
    down = np.concatenate([images.numpy(), images.numpy()[:, :, ::-1]], axis=2)
    mirrored = np.concatenate([down, down[..., ::-1]], axis=3)  # (B, C, 24, 20)
    rows, columns = np.fft.fftfreq(24)[:, None] * 2, np.fft.fftfreq(20)[None] * 2
    share = np.hypot(rows, columns) / 0.4
    gain = share <= 1 if filter_ == "ideal" else 2 ** (-(share**2) / 2)
    low = np.fft.ifft2(np.fft.fft2(mirrored) * gain).real[:, :, :12, :10]
    torch.testing.assert_close(filtered(target, images), torch.from_numpy(low), **TIGHT)


def test_one_border_does_not_leak_into_the_opposite_one(make: Make) -> None:
    target = make("low_pass", (4, 4), grid=(8, 8), low_pass=LowPassConfig(0.3, "gaussian"))
    image = torch.zeros(1, 1, 32, 32).double()
    image[..., -4:] = 100.0
    low = filtered(target, image)
    assert low[..., :8].abs().max() < 1e-3 and low[..., -1].min() > 70


def test_the_highest_cutoff_keeps_the_image(make: Make, images_of: Any) -> None:
    target = make("low_pass", (4, 2), 3, low_pass=LowPassConfig(math.sqrt(2)))
    images = images_of(target)
    torch.testing.assert_close(filtered(target, images), images, **TIGHT)
    prediction = torch.randn(2, 4, 24)
    assert torch.equal(target.to_pixels(prediction, images), prediction)


def test_low_pass_patches_may_be_normalised(make: Make, images_of: Any) -> None:
    plain = make("low_pass", (4, 4), 3)
    target = make("low_pass", (4, 4), 3, low_pass=LowPassConfig(normalize=True))
    images = images_of(target)
    got = target(images)
    torch.testing.assert_close(got.mean(-1), torch.zeros(2, 4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.var(-1), torch.ones(2, 4).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(target.to_pixels(got, images), plain(images), **TIGHT)


@pytest.mark.parametrize("is_normalized", [False, True])
def test_the_fourier_form_is_pixmims(is_normalized: bool, make: Make, images_of: Any) -> None:
    """An ideal disk around the middle of the shifted spectrum, on the scale 0 to 1."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    settings = LowPassConfig(4 / 8, normalize=is_normalized, transform="fourier")
    target = make("low_pass", (4, 4), 3, (4, 6), mean=mean, std=std, low_pass=settings).double()
    images = images_of(target) / 3
    scale, shift = np.array(std)[:, None, None], np.array(mean)[:, None, None]
    spectrum = np.fft.fftshift(np.fft.fft2(images.numpy() * scale + shift), axes=(-2, -1))
    for row, column in np.ndindex(16, 24):
        if (row - 7.5) ** 2 + (column - 11.5) ** 2 > 4**2:
            spectrum[..., row, column] = 0
    low = (np.abs(np.fft.ifft2(spectrum)) - shift) / scale
    expected = patchify(torch.from_numpy(low), (4, 4))
    if is_normalized:
        mean_, var = expected.mean(-1, keepdim=True), expected.var(-1, keepdim=True)
        expected = (expected - mean_) / (var + 1e-6).sqrt()
    torch.testing.assert_close(target(images), expected, rtol=0, atol=1e-10)


def test_the_fourier_form_needs_the_scale_of_pixels(make: Make) -> None:
    with pytest.raises(UserError, match=r"low_pass\.transform: 'fourier' needs data\.mean and"):
        make("low_pass", (4, 4), low_pass=LowPassConfig(transform="fourier"))
