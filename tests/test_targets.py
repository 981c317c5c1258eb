"""Targets and the masked loss, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mim.config import TargetConfig
from mim.errors import UserError
from mim.masks import PatchMask
from mim.patches import patchify, unpatchify
from mim.targets import build_target, loss_positions, per_image_loss

# 4 x 4 pixels in patches of 2 x 2: the patches are [0 1 2 3], [4 6 8 10], [5 5 5 5], [-1 1 -1 1].
IMAGE = torch.tensor([[0, 1, 4, 6], [2, 3, 8, 10], [5, 5, -1, 1], [5, 5, -1, 1]]).double()
PATCHES = [[0, 1, 2, 3], [4, 6, 8, 10], [5, 5, 5, 5], [-1, 1, -1, 1]]


def test_patches_are_cut_row_by_row() -> None:
    assert patchify(IMAGE[None, None], (2, 2))[0].tolist() == PATCHES


def test_within_a_patch_channels_come_last() -> None:
    images = torch.stack([IMAGE, IMAGE + 100])[None]  # (1, 2, 4, 4)
    assert patchify(images, (2, 2))[0, 0].tolist() == [0, 100, 1, 101, 2, 102, 3, 103]


def test_patches_need_not_be_square() -> None:
    assert patchify(IMAGE[None, None], (1, 4))[0, 1].tolist() == [2, 3, 8, 10]
    assert patchify(IMAGE[None, None], (4, 2))[0, 1].tolist() == [4, 6, 8, 10, -1, 1, -1, 1]


def test_unpatchify_inverts() -> None:
    images = torch.randn(2, 3, 6, 20)
    patches = patchify(images, (3, 5))
    assert patches.shape == (2, 2 * 4, 3 * 5 * 3)
    assert torch.equal(unpatchify(patches, (3, 5), (2, 4)), images)


def test_pixels() -> None:
    target = build_target(TargetConfig(name="pixels"), (2, 2), 1)
    assert target.dim == 4
    assert target(IMAGE[None, None])[0].tolist() == PATCHES
    prediction = torch.randn(1, 4, 4)
    assert torch.equal(target.to_pixels(prediction, IMAGE[None, None]), prediction)


def test_normalized_pixels_by_hand() -> None:
    target = build_target(TargetConfig(name="normalized_pixels"), (2, 2), 1)
    got = target(IMAGE[None, None])[0]
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


def test_normalized_pixels_are_normalised_over_all_channels_together() -> None:
    target = build_target(TargetConfig(name="normalized_pixels"), (2, 2), 3)
    got = target(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert got.shape == (2, 4, 12) and target.dim == 12
    torch.testing.assert_close(got.mean(-1), torch.zeros(2, 4).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.var(-1), torch.ones(2, 4).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["pixels", "normalized_pixels"])
def test_a_perfect_prediction_is_the_image(name: str) -> None:
    target = build_target(TargetConfig(name=name), (2, 4), 3)
    images = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    pixels = target.to_pixels(target(images), images)
    torch.testing.assert_close(unpatchify(pixels, (2, 4), (2, 2)), images, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("loss", "expected"), [("mse", [3.5, 1.0]), ("l1", [1.5, 1.0])])
def test_distance_by_hand(loss: str, expected: list[float]) -> None:
    target = build_target(TargetConfig(name="pixels", loss=loss), (2, 2), 1)
    prediction = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0]])
    wanted = torch.tensor([[0.0, 1, -2, 3], [1, -1, 1, -1]])
    assert target.distance(prediction, wanted).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distance_is_taken_in_float32_at_least(dtype: torch.dtype) -> None:
    target = build_target(TargetConfig(name="pixels"), (2, 2), 1)
    wanted = torch.full((1, 4), 1000.0)  # its square is beyond float16
    assert target.distance(torch.zeros(1, 4, dtype=dtype), wanted).tolist() == [1e6]
    small = 1 + torch.full((1, 4), 2.0**-10)  # that target is no bfloat16 number
    got = target.distance(torch.ones(1, 4, dtype=dtype), small)
    assert got.dtype == torch.float32 and got.tolist() == [2.0**-20]


def test_distance_keeps_float64() -> None:
    target = build_target(TargetConfig(name="pixels"), (2, 2), 1)
    assert target.distance(torch.zeros(1, 4).double(), torch.ones(1, 4)).dtype == torch.float64


def test_per_image_loss_by_hand() -> None:
    distance = torch.tensor([[1.0, 2, 6], [4, 8, 100], [7, 100, 100], [100, 100, 100]])
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert per_image_loss(distance, valid).tolist() == [3, 6, 7, 0]
    assert per_image_loss(distance[:1], None).tolist() == [3]


def test_padding_has_no_part_in_the_loss_even_if_it_is_nan() -> None:
    distance = torch.tensor([[2.0, float("nan")]], requires_grad=True)
    loss = per_image_loss(distance, torch.tensor([[True, False]]))
    assert loss.tolist() == [2]
    loss.sum().backward()
    assert distance.grad is not None and distance.grad.tolist() == [[1, 0]]


def test_an_image_without_a_counted_patch_has_loss_0() -> None:
    assert per_image_loss(torch.zeros(2, 0), None).tolist() == [0, 0]


def test_which_patches_count() -> None:
    mask = PatchMask(torch.tensor([[True, False, True], [False, False, True]]))
    ids, valid = loss_positions(TargetConfig(loss_on="masked"), mask)
    assert ids is not None and ids.tolist() == [[0, 2], [2, 0]]
    assert valid is not None and valid.tolist() == [[True, True], [True, False]]
    assert loss_positions(TargetConfig(loss_on="all"), mask) == (None, None)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.target\.name: 'pixel' is not one of .*'pixels'"):
        build_target(TargetConfig(name="pixel"), (2, 2), 1)
