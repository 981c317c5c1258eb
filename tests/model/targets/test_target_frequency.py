"""The cosine transform of patches: orthonormal, invertible, and scipy's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.fft import dctn

from mim.core.config import FrequencyConfig
from mim.core.errors import UserError
from mim.core.patches import patchify
from mim.model.targets import Target
from mim.model.targets.frequency import cosine_basis, zigzag

Make = Callable[..., Target]
TIGHT = {"rtol": 0, "atol": 1e-12}
PLAIN = FrequencyConfig(whiten=False)


def test_zigzag_by_hand() -> None:
    order = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (1, 2), (2, 1), (2, 2)]
    assert zigzag(3, 3) == order
    assert zigzag(2, 3) == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]


def test_the_basis_is_orthonormal() -> None:
    for size in (1, 2, 5, 16):
        basis = cosine_basis(size)
        torch.testing.assert_close(basis @ basis.T, torch.eye(size).double(), **TIGHT)


def test_it_is_the_transform_of_scipy(make: Make, images_of: Any) -> None:
    target = make("frequency", (3, 4), 3, frequency=PLAIN)
    images = images_of(target)
    patches = patchify(images, (3, 4)).view(2, 4, 3, 4, 3)  # row, column, channel of a patch
    expected = torch.from_numpy(dctn(patches.numpy(), axes=(2, 3), norm="ortho"))
    ordered = torch.stack([expected[:, :, u, v] for u, v in zigzag(3, 4)], dim=2)  # (2, 4, 12, 3)
    torch.testing.assert_close(target(images), ordered.flatten(2), **TIGHT)


def test_parseval(make: Make, images_of: Any) -> None:
    target = make("frequency", (4, 8), 3, frequency=PLAIN)
    images = images_of(target)
    energy = patchify(images, (4, 8)).square().sum(-1)
    torch.testing.assert_close(target(images).square().sum(-1), energy, rtol=1e-12, atol=0)


def test_without_whitening_the_loss_is_that_of_pixels(make: Make, images_of: Any) -> None:
    target, pixels = make("frequency", (4, 8), 3, frequency=PLAIN), make("pixels", (4, 8), 3)
    images, guess = images_of(target), images_of(target, seed=1)
    one = target.distance(target(guess), target(images))
    torch.testing.assert_close(one, pixels.distance(pixels(guess), pixels(images)), **TIGHT)
    white = make("frequency", (4, 8), 3)
    assert (white.distance(white(guess), white(images)) - one).abs().max() > 0.1


@pytest.mark.parametrize("whiten", [False, True])
def test_a_constant_patch_has_one_coefficient(whiten: bool, make: Make) -> None:
    target = make("frequency", (2, 8), 1, (1, 2), frequency=FrequencyConfig(whiten=whiten))
    image = torch.cat([torch.full((2, 8), 3.0), torch.full((2, 8), -1.0)], dim=1).double()
    lowest = 1.0 if whiten else 4.0  # the mean, or the root of the 16 pixels times it
    expected = torch.zeros(1, 2, 16).double()
    expected[0, :, 0] = torch.tensor([3 * lowest, -lowest])
    torch.testing.assert_close(target(image[None, None]), expected, **TIGHT)


def test_whitening_by_hand(make: Make) -> None:
    plain = make("frequency", (2, 4), 1, (1, 1), frequency=PLAIN)
    target = make("frequency", (2, 4), 1, (1, 1))
    image = torch.randn(1, 1, 2, 4).double()
    # Frequencies u / 2, v / 4 in units of the lowest, 1 / 4, are 2 u and v.
    gains = [max(1.0, math.hypot(2 * u, v)) / math.sqrt(8) for u, v in zigzag(2, 4)]
    assert gains[1:3] == [1 / math.sqrt(8), 2 / math.sqrt(8)]
    expected = plain(image) * torch.tensor(gains, dtype=torch.float64)
    torch.testing.assert_close(target(image), expected, **TIGHT)


@pytest.mark.parametrize("whiten", [False, True])
def test_the_inverse(whiten: bool, make: Make, images_of: Any) -> None:
    target = make("frequency", (4, 8), 3, frequency=FrequencyConfig(whiten=whiten))
    images = images_of(target)
    back = target.to_pixels(target(images), images)
    torch.testing.assert_close(back, patchify(images, (4, 8)), **TIGHT)


def test_fewer_coefficients_are_the_lowest_and_show_a_smooth_patch(
    make: Make, images_of: Any
) -> None:
    whole = make("frequency", (4, 4), 3)
    target = make("frequency", (4, 4), 3, frequency=FrequencyConfig(coefficients=3))
    images = images_of(target)
    assert target.dim == 9
    torch.testing.assert_close(target(images), whole(images)[..., :9], **TIGHT)
    shown = target.to_pixels(target(images), images)
    # What is shown has these coefficients and no others.
    padded = torch.nn.functional.pad(target(images), (0, 48 - 9))
    torch.testing.assert_close(shown, whole.to_pixels(padded, images), **TIGHT)


def test_more_coefficients_than_pixels_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"frequency\.coefficients: 9 is more than the 8 pixels of"):
        make("frequency", (2, 4), frequency=FrequencyConfig(coefficients=9))
