"""What holds of every target, distances and the masked loss, against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mim.core.config import FeaturesConfig, FrequencyConfig, HogConfig, LowPassConfig, TargetConfig
from mim.core.errors import UserError
from mim.core.patches import Images, patches_at, patchify, unpatchify
from mim.model.targets import TARGETS, NormalizedPixels, Target, per_image_loss
from mim.model.targets.base import principal_colours

Make = Callable[..., Target]
TINY = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
# Patches that are not square, on a grid that is not.
LONG: dict[str, Any] = {
    "patch": (4, 8),
    "grid": (3, 2),
    "hog": HogConfig(cell=4),
    "features": FeaturesConfig(backbone_args={**TINY, "patch_size": [4, 8]}),
}
OWN_LOSS = {
    "pixels": "mse",
    "normalized_pixels": "mse",
    "low_pass": "mse",
    "frequency": "mse",
    "hog": "mse",
    "features": "smooth_l1",
    "ema_features": "smooth_l1",
}
SHOWS_PIXELS = {"pixels", "normalized_pixels", "low_pass", "frequency"}
EVERY = pytest.mark.parametrize("name", sorted(OWN_LOSS))
CHANNELS = pytest.mark.parametrize("channels", [1, 3])


def test_every_target_is_tested_here() -> None:
    apart = {"clusters", "codes"}  # cross-entropy: in files of their own
    assert set(TARGETS) == set(OWN_LOSS) | apart


def test_an_unknown_target_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"model\.target\.name: 'pixel' is not one of .*'pixels'"):
        make("pixel")


# --- Every target --------------------------------------------------------------------------------


@CHANNELS
@EVERY
def test_a_perfect_prediction_has_loss_0_and_the_announced_length(
    name: str, channels: int, make: Make, teach: Any, images_of: Any
) -> None:
    target = make(name, channels=channels, **LONG).double()
    images = images_of(target)
    wanted = target(images, teach(target))
    assert wanted.shape == (2, 6, target.dim) and wanted.isfinite().all()
    assert wanted.std() > 0.01
    assert target.distance(wanted, wanted).tolist() == [[0.0] * 6] * 2
    assert (target.distance(wanted + 1, wanted) > 0.1).all()


@EVERY
def test_the_own_loss_is_the_one_used(name: str, make: Make) -> None:
    target = make(name, **LONG)
    explicit = make(name, loss=OWN_LOSS[name], **LONG)
    other = make(name, loss="l1", **LONG)
    prediction, wanted = torch.full((1, target.dim), 3.0), torch.zeros(1, target.dim)
    assert torch.equal(target.distance(prediction, wanted), explicit.distance(prediction, wanted))
    assert not torch.equal(target.distance(prediction, wanted), other.distance(prediction, wanted))


@EVERY
def test_no_gradient_leaves_a_target(name: str, make: Make, teach: Any, images_of: Any) -> None:
    target = make(name, channels=3, **LONG).double()
    images = images_of(target).requires_grad_()
    assert not target(images, teach(target)).requires_grad
    assert not [p for p in target.parameters() if p.requires_grad]


@EVERY
def test_targets_have_nothing_to_save(name: str, make: Make) -> None:
    assert not make(name, **LONG).state_dict()


@CHANNELS
@EVERY
def test_a_prediction_can_be_shown(
    name: str, channels: int, make: Make, teach: Any, images_of: Any
) -> None:
    target = make(name, channels=channels, **LONG).double()
    images = images_of(target)
    wanted = target(images, teach(target))
    pixels = target.to_pixels(wanted, images, wanted)
    assert pixels.shape == (2, 6, 4 * 8 * channels) and pixels.isfinite().all()
    assert target.shows_pixels == (name in SHOWS_PIXELS)
    shown = unpatchify(pixels, (4, 8), (3, 2))  # (2, C, 12, 16)
    assert shown.shape == images.shape and shown.std() > 0.1
    if name not in SHOWS_PIXELS:
        flat = pixels.unflatten(-1, (-1, channels))
        assert torch.equal(flat, flat[:, :, :1].expand_as(flat))  # one colour a patch
        assert pixels.abs().max() == 2 and pixels.dtype == images.dtype


@EVERY
def test_a_target_of_one_image_does_not_depend_on_the_others(
    name: str, make: Make, teach: Any, images_of: Any
) -> None:
    target = make(name, channels=3, **LONG).double()
    images = images_of(target, 3)
    whole, alone = target(images, teach(target)), target(images[1:2], teach(target))
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-12)


@CHANNELS
@EVERY
def test_a_part_of_a_target_is_that_part_of_the_whole(
    name: str, channels: int, make: Make, teach: Any, images_of: Any
) -> None:
    target = make(name, channels=channels, **LONG).double()
    images = images_of(target)
    ids = torch.tensor([[5, 0, 3], [1, 2, 2]])
    whole, part = target(images, teach(target)), target.at(images, ids, teach(target))
    assert not part.requires_grad
    for image, row in enumerate(ids.tolist()):
        torch.testing.assert_close(part[image], whole[image, row], rtol=0, atol=1e-12)


def test_who_changes_the_whole_of_a_target_changes_its_parts(make: Make, images_of: Any) -> None:
    class Twice(NormalizedPixels):
        def forward(self, images: Images, teacher: Any = None) -> Tensor:
            return 2 * super().forward(images, teacher)

    plain = make("normalized_pixels", **LONG)
    images, ids = images_of(plain), torch.tensor([[5, 0, 3], [1, 2, 2]])
    twice = Twice(plain.settings, plain.context)
    assert torch.equal(twice.at(images, ids), 2 * plain.at(images, ids))


@EVERY
def test_half_precision_images_are_not_measured_in_half(
    name: str, make: Make, teach: Any, images_of: Any
) -> None:
    target = make(name, channels=3, **LONG)
    images = images_of(target).float()
    exact = target(images, teach(target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = target(images, teach(target))
    assert got.dtype == torch.float32
    if name != "features":  # its model may run in half precision, as the student does
        assert torch.equal(got, exact)


# --- Distances -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("auto", [3.5, 1.0]),
        ("mse", [3.5, 1.0]),
        ("l1", [1.5, 1.0]),
        # beta 2: squares over 4 below 2, less 1 from there on: 0, 1/4, 1, 2.
        ("smooth_l1", [0.8125, 0.25]),
    ],
)
def test_distance_by_hand(loss: str, expected: list[float], make: Make) -> None:
    target = make("pixels", loss=loss)
    prediction = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0]])
    wanted = torch.tensor([[0.0, 1, -2, 3], [1, -1, 1, -1]])
    assert target.distance(prediction, wanted).tolist() == expected


def test_the_bend_of_smooth_l1_is_a_setting(make: Make) -> None:
    target = make("pixels", loss="smooth_l1", smooth_l1_beta=1.0)
    wanted = torch.tensor([[0.0, 0.5, -1, 3]])  # 0, 1/8, 1/2, 5/2
    assert target.distance(torch.zeros(1, 4), wanted).tolist() == [3.125 / 4]


def test_cosine_by_hand(make: Make) -> None:
    target = make("pixels", loss="cosine")
    prediction = torch.tensor([[2.0, 0, 0, 0], [1, 2, 3, 4], [1, 2, 3, 4], [1, 0, 0, 0]]).double()
    wanted = torch.tensor([[5.0, 5, 0, 0], [2, 4, 6, 8], [-1, -2, -3, -4], [0, 0, 0, 0]]).double()
    expected = torch.tensor([1 - math.sqrt(0.5), 0, 2, 1], dtype=torch.float64)
    got = target.distance(prediction, wanted)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distance_is_taken_in_float32_at_least(dtype: torch.dtype, make: Make) -> None:
    target = make("pixels")
    wanted = torch.full((1, 4), 1000.0)  # its square is beyond float16
    assert target.distance(torch.zeros(1, 4, dtype=dtype), wanted).tolist() == [1e6]
    small = 1 + torch.full((1, 4), 2.0**-10)  # that target is no bfloat16 number
    got = target.distance(torch.ones(1, 4, dtype=dtype), small)
    assert got.dtype == torch.float32 and got.tolist() == [2.0**-20]


def test_distance_keeps_float64(make: Make) -> None:
    distance = make("pixels").distance(torch.zeros(1, 4).double(), torch.ones(1, 4))
    assert distance.dtype == torch.float64


# --- Colours of what is no image -----------------------------------------------------------------


def test_colours_are_the_principal_coordinates() -> None:
    # Values 0 .. 100 along the second axis, and along the third with a tenth of that, unrelated.
    ramp = torch.arange(101.0).double()
    shuffled = ramp[torch.randperm(101, generator=torch.Generator().manual_seed(0))] / 10
    vectors = torch.stack([torch.zeros_like(ramp), ramp, shuffled, torch.zeros_like(ramp)], -1)
    colours = principal_colours(vectors[None], vectors[None], 3)[0]  # (101, 3)
    # Along the first component nearly (ramp - 50) / spread * 2; 95 of 100 lie within 47 or 48.
    expected = ((ramp - 50) * 2 / 47.5).clamp(-2, 2)
    torch.testing.assert_close(colours[:, 0], expected, rtol=0, atol=0.05)
    assert torch.corrcoef(torch.stack([colours[:, 1], shuffled]))[0, 1] > 0.99
    assert colours[:, 2].tolist() == [0] * 101  # no third direction


def test_a_prediction_is_placed_among_the_targets() -> None:
    target = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0)).double()
    colours = principal_colours(target, target, 3)
    mean = target.flatten(0, 1).mean(0).expand(1, 1, 6)
    assert principal_colours(mean, target, 3).abs().max() < 1e-12  # the mean is gray
    part = principal_colours(target[1:, 5:9], target, 3)
    torch.testing.assert_close(part, colours[1:, 5:9], rtol=0, atol=1e-12)
    assert colours.abs().max() == 2 and 0.5 < colours.std() < 1.5


def test_a_target_without_variation_is_gray() -> None:
    constant = torch.full((1, 5, 3), 7.3)
    assert principal_colours(constant + 1, constant, 3).tolist() == [[[0.0] * 3] * 5]
    assert principal_colours(torch.randn(1, 5, 1), torch.randn(1, 5, 1), 3).shape == (1, 5, 3)


def test_the_target_is_computed_where_it_is_not_given(make: Make, images_of: Any) -> None:
    target = make("hog", **LONG).double()
    images = images_of(target)
    wanted = target(images)
    given = target.to_pixels(wanted + 0.1, images, wanted)
    assert torch.equal(target.to_pixels(wanted + 0.1, images), given)


# --- The masked loss -----------------------------------------------------------------------------


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


# --- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: HogConfig(bins=0), r"model\.target\.hog\.bins: 0 must be at least 1"),
        (lambda: HogConfig(cell=0), r"model\.target\.hog\.cell: 0 must be at least 1"),
        (lambda: LowPassConfig(cutoff=0.0), r"model\.target\.low_pass\.cutoff: 0\.0 must be above"),
        (lambda: LowPassConfig(cutoff=1.5), r"model\.target\.low_pass\.cutoff: 1\.5 .*most 1\.41"),
        (lambda: LowPassConfig(cutoff=math.nan), r"model\.target\.low_pass\.cutoff: nan must be"),
        (
            lambda: LowPassConfig(filter="box"),
            r"model\.target\.low_pass\.filter: 'box' is not one of gaussian, ideal",
        ),
        (
            lambda: FrequencyConfig(coefficients=0),
            r"model\.target\.frequency\.coefficients: 0 must be at least 1",
        ),
        (
            lambda: TargetConfig(loss="huber"),
            r"model\.target\.loss: 'huber' is not one of auto, cosine, l1, mse, smooth_l1",
        ),
        (lambda: TargetConfig(smooth_l1_beta=0.0), r"model\.target\.smooth_l1_beta: 0\.0 must be"),
    ],
)
def test_a_bad_setting_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_patches_are_cut_row_by_row() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert patchify(image, (2, 2))[0, 1].tolist() == [2, 3, 6, 7]


def test_within_a_patch_channels_come_last() -> None:
    image = torch.arange(4.0).view(1, 1, 2, 2)
    images = torch.cat([image, image + 100], dim=1)
    assert patchify(images, (2, 2))[0, 0].tolist() == [0, 100, 1, 101, 2, 102, 3, 103]


def test_patches_need_not_be_square() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert patchify(image, (1, 4))[0, 1].tolist() == [4, 5, 6, 7]
    assert patchify(image, (4, 2))[0, 1].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]


def test_some_patches_are_those_of_the_whole() -> None:
    images = torch.randn(2, 3, 6, 20)
    ids = torch.tensor([[7, 0, 5], [3, 3, 1]])
    some, whole = patches_at(images, (3, 5), ids), patchify(images, (3, 5))
    assert torch.equal(some[0], whole[0, [7, 0, 5]]) and torch.equal(some[1], whole[1, [3, 3, 1]])


def test_the_gradient_of_some_patches() -> None:
    images = torch.randn(2, 3, 6, 20, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[7, 0, 5], [3, 3, 1]])
    assert torch.autograd.gradcheck(lambda images: patches_at(images, (3, 5), ids), images)


def test_unpatchify_inverts() -> None:
    images = torch.randn(2, 3, 6, 20)
    patches = patchify(images, (3, 5))
    assert patches.shape == (2, 2 * 4, 3 * 5 * 3)
    assert torch.equal(unpatchify(patches, (3, 5), (2, 4)), images)


def test_teachers_are_asked_for_only_where_needed(make: Make, images_of: Any) -> None:
    for name in OWN_LOSS:
        target: Target = make(name, **LONG).double()
        images: Tensor = images_of(target)
        assert target.needs_teacher == (name == "ema_features")
        if target.needs_teacher:
            with pytest.raises(ValueError, match="must be given a teacher"):
                target(images)
        else:
            assert target(images).shape == (2, 6, target.dim)
