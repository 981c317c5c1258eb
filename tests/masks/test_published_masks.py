"""Masks of data2vec 2.0, I-JEPA and CAPI beside simple draws from their papers' descriptions.

Each map of probabilities must lie within four standard errors of that of an independent
implementation, written here, over 20,000 images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import mim
from mim.core.config import MaskConfig
from mim.core.errors import UserError
from mim.core.fields import build
from mim.masks import PatchMask, sample_masks

DRAWS = 20_000
SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2}
Flags = NDArray[np.bool_]


def sampled(grid: tuple[int, int], images: int = DRAWS, epoch: int = 0, **mask: Any) -> PatchMask:
    config = build(MaskConfig, mask, "mask")
    return sample_masks(config, grid, seed=0, epoch=epoch, sample_ids=list(range(images)))


def assert_same_map(ours: Flags, theirs: Flags, batch: int = 1) -> None:
    """Compare (draws, N) flags; theirs come in batches whose members are not independent."""
    means = theirs.reshape(-1, batch, theirs.shape[1]).mean(axis=1)
    error = np.sqrt(means.var(axis=0) / len(means) + ours.var(axis=0) / len(ours))
    apart = np.abs(ours.mean(axis=0) - means.mean(axis=0))
    assert (apart <= 4 * error + 1e-12).all(), (apart / error.clip(1e-12)).max()


def squares(rng: np.random.Generator, side: int, visible: int, extra: float) -> Flags:
    """Draw data2vec 2.0's masks on 14 x 14 patches: True where hidden."""
    shown, images = np.zeros((DRAWS, 14, 14), dtype=bool), np.arange(DRAWS)
    for _ in range(int(196 * (0.2 + extra) / side**2)):
        row, column = rng.integers(14, size=(2, DRAWS))
        for down in range(side):
            for right in range(side):
                at = row + down - side // 2, column + right - side // 2
                shown[images, at[0].clip(0, 13), at[1].clip(0, 13)] = True
    # Those marked come first, in random order, then the others, in random order.
    place = np.argsort(~shown.reshape(DRAWS, 196) + rng.random((DRAWS, 196)), axis=1)
    hidden = np.ones((DRAWS, 196), dtype=bool)
    np.put_along_axis(hidden, place[:, :visible], False, axis=1)
    return hidden


@pytest.mark.parametrize(("side", "extra"), [(3, 0.07), (2, 0.3)])
def test_squares_are_data2vec_2_s(side: int, extra: float) -> None:
    rng = np.random.default_rng(side)
    theirs = squares(rng, side, 39, extra)
    settings = {"side": side, "extra": extra}
    mask = sampled((14, 14), name="squares", ratio=0.8, rounding="floor_visible", squares=settings)
    assert (mask.is_masked.sum(dim=1) == 157).all(), "39 of 196 are visible: 39.2 rounded down"
    ours = mask.is_masked.numpy()
    assert_same_map(ours, theirs)
    # How often a patch and its neighbour are hidden both: the squares themselves.
    pairs = [f.reshape(-1, 14, 14) for f in (ours, theirs)]
    assert_same_map(*((f[:, :, 1:] & f[:, :, :-1]).reshape(len(f), -1) for f in pairs))


def test_squares_may_mark_what_is_hidden() -> None:
    shown = sampled((14, 14), 2000, name="squares", ratio=0.75).is_masked.view(-1, 14, 14)
    hidden = sampled((14, 14), 2000, name="squares", ratio=0.25, squares={"mark": "hidden"})
    assert (hidden.is_masked.sum(dim=1) == 49).all()
    both = hidden.is_masked.view(-1, 14, 14)
    rate = [(f[:, 1:] & f[:, :-1]).double().mean().item() for f in (~shown, both)]
    assert rate[0] == pytest.approx(rate[1], rel=0.03) and rate[1] > 2 * 0.25**2


def blocks(rng: np.random.Generator, number: int, height: int, width: int) -> Flags:
    """Place rectangles on 16 x 16 patches; numpy's integers exclude the end, as torch's do."""
    top, left = rng.integers(16 - height, size=number), rng.integers(16 - width, size=number)
    down, right = np.arange(16) - top[:, None], np.arange(16) - left[:, None]
    rows, columns = (down >= 0) & (down < height), (right >= 0) & (right < width)
    return (rows[:, :, None] & columns[:, None, :]).reshape(number, 256)


def sides(drawn: float, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
    area = int(256 * (scale[0] + drawn * (scale[1] - scale[0])))
    ratio = aspect[0] + drawn * (aspect[1] - aspect[0])
    return min(round((area * ratio) ** 0.5), 15), min(round((area / ratio) ** 0.5), 15)


def i_jepa(rng: np.random.Generator, batch: int) -> tuple[Flags, Flags]:
    """Contexts and unions of targets (B, N) of a batch whose images share their sizes."""
    target = sides(rng.random(), (0.15, 0.2), (0.75, 1.5))
    context = sides(rng.random(), (0.85, 1.0), (1.0, 1.0))
    union = blocks(rng, 4 * batch, *target).reshape(batch, 4, 256).any(axis=1)
    inside = blocks(rng, batch, *context) & ~union
    assert inside.sum(axis=1).min() > 10, "with these sizes the first place does"
    least = inside.sum(axis=1).min()
    return inside & (np.cumsum(inside, axis=1) <= least), union


def target_flags(mask: PatchMask) -> torch.Tensor:
    """(B, T, N) bool."""
    ids, valid = mask.target_ids, mask.target_valid
    assert ids is not None
    times = torch.ones_like(ids) if valid is None else valid.long()
    flags = torch.zeros(*ids.shape[:2], mask.num_patches, dtype=torch.int64)
    return flags.scatter_add(2, ids, times) > 0


def test_target_blocks_are_i_jepa_s() -> None:
    rng = np.random.default_rng(0)
    drawn = [i_jepa(rng, 16) for _ in range(DRAWS // 16)]
    mask = sampled((16, 16), name="target_blocks", target_blocks={"batch": 16})
    assert_same_map(mask.is_visible.numpy(), np.concatenate([c for c, _ in drawn]), 16)
    union = target_flags(mask).any(dim=1)
    assert_same_map(union.numpy(), np.concatenate([u for _, u in drawn]), 16)


def test_what_a_mask_of_target_blocks_holds() -> None:
    mask = sampled((16, 16), 500, name="target_blocks")
    flags = target_flags(mask)
    areas = flags.sum(dim=2)
    assert (areas == areas[:, :1]).all(), "the targets of an image have one size"
    assert len(areas[:, 0].unique()) > 2, "and those of two images need not"
    assert not (flags.any(dim=1) & mask.is_visible).any(), "no target is in the context"
    for seen in (flags.any(dim=1), mask.is_visible):
        spread = seen.view(-1, 16, 16)
        assert not spread[:, 15].any() and not spread[:, :, 15].any()
        assert spread[:, 14].any() and spread[:, :, 14].any()
    assert mask.is_visible.sum(dim=1).min() > 10
    uncut = sampled((16, 16), 500, name="target_blocks", target_blocks={"batch": 1})
    assert torch.equal(target_flags(uncut), flags)
    assert (mask.is_visible & ~uncut.is_visible).sum() == 0
    first = uncut.is_visible.long().cumsum(dim=1) <= mask.is_visible.sum(dim=1, keepdim=True)
    assert torch.equal(mask.is_visible, uncut.is_visible & first), "cut from the end"


@pytest.mark.parametrize("sizes", ["image", "epoch"])
def test_target_blocks_do_not_depend_on_the_batch(sizes: str) -> None:
    config = build(MaskConfig, {"name": "target_blocks", "target_blocks": {"sizes": sizes}}, "mask")
    together = sample_masks(config, (14, 14), seed=1, epoch=3, sample_ids=list(range(12)))
    for image in range(12):
        alone = sample_masks(config, (14, 14), seed=1, epoch=3, sample_ids=[image])
        assert torch.equal(alone.is_masked[0], together.is_masked[image])
        assert torch.equal(target_flags(alone)[0], target_flags(together)[image])


def test_sizes_once_an_epoch() -> None:
    settings = {"sizes": "epoch"}
    areas = set()
    for epoch in range(12):
        mask = sampled((16, 16), 8, epoch, name="target_blocks", target_blocks=settings)
        assert mask.target_valid is None, "all images have one size"
        assert mask.target_ids is not None
        areas.add(mask.target_ids.shape[2])
    assert len(areas) > 2


def test_a_grid_without_room_for_a_context_is_refused() -> None:
    with pytest.raises(UserError, match=r"mask.target_blocks.min_keep: 10 .* 2 x 2 patches"):
        sampled((3, 3), 1, name="target_blocks")


def test_capi_hides_166_of_256_and_every_patch_as_often() -> None:
    mask = sampled((16, 16), name="inverse_block", ratio=0.65, inverse_block={"roll": True})
    assert (mask.is_masked.sum(dim=1) == 166).all()
    assert MaskConfig().inverse_block.aspect == (0.5, 2.0)
    rate = mask.is_masked.numpy().mean(axis=0)
    error = np.sqrt(166 / 256 * 90 / 256 / DRAWS)
    assert (np.abs(rate - 166 / 256) <= 4 * error).all()


def test_a_mask_of_target_blocks_trains_under_each_regime() -> None:
    for regime in ("drop", "zero", "token"):
        config = mim.load_config(
            None,
            {
                "data.source": "digits",
                "data.image_size": 32,
                "data.channels": 1,
                "mask.name": "target_blocks",
                "model.backbone_args": {**SMALL, "patch_size": 4},
                "model.regime.name": regime,
                "model.decoder.transformer": {"width": 16, "depth": 1, "heads": 2},
            },
        )
        model = mim.build_model(config)
        images = torch.randn(3, 1, 32, 32)
        mask = model.draw_mask(images, torch.arange(3))
        loss = model(images, mask).loss
        loss.backward()
        assert torch.isfinite(loss)
