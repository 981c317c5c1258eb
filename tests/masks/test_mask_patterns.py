"""Shaped masks: exact counts, purity, and the shapes and coverage that each one promises."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from mim.core.config import (
    AlignedMaskConfig,
    BlockMaskConfig,
    Config,
    InverseBlockMaskConfig,
    MaskConfig,
    MultiblockMaskConfig,
)
from mim.core.errors import UserError
from mim.core.rng import image_keys, uniforms
from mim.core.settings import read_args
from mim.masks import (
    PatchMask,
    build_mask_generator,
    hidden_count,
    mask_statistics,
    sample_masks,
)

Grid = tuple[int, int]
Ratio = float | tuple[float, float]
PATCH = (4, 2)

# Name in test ids -> a config at a ratio. Those that end in + have other settings than the default.
CONFIGS: dict[str, Callable[[Ratio], MaskConfig]] = {
    **{
        name: lambda ratio, name=name: MaskConfig(name=name, ratio=ratio)  # type: ignore[misc]
        for name in ("random", "block", "grid", "column", "row", "inverse_block", "multiblock")
    },
    "aligned": lambda ratio: MaskConfig(
        name="aligned", ratio=ratio, aligned=AlignedMaskConfig((8, 6))
    ),
    "block+": lambda ratio: MaskConfig(
        name="block", ratio=ratio, block=BlockMaskConfig((0.02, 0.5), (0.5, 2.0), exact=False)
    ),
    "inverse_block+": lambda ratio: MaskConfig(
        name="inverse_block", ratio=ratio, inverse_block=InverseBlockMaskConfig((0.2, 5.0), True)
    ),
    "multiblock+": lambda ratio: MaskConfig(
        name="multiblock", ratio=ratio, multiblock=MultiblockMaskConfig(1, (0.3, 3.0), (0.3, 0.6))
    ),
}
UNIT = (2, 3)  # of aligned: 8 x 6 pixels in patches of 4 x 2
ALL = pytest.mark.parametrize("name", CONFIGS)
EXACT = pytest.mark.parametrize("name", [name for name in CONFIGS if name != "block+"])


def draw(
    config: MaskConfig, grid: Grid, images: int, seed: int = 0, epoch: int = 0
) -> tuple[PatchMask, Tensor]:
    """The mask, and its flags as (images, rows, columns)."""
    ids = list(range(images))
    mask = sample_masks(config, grid, seed=seed, epoch=epoch, sample_ids=ids, patch_size=PATCH)
    return mask, mask.is_masked.view(images, *grid)


def units_of(name: str, grid: Grid) -> int:
    rows, cols = grid
    sizes = {"column": cols, "row": rows, "aligned": rows * cols // 6}
    return sizes.get(name, rows * cols)


def fitting(name: str, grid: Grid) -> Grid:
    """A grid that the unit of aligned divides."""
    return (grid[0] * UNIT[0], grid[1] * UNIT[1]) if name == "aligned" else grid


GRIDS = st.tuples(st.integers(1, 15), st.integers(1, 15))
PERCENT = st.integers(1, 99)


@EXACT
@settings(max_examples=60, deadline=None)
@given(percent=st.tuples(PERCENT, PERCENT), grid=GRIDS, seed=st.integers(0, 2**40))
def test_counts_are_exact(name: str, percent: tuple[int, int], grid: Grid, seed: int) -> None:
    grid = fitting(name, grid)
    low, high = sorted(share / 100 for share in percent)
    ratio = low if low == high else (low, high)
    units, patches = units_of(name, grid), grid[0] * grid[1]
    if hidden_count(low, units) == 0 or hidden_count(high, units) == units:
        with pytest.raises(UserError, match=r"mask\.ratio: .* hides (no|every) "):
            draw(CONFIGS[name](ratio), grid, 1)
        return
    mask, _ = draw(CONFIGS[name](ratio), grid, 6, seed)
    drawn = low + (high - low) * uniforms(image_keys(seed, 0, range(6)), 1, stream=1)[:, 0]
    expected = [hidden_count(share, units) * patches // units for share in drawn.tolist()]
    assert mask.is_masked.sum(dim=1).tolist() == expected


@EXACT
@pytest.mark.parametrize("grid", [(14, 14), (8, 12), (2, 3)], ids=str)
def test_counts_at_many_ratios(name: str, grid: Grid) -> None:
    grid = fitting(name, grid)
    units = units_of(name, grid)
    for hidden in range(1, units, max(1, units // 12)):
        mask, _ = draw(CONFIGS[name](hidden / units), grid, 7, seed=hidden)
        assert mask.is_equal and mask.num_masked == hidden * (grid[0] * grid[1]) // units


@settings(max_examples=60, deadline=None)
@given(percent=PERCENT, grid=GRIDS, seed=st.integers(0, 2**40))
def test_whole_blocks_never_hide_too_much_and_always_something(
    percent: int, grid: Grid, seed: int
) -> None:
    patches = grid[0] * grid[1]
    most = hidden_count(percent / 100, patches)
    assume(0 < most < patches)
    mask, _ = draw(CONFIGS["block+"](percent / 100), grid, 6, seed)
    counts = mask.is_masked.sum(dim=1)
    assert (counts > 0).all() and (counts <= most).all()


@ALL
@pytest.mark.parametrize("ratio", [0.6, (0.3, 0.8)], ids=["fixed", "range"])
@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=12),
    data=st.data(),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(-1, 10_000),
)
def test_a_mask_depends_on_seed_epoch_and_image_alone(
    name: str, ratio: Ratio, ids: list[int], data: st.DataObject, seed: int, epoch: int
) -> None:
    generator = build_mask_generator(CONFIGS[name](ratio), (6, 9), PATCH)

    def masks(some: list[int]) -> list[list[bool]]:
        mask = generator((6, 9), image_keys(seed, epoch, some))
        return mask.is_masked.tolist()

    before = torch.get_rng_state()
    whole = dict(zip(ids, masks(ids), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # the global generator's state is of no account
    order = data.draw(st.permutations(ids))
    cut = data.draw(st.integers(1, len(ids) - 1))
    for part in (order, order[:cut], order[cut:], order[:1]):
        assert masks(part) == [whole[i] for i in part]


@ALL
def test_every_part_of_the_key_counts(name: str) -> None:
    _, base = draw(CONFIGS[name](0.6), (8, 9), 8)
    for other in ({"seed": 1}, {"epoch": 1}):
        assert not torch.equal(base, draw(CONFIGS[name](0.6), (8, 9), 8, **other)[1])
    assert len(base.flatten(1).unique(dim=0)) > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@ALL
@pytest.mark.parametrize("ratio", [0.6, (0.3, 0.8)], ids=["fixed", "range"])
def test_the_gpu_draws_the_same_masks(name: str, ratio: Ratio) -> None:
    generator = build_mask_generator(CONFIGS[name](ratio), (14, 15), PATCH)
    keys = image_keys(3, 7, range(500))
    here, there = generator((14, 15), keys), generator((14, 15), keys.cuda())
    assert there.is_masked.is_cuda
    assert torch.equal(here.is_masked, there.is_masked.cpu())


GOLDEN = {
    "random": ["xxx.xx", "xx.x..", "x.xx.x", "...xx."],
    "block": ["..xx..", "xxxx..", "xxxxx.", "x..xx."],
    "grid": ["xxx.x.", ".x.x.x", "x.xxx.", ".x.x.x"],
    "column": ["xxx..x", "xxx..x", "xxx..x", "xxx..x"],
    "row": ["xxxxxx", "......", "xxxxxx", "......"],
    "inverse_block": ["x...xx", "x...xx", "....xx", "xxxxxx"],
    "multiblock": ["...xx.", "xx...x", "xxxx.x", "xxxx.."],
    "aligned": ["xxx...", "xxx...", "xxx...", "xxx..."],
    "block+": ["...x..", ".xxx.x", ".xxxxx", "xx.xx."],
    "inverse_block+": [".....x", ".....x", "xxxxxx", "xxxxxx"],
    "multiblock+": ["....xx", "....x.", "xxxx.x", "xxxxxx"],
}


@ALL
def test_golden_masks(name: str) -> None:
    """The masks of a seed are an interface: a change would make old runs incomparable."""
    _, flags = draw(CONFIGS[name](0.6), (4, 6), 1)
    text = ["".join(".x"[int(flag)] for flag in row) for row in flags[0]]
    assert text == GOLDEN[name]


def assert_share(flags: Tensor, expected: Tensor | float) -> None:
    """Each patch is hidden as often as expected, within five standard deviations."""
    expected = torch.as_tensor(expected, dtype=torch.float64).expand(flags.shape[1:])
    bound = 5 * (expected * (1 - expected) / len(flags)).sqrt()
    assert ((flags.double().mean(dim=0) - expected).abs() <= bound + 1e-12).all()


def covering(size: int, length: int) -> Tensor:
    """(size,) float64: how likely a place is covered by a segment that lies anywhere it fits."""
    starts = size - length + 1
    return torch.tensor(
        [sum(s <= i < s + length for s in range(starts)) / starts for i in range(size)],
        dtype=torch.float64,
    )


def test_columns_and_rows_are_whole_and_hidden_equally_often() -> None:
    _, flags = draw(CONFIGS["column"](0.6), (4, 10), 4000)
    assert (flags == flags[:, :1]).all()
    assert_share(flags, 0.6)
    _, flags = draw(CONFIGS["row"](0.6), (10, 4), 4000)
    assert (flags == flags[:, :, :1]).all()
    assert_share(flags, 0.6)


def test_units_are_whole_and_hidden_equally_often() -> None:
    _, flags = draw(CONFIGS["aligned"](0.75), (8, 9), 4000)
    units = flags.view(-1, 4, 2, 3, 3).transpose(2, 3)  # (images, 4, 3, 2, 3)
    assert (units == units[..., :1, :1]).all()
    assert_share(units[..., 0, 0], 0.75)
    # Not only neighbours in one direction: any two units are hidden as in random sampling.
    first, rest = units[:, 0, 0, 0, 0], units.flatten(1, 2)[:, 1:, 0, 0]
    assert_share(rest[first], 8 / 11)


def windows(flags: Tensor, side: int) -> Tensor:
    """How many patches are hidden in each side x side window, overlapping ones too."""
    return flags.double().unfold(1, side, 1).unfold(2, side, 1).sum(dim=(-1, -2))


def test_grid_is_a_lattice() -> None:
    for grid in ((14, 14), (8, 12), (2, 6)):
        _, flags = draw(CONFIGS["grid"](0.75), grid, 400)
        assert (windows(flags, 2) == 3).all(), "one visible patch in each 2 x 2"
        patterns, counts = flags.flatten(1).unique(dim=0, return_counts=True)
        assert len(patterns) == 4 and counts.min() > 60
        _, flags = draw(CONFIGS["grid"](0.25), grid, 50)
        assert (windows(flags, 2) == 1).all(), "one hidden patch in each 2 x 2"
        _, flags = draw(CONFIGS["grid"](0.5), grid, 50)
        assert (flags[:, 1:] != flags[:, :-1]).all() and (flags[:, :, 1:] != flags[:, :, :-1]).all()
    _, flags = draw(CONFIGS["grid"](15 / 16), (8, 12), 50)
    assert (windows(flags, 4) == 15).all()
    _, flags = draw(CONFIGS["grid"](7 / 8), (8, 12), 50)
    assert (windows(flags, 4) == 14).all()


def test_grid_spreads_evenly_at_any_ratio() -> None:
    """No 4 x 4 window holds much more or less than its share."""
    for percent in range(10, 95, 7):
        _, flags = draw(CONFIGS["grid"](percent / 100), (12, 16), 100)
        hidden = windows(flags, 4)
        assert (hidden - 16 * percent / 100).abs().max() <= 2.5


def test_grid_on_the_matrix_itself_hides_each_patch_equally_often() -> None:
    _, flags = draw(CONFIGS["grid"](37 / 64), (8, 8), 6000)
    assert_share(flags, 37 / 64)
    assert len(flags.flatten(1).unique(dim=0)) == 64  # one a shift


def visible_shape(flags: Tensor) -> tuple[int, int, int]:
    """Height, width and number of the visible patches of one image; they must be connected."""
    visible = ~flags.numpy()
    _, blocks = ndimage.label(visible)
    assert blocks == 1
    rows, cols = visible.any(axis=1).nonzero()[0], visible.any(axis=0).nonzero()[0]
    return int(rows[-1] - rows[0] + 1), int(cols[-1] - cols[0] + 1), int(visible.sum())


@settings(max_examples=60, deadline=None)
@given(percent=PERCENT, grid=GRIDS, seed=st.integers(0, 2**40))
def test_inverse_block_shows_one_rectangle(percent: int, grid: Grid, seed: int) -> None:
    assume(0 < hidden_count(percent / 100, grid[0] * grid[1]) < grid[0] * grid[1])
    _, flags = draw(CONFIGS["inverse_block"](percent / 100), grid, 4, seed)
    for one in flags:
        height, width, visible = visible_shape(one)
        assert 0 <= height * width - visible < height  # only a part of one column is cut
        assert (~one).sum(dim=0).unique().numel() <= 3  # none, all, and the cut one's


@pytest.mark.parametrize(("aspect", "shape"), [(1.0, (4, 4)), (4.0, (8, 2)), (0.25, (2, 8))])
def test_inverse_block_follows_its_aspect_and_lies_anywhere(
    aspect: float, shape: tuple[int, int]
) -> None:
    config = MaskConfig(
        name="inverse_block",
        ratio=1 - 16 / 120,
        inverse_block=InverseBlockMaskConfig((aspect, aspect)),
    )
    _, flags = draw(config, (10, 12), 6000)
    assert {visible_shape(one)[:2] for one in flags[:200]} == {shape}
    seen = covering(10, shape[0])[:, None] * covering(12, shape[1])
    assert_share(~flags, seen)


def test_inverse_block_draws_the_aspect_log_uniformly() -> None:
    config = MaskConfig(
        name="inverse_block",
        ratio=1 - 400 / 10_000,
        inverse_block=InverseBlockMaskConfig((0.25, 4.0)),
    )
    _, flags = draw(config, (100, 100), 600)
    height, width, _ = zip(*(visible_shape(one) for one in flags), strict=True)
    logs = (torch.tensor(height) / torch.tensor(width)).log2() / 4 + 0.5  # uniform over 0 to 1
    assert logs.min() < 0.03 and logs.max() > 0.97
    assert abs(float(logs.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 600) + 0.01
    assert abs(float(logs.var()) - 1 / 12) < 0.01


def test_a_rolled_inverse_block_shows_every_patch_equally_often() -> None:
    _, flags = draw(CONFIGS["inverse_block+"](0.7), (7, 10), 6000)
    assert_share(flags, 0.7)


@pytest.mark.parametrize(("aspect", "shape"), [(1.0, (4, 4)), (4.0, (8, 2)), (0.25, (2, 8))])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole"])
def test_one_block_is_a_rectangle_anywhere_it_fits(
    aspect: float, shape: tuple[int, int], exact: bool
) -> None:
    block = BlockMaskConfig((16 / 120, 1.0), (aspect, aspect), exact)
    _, flags = draw(MaskConfig(name="block", ratio=16 / 120, block=block), (10, 12), 6000)
    assert {visible_shape(~one) for one in flags[:200]} == {(*shape, 16)}
    assert_share(flags, covering(10, shape[0])[:, None] * covering(12, shape[1]))


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole"])
@pytest.mark.parametrize("aspect", [0.1, 10.0])
def test_random_patches_stand_in_for_blocks_that_never_fit(exact: bool, aspect: float) -> None:
    block = BlockMaskConfig((0.5, 0.5), (aspect, aspect), exact)  # 1 x 13 on a grid of 6 x 6
    mask, _ = draw(MaskConfig(name="block", ratio=0.5, block=block), (6, 6), 20)
    plain, _ = draw(MaskConfig(ratio=0.5), (6, 6), 20)
    assert torch.equal(mask.is_masked, plain.is_masked)


def beit(grid: Grid, most: int, block: BlockMaskConfig, rng: random.Random) -> Tensor:
    """One mask by BEiT's rule, written as its authors do; (rows, columns) bool."""
    rows, cols = grid
    hidden = torch.zeros(grid, dtype=torch.bool)
    low, high = (share * rows * cols for share in block.area)
    while most > hidden.sum():
        left_over = most - int(hidden.sum())
        for _ in range(10):
            area = rng.uniform(low, min(high, left_over))
            aspect = math.exp(rng.uniform(*map(math.log, block.aspect)))
            height = max(1, round(math.sqrt(area * aspect)))
            width = max(1, round(math.sqrt(area / aspect)))
            if height > rows or width > cols:
                continue
            top, left = rng.randint(0, rows - height), rng.randint(0, cols - width)
            part = hidden[top : top + height, left : left + width]
            if 0 < height * width - int(part.sum()) <= left_over:
                part[:] = True
                break
        else:
            break
    return hidden


@pytest.mark.parametrize("ratio", [0.4, 0.75])
def test_whole_blocks_are_beits(ratio: float) -> None:
    block, grid = BlockMaskConfig(exact=False), (14, 14)
    mask, flags = draw(MaskConfig(name="block", ratio=ratio, block=block), grid, 4000)
    rng = random.Random(0)
    most = hidden_count(ratio, 196)
    theirs = torch.stack([beit(grid, most, block, rng) for _ in range(700)])
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        "count": lambda f: f,
        "edges": lambda f: f[:, 1:] != f[:, :-1],
        "centre": lambda f: f[:, 4:-4, 4:-4],
        "corners": lambda f: f[:, ::13, ::13],
    }
    for part, choose in parts.items():
        a, b = (choose(f).flatten(1).sum(dim=1).double() for f in (flags, theirs))
        error = math.sqrt(float(a.var()) / len(a) + float(b.var()) / len(b))
        assert abs(float(a.mean() - b.mean())) < 5 * error, part
    assert mask.is_masked.sum(dim=1).double().mean() > 0.98 * most


def test_exact_blocks_have_no_up_and_no_left() -> None:
    """A rectangle is cut from either end, so that the coverage has the grid's half turn."""
    config = MaskConfig(name="block", ratio=0.3, block=BlockMaskConfig((0.2, 0.2)))
    _, flags = draw(config, (6, 8), 20_000)
    share = flags.double().mean(dim=0)
    assert (share - share.flip(0, 1)).abs().max() < 5 * math.sqrt(0.5 / 20_000)


def test_exact_blocks_stay_blocks() -> None:
    """Few patches are filled up at random, even at a high ratio."""
    sizes = {}
    for name in ("block", "random"):
        mask, _ = draw(CONFIGS[name](0.6), (14, 14), 200)
        blocks = mask_statistics(mask, (14, 14))["block_sizes"]
        sizes[name] = sum(n * c for n, c in blocks.items()) / sum(blocks.values())
    assert sizes["block"] > 3 * sizes["random"]
    # With rectangles of at least 4 patches whose cut leaves at most one smaller: hardly a speck.
    mask, _ = draw(MaskConfig(name="block", ratio=0.75), (14, 14), 200)
    specks = mask_statistics(mask, (14, 14))["block_sizes"].get(1, 0)
    assert specks < 20


def test_what_lies_outside_the_context_is_hidden_first() -> None:
    config = MaskConfig(
        name="multiblock",
        ratio=28 / 64,
        multiblock=MultiblockMaskConfig(context_scale=(0.5, 0.5)),
    )
    _, flags = draw(config, (8, 8), 3000)  # sides sqrt(0.5) * 8 = 5.7: a context of 6 x 6
    assert {visible_shape(one) for one in flags[:200]} == {(6, 6, 36)}
    assert_share(~flags, covering(8, 6)[:, None] * covering(8, 6))
    lower = MaskConfig(name="multiblock", ratio=10 / 64, multiblock=config.multiblock)
    assert (draw(lower, (8, 8), 300)[1] <= flags[:300]).all()  # the same, only fewer of them


@pytest.mark.parametrize("targets", [1, 2, 4])
def test_targets_are_few_blocks(targets: int) -> None:
    config = MaskConfig(
        name="multiblock",
        ratio=0.3,
        multiblock=MultiblockMaskConfig(targets, context_scale=(1.0, 1.0)),
    )
    _, flags = draw(config, (14, 14), 100)
    blocks = [ndimage.label(one.numpy())[1] for one in flags]
    assert min(blocks) >= 1 and max(blocks) == targets
    if targets == 1:  # a rectangle but for one side, on which the count may fall
        for one in flags:
            height, width, hidden = visible_shape(~one)
            assert height * width - hidden < height + width


def test_a_target_has_its_aspect() -> None:
    config = MaskConfig(
        name="multiblock",
        ratio=0.005,
        multiblock=MultiblockMaskConfig(1, (4.0, 4.0), context_scale=(1.0, 1.0)),
    )
    _, flags = draw(config, (100, 100), 200)  # 50 patches: 14.1 x 3.5
    shapes = [visible_shape(~one)[:2] for one in flags]
    height, width = sum(h for h, _ in shapes) / 200, sum(w for _, w in shapes) / 200
    assert 2.8 < height / width < 4.6


def test_targets_grow_together() -> None:
    """Masks are nested over ratios: a higher one grows the same targets."""
    low, high = (draw(CONFIGS["multiblock"](ratio), (9, 11), 50)[1] for ratio in (0.3, 0.6))
    assert (low <= high).all()


@pytest.mark.parametrize(
    ("unit", "patch", "grid", "ratio", "message"),
    [
        (32, None, (14, 14), 0.5, r"mask\.aligned\.unit: 32 is in pixels.*patch_size"),
        (24, (16, 16), (14, 14), 0.5, r"unit: 24 is no multiple of the patch size, 16 x 16 pixels"),
        ((32, 8), (16, 16), (14, 14), 0.5, r"unit: \(32, 8\) is no multiple of the patch size"),
        (48, (16, 16), (14, 14), 0.5, r"unit: 48 makes units of 3 x 3 .* not divide .* 14 x 14"),
        ((32, 48), (16, 16), (14, 14), 0.5, r"units of 2 x 3 patches, which do not divide"),
        (64, (16, 16), (4, 4), 0.5, r"mask\.ratio: 0\.5 hides every mask unit of a grid of 1 x 1"),
        (32, (16, 16), (4, 4), 0.1, r"mask\.ratio: 0\.1 hides no mask unit of a grid of 2 x 2"),
    ],
)
def test_a_unit_that_does_not_fit_is_refused(
    unit: int | tuple[int, int], patch: Grid | None, grid: Grid, ratio: float, message: str
) -> None:
    config = MaskConfig(name="aligned", ratio=ratio, aligned=AlignedMaskConfig(unit))
    with pytest.raises(UserError, match=message):
        build_mask_generator(config, grid, patch)


def test_a_unit_may_be_one_patch() -> None:
    aligned = MaskConfig(name="aligned", ratio=0.5, aligned=AlignedMaskConfig(PATCH))
    plain = MaskConfig(name="random", ratio=0.5)
    assert torch.equal(draw(aligned, (6, 7), 5)[1], draw(plain, (6, 7), 5)[1])


@pytest.mark.parametrize(
    ("name", "ratio", "what"),
    [
        ("column", 0.1, "hides no column of a grid of 9 x 4"),
        ("column", 0.9, "hides every column of a grid of 9 x 4"),
        ("row", 0.05, "hides no row of a grid of 9 x 4"),
        ("row", (0.5, 0.95), "hides every row of a grid of 9 x 4"),
        ("block", 0.99, "hides every patch of a grid of 9 x 4"),
        ("grid", 0.01, "hides no patch of a grid of 9 x 4"),
        ("multiblock", 0.99, "hides every patch"),
        ("inverse_block", 0.99, "hides every patch"),
    ],
)
def test_a_ratio_that_leaves_nothing_is_refused(name: str, ratio: Ratio, what: str) -> None:
    with pytest.raises(UserError, match=rf"mask\.ratio: .* {what}"):
        build_mask_generator(CONFIGS[name](ratio), (9, 4), PATCH)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("block.area=[0.5, 0.2]", r"mask\.block\.area: .* must be 0 < from <= to <= 1"),
        ("block.area=[0.1, 1.5]", r"mask\.block\.area"),
        ("block.aspect=[0, 2]", r"mask\.block\.aspect: .* must be 0 < from <= to$"),
        ("aligned.unit=0", r"mask\.aligned\.unit: 0 must be at least 1"),
        ("aligned.unit=[16, -1]", r"mask\.aligned\.unit"),
        ("inverse_block.aspect=[2, 1]", r"mask\.inverse_block\.aspect"),
        ("multiblock.targets=0", r"mask\.multiblock\.targets: 0 must be at least 1"),
        ("multiblock.aspect=[-1, 1]", r"mask\.multiblock\.aspect"),
        ("multiblock.context_scale=[0.8, 1.1]", r"mask\.multiblock\.context_scale"),
        ("file.share=0", r"mask\.file\.share: 0\.0 must be above 0"),
        ("file.share=1.5", r"mask\.file\.share"),
    ],
)
def test_settings_that_make_no_sense_are_refused(option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_args(Config, [f"--mask.{option}"])


def test_settings_are_read() -> None:
    args = ["--name=aligned", "--aligned.unit=[32, 16]", "--block.exact=false"]
    config = read_args(MaskConfig, args)
    assert config.aligned.size == (32, 16) and not config.block.exact
    assert read_args(MaskConfig, []).aligned.size == (32, 32)


def rows(*texts: str) -> Tensor:
    """'.x..' -> hidden where x."""
    return torch.tensor([[c == "x" for c in text] for text in texts])


def test_statistics_by_hand() -> None:
    first = rows("xx..", "....", "..xx")
    second = rows("x..x", "xx..", "..x.")  # touching corners make no block
    mask = PatchMask(torch.stack([first, second]).flatten(1))
    found = mask_statistics(mask, (3, 4))
    assert found["ratio_mean"] == pytest.approx(4.5 / 12)
    assert (found["ratio_min"], found["ratio_max"]) == (4 / 12, 5 / 12)
    assert found["block_sizes"] == {1: 2, 2: 2, 3: 1}
    assert found["hidden_share"].tolist() == [[1, 0.5, 0, 0.5], [0.5, 0.5, 0, 0], [0, 0, 1, 0.5]]
    assert mask_statistics(PatchMask.empty(2, 12), (3, 4))["block_sizes"] == {}
    with pytest.raises(ValueError, match="3 x 5 has not 12 patches"):
        mask_statistics(mask, (3, 5))
