"""Masks are pure functions of seed, epoch and image, with exact counts and uniform coverage."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mim.core.config import MaskConfig, MaskScheduleConfig
from mim.core.errors import UserError
from mim.core.rng import image_keys, random_bits
from mim.masks import (
    MaskGenerator,
    PatchMask,
    build_mask_generator,
    hidden_count,
    sample_masks,
)
from mim.masks.generators import MaskContext, MaskRequest, RankedMask, rank_by


def draw(
    ratio: float | tuple[float, float],
    grid: tuple[int, int],
    images: int,
    seed: int = 0,
    epoch: int = 0,
) -> PatchMask:
    ids = list(range(images))
    return sample_masks(MaskConfig(ratio=ratio), grid, seed=seed, epoch=epoch, sample_ids=ids)


@pytest.mark.parametrize(
    ("ratio", "patches", "hidden"),
    [
        (0.75, 196, 147),
        (0.75, 49, 37),  # 36.75
        (0.6, 49, 29),  # 29.4
        (0.5, 5, 3),  # a half goes up
        (0.5, 7, 4),  # and so with every half: no rounding to even
        (0.5, 1, 1),
        (0.25, 10, 3),  # 2.5
        (0.75, 10, 8),  # 7.5
        (0.1, 4, 0),
        (0.9, 4, 4),
    ],
)
def test_rounding_by_hand(ratio: float, patches: int, hidden: int) -> None:
    assert hidden_count(ratio, patches) == hidden


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 99), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_counts_are_exact(percent: int, height: int, width: int, seed: int) -> None:
    patches = height * width
    hidden = math.floor(Fraction(percent, 100) * patches + Fraction(1, 2))
    if not 0 < hidden < patches:
        with pytest.raises(UserError, match=r"mask\.ratio"):
            draw(percent / 100, (height, width), 1, seed)
        return
    mask = draw(percent / 100, (height, width), 5, seed)
    exact = hidden_count(percent / 100, patches)
    assert abs(exact - hidden) <= ((Fraction(percent, 100) * patches) % 1 == Fraction(1, 2))
    assert (mask.is_masked.sum(1) == exact).all()
    assert mask.is_masked.shape == (5, patches)
    assert mask.visible_valid is None


def test_golden_masks() -> None:
    """The masks of a seed are an interface: a change would make old runs incomparable."""
    assert draw(0.5, (2, 4), 3).is_masked.int().tolist() == [
        [1, 0, 1, 0, 0, 0, 1, 1],
        [1, 0, 1, 1, 0, 0, 1, 0],
        [0, 0, 0, 1, 1, 0, 1, 1],
    ]
    assert draw((0.25, 0.75), (2, 4), 3, epoch=1).is_masked.int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 0, 0, 1],
        [1, 1, 0, 0, 1, 1, 0, 1],
    ]


RATIOS = pytest.mark.parametrize("ratio", [0.75, (0.2, 0.9)], ids=["fixed", "range"])


@RATIOS
@settings(max_examples=20, deadline=None)
@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=12),
    data=st.data(),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(-1, 10_000),
)
def test_a_mask_depends_on_seed_epoch_and_image_alone(
    ratio: float | tuple[float, float], ids: list[int], data: st.DataObject, seed: int, epoch: int
) -> None:
    config, grid = MaskConfig(ratio=ratio), (4, 5)

    def masks(some: list[int]) -> list[list[bool]]:
        mask = sample_masks(config, grid, seed=seed, epoch=epoch, sample_ids=some)
        return mask.is_masked.tolist()

    whole = dict(zip(ids, masks(ids), strict=True))
    torch.rand(3)  # the global generator's state is of no account
    order = data.draw(st.permutations(ids))
    cut = data.draw(st.integers(1, len(ids) - 1))
    for part in (order, order[:cut], order[cut:], order[:1]):
        assert masks(part) == [whole[i] for i in part]


def test_every_part_of_the_key_counts() -> None:
    base = draw(0.5, (8, 8), 4).is_masked
    assert not torch.equal(base, draw(0.5, (8, 8), 4, seed=1).is_masked)
    assert not torch.equal(base, draw(0.5, (8, 8), 4, epoch=1).is_masked)
    assert base.unique(dim=0).shape[0] == 4


def test_a_higher_ratio_hides_more_of_the_same() -> None:
    """Masks are nested over ratios, so that a comparison of ratios is paired too."""
    low, high = draw(0.25, (6, 6), 20).is_masked, draw(0.75, (6, 6), 20).is_masked
    assert (low <= high).all()


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    draw((0.2, 0.9), (4, 4), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_coverage_is_that_of_sampling_without_replacement() -> None:
    images, patches, hidden = 20_000, 12, 9
    flags = draw(0.75, (3, 4), images).is_masked.double()
    p = hidden / patches
    single = flags.mean(0)
    assert (single - p).abs().max() < 5 * math.sqrt(p * (1 - p) / images)
    # Two patches are both hidden in hidden (hidden - 1) / (patches (patches - 1)) of the masks.
    pairs = flags.T @ flags / images
    q = hidden * (hidden - 1) / (patches * (patches - 1))
    off = pairs[~torch.eye(patches, dtype=torch.bool)]
    assert (off - q).abs().max() < 5 * math.sqrt(q * (1 - q) / images)


def test_every_mask_is_as_likely() -> None:
    images = 10_000
    flags = draw(0.5, (1, 4), images).is_masked.long()
    codes = (flags * torch.tensor([8, 4, 2, 1])).sum(1)
    counts = codes.bincount(minlength=16).double()
    seen = counts[counts > 0]
    assert len(seen) == 6  # 4 choose 2
    expected = images / 6
    assert ((seen - expected) ** 2 / expected).sum() < 5 + 6 * math.sqrt(10)


def test_a_range_draws_a_ratio_for_each_image() -> None:
    images, patches = 8000, 100
    mask = draw((0.25, 0.75), (10, 10), images)
    counts = mask.is_masked.sum(1)
    assert mask.visible_valid is not None
    assert counts.min() == 25 and counts.max() in (74, 75)
    # Uniform over [25, 75] before rounding: mean 50, variance 50^2 / 12 + the rounding's 1 / 12.
    deviation = math.sqrt(50**2 / 12)
    assert abs(float(counts.double().mean()) - 50) < 5 * deviation / math.sqrt(images)
    assert abs(float(counts.double().std()) - deviation) < 0.5
    # Which patches are hidden has nothing to do with how many: each is hidden as often as any.
    for group in (counts < 50, counts >= 50):
        share = mask.is_masked[group].double().mean(0)
        bound = 5 * 0.5 / math.sqrt(int(group.sum()))
        assert (share - float(counts[group].double().mean()) / patches).abs().max() < bound


def test_a_range_too_narrow_for_the_grid_is_a_fixed_count() -> None:
    mask = draw((0.74, 0.76), (4, 4), 6)  # 11.84 and 12.16 patches
    assert mask.is_equal and mask.num_masked == 12


def test_a_wide_range_can_fill_its_ends() -> None:
    counts = draw((0.1, 0.9), (2, 5), 4000).is_masked.sum(1)
    assert counts.min() == 1 and counts.max() == 9


@pytest.mark.parametrize(
    ("ratio", "what"),
    [(0.01, "hides no patch"), (0.99, "hides every patch"), ((0.5, 0.99), "hides every patch")],
)
def test_a_ratio_that_leaves_nothing_is_refused(
    ratio: float | tuple[float, float], what: str
) -> None:
    with pytest.raises(UserError, match=rf"mask\.ratio: 0\.\d+ {what} of a grid of 2 x 4"):
        draw(ratio, (2, 4), 1)


@pytest.mark.parametrize(
    ("shape", "ratios"),
    [
        ("linear", [0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9]),
        ("cosine", [0.5, 0.5, 0.5 + 0.4 * (0.5 - math.sqrt(0.125)), 0.7, None, 0.9, 0.9]),
    ],
)
def test_a_ratio_moves_epoch_by_epoch(shape: str, ratios: list[float | None]) -> None:
    config = MaskConfig(ratio=0.5, schedule=MaskScheduleConfig(to=0.9, epochs=4, shape=shape))
    for epoch, ratio in zip((-1, 0, 1, 2, 3, 4, 100), ratios, strict=True):
        if ratio is None:
            continue
        assert config.ratio_at(epoch) == pytest.approx((ratio, ratio))
        mask = sample_masks(config, (10, 10), seed=0, epoch=epoch, sample_ids=[1, 2])
        assert mask.num_masked == hidden_count(config.ratio_at(epoch)[0], 100)


def test_a_range_moves_end_by_end() -> None:
    config = MaskConfig(ratio=0.2, schedule=MaskScheduleConfig(to=(0.4, 0.8), epochs=2))
    assert config.ratio_at(1) == pytest.approx((0.3, 0.5))
    ids = list(range(3000))
    counts = sample_masks(config, (10, 10), seed=0, epoch=1, sample_ids=ids).is_masked.sum(dim=1)
    assert (counts.min(), counts.max()) == (30, 50)


def test_a_schedule_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"mask\.schedule\.epochs: None is needed"):
        MaskScheduleConfig(to=0.9)


def test_where_a_schedule_ends_is_checked_too() -> None:
    config = MaskConfig(ratio=0.5, schedule=MaskScheduleConfig(to=0.99, epochs=3))
    with pytest.raises(UserError, match=r"mask\.schedule\.to: 0\.99 hides every patch of a grid"):
        build_mask_generator(config, (2, 4))


def test_ranks_follow_the_scores_and_ties_the_keys() -> None:
    keys = image_keys(0, 0, range(400))
    score = torch.tensor([[2.0, 1.0, 2.0, 0.0, 2.0]]).expand(400, 5)
    ranks = rank_by(score, keys)
    assert (ranks[:, 3] == 0).all() and (ranks[:, 1] == 1).all()
    ties = ranks[:, [0, 2, 4]]
    assert torch.equal(ties.sort(dim=1).values, torch.tensor([[2, 3, 4]]).expand(400, 3))
    assert len(ties.unique(dim=0)) == 6
    share = (ties == 2).double().mean(dim=0)
    assert (share - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 400)
    assert torch.equal(rank_by(score[:7], keys[:7]), ranks[:7])


class Drawn(MaskGenerator):
    def draw(self, request: MaskRequest) -> torch.Tensor:
        assert request.keys.shape == request.ratios.shape
        return random_bits(request.keys, request.num_patches) > 0


class Ranked(RankedMask):
    def ranks(self, request: MaskRequest) -> torch.Tensor:
        return torch.arange(request.num_patches).expand(len(request.keys), -1)


def test_a_generator_of_ones_own_draws_or_ranks() -> None:
    keys = image_keys(0, 0, [3, 4])
    drawn = Drawn(None, MaskContext(MaskConfig()))((2, 4), keys)
    assert torch.equal(drawn.is_masked, random_bits(keys, 8) > 0)
    assert drawn.keys is keys
    ranked = Ranked(None, MaskContext(MaskConfig(ratio=0.6)))((2, 4), keys)
    assert ranked.masked_ids.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_generator_that_sees_needs_images() -> None:
    class Sees(Ranked):
        name = "sees"
        needs_images = True

    with pytest.raises(UserError, match=r"mask\.name: 'sees' looks at the images"):
        Sees(None, MaskContext(MaskConfig()))((2, 4), image_keys(0, 0, [3]))


def test_there_are_no_masks_without_keys() -> None:
    generator = build_mask_generator(MaskConfig())
    with pytest.raises(TypeError, match="keys"):
        generator((2, 4))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="int64 key"):
        generator((2, 4), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed"):
        sample_masks(MaskConfig(), (2, 4), epoch=0, sample_ids=[0])  # type: ignore[call-arg]


def test_an_unknown_generator_is_refused() -> None:
    with pytest.raises(UserError, match=r"mask\.name: 'randon' is not one of .*random.*did you"):
        build_mask_generator(MaskConfig(name="randon"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@RATIOS
def test_the_gpu_draws_the_same_masks(ratio: float | tuple[float, float]) -> None:
    config, ids = MaskConfig(ratio=ratio), torch.arange(64)
    here = sample_masks(config, (14, 14), seed=3, epoch=7, sample_ids=ids)
    there = sample_masks(config, (14, 14), seed=3, epoch=7, sample_ids=ids.cuda())
    assert there.is_masked.is_cuda
    assert torch.equal(here.is_masked, there.is_masked.cpu())
    assert torch.equal(here.visible_ids, there.visible_ids.cpu())


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("units", [36, 49, 196, 256])
def test_published_roundings(ratio: float, units: int) -> None:
    expected = {"ceil": math.ceil(units * ratio), "floor_visible": units - int(units * (1 - ratio))}
    for rounding, hidden in expected.items():
        assert hidden_count(ratio, units, rounding) == hidden
        config = MaskConfig(ratio=ratio, rounding=rounding)
        mask = sample_masks(config, (units, 1), seed=0, epoch=0, sample_ids=[1, 2])
        assert mask.is_masked.sum(dim=1).tolist() == [hidden, hidden]
        assert mask.counts == (units - hidden, units - hidden)


def test_the_roundings_differ_where_the_papers_say() -> None:
    assert [hidden_count(0.6, 49, r) for r in ("nearest", "ceil")] == [29, 30]  # SimMIM, 224 pixels
    assert [hidden_count(0.9, 196, r) for r in ("nearest", "floor_visible")] == [176, 177]  # MAE
