"""Padding in masks, and packed rows: who stands where, and who reads whom."""

from __future__ import annotations

import pytest
import torch

from mim.core.config import MaskConfig
from mim.core.errors import UserError
from mim.core.patches import Patches
from mim.core.rng import image_keys
from mim.masks import MASKS, PatchMask, build_mask_generator, sample_masks
from mim.model.attention import causal, key_bias, to_additive
from mim.model.packing import Packing, first_fit

LOOKS = ("attention", "learned", "file", "aligned", "target_blocks")


def flags(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


def test_padding_is_neither_visible_nor_masked() -> None:
    mask = PatchMask(flags("x..x", ".x..", "xx.."), valid=flags("xxxx", "xx..", "xxx."))
    assert mask.is_visible.tolist() == flags(".xx.", "x...", "..x.").tolist()
    assert mask.counts == (1, 2) and (mask.num_visible, mask.num_masked) == (2, 2)
    assert mask.visible_ids.tolist() == [[1, 2], [0, 0], [2, 0]]
    assert mask.masked_ids.tolist() == [[0, 3], [1, 0], [0, 1]]
    assert mask.visible_valid is not None and mask.masked_valid is not None
    assert mask.visible_valid.tolist() == [[True, True], [True, False], [True, False]]
    assert mask.masked_valid.tolist() == [[True, True], [True, False], [True, True]]
    part = mask[1:]
    assert part.valid is not None and part.visible_valid is not None  # padding stays
    assert part.visible_valid.tolist() == [[True, False], [True, False]] and not part.is_equal
    with pytest.raises(ValueError, match="padding is masked"):
        PatchMask(flags("..x"), valid=flags("xx."))
    with pytest.raises(ValueError, match="valid must have the mask's shape"):
        PatchMask(flags("..x"), valid=flags("xx"))


def test_valid_everywhere_is_no_padding() -> None:
    """Two ways to derive the same."""
    drawn = sample_masks(
        MaskConfig(ratio=(0.2, 0.8)), (3, 4), seed=0, epoch=0, sample_ids=[*range(9)]
    )
    other = PatchMask(drawn.is_masked, valid=torch.ones_like(drawn.is_masked))
    for name in ("counts", "num_masked", "is_equal"):
        assert getattr(drawn, name) == getattr(other, name)
    for name in ("visible_ids", "masked_ids", "visible_valid", "masked_valid"):
        assert torch.equal(getattr(drawn, name), getattr(other, name))


@pytest.mark.parametrize("name", [name for name in MASKS if name not in LOOKS])
def test_a_mask_depends_on_nothing_but_key_and_grid(name: str) -> None:
    grids = [(4, 6), (6, 4), (4, 6), (5, 5), (8, 3)]
    ids = torch.tensor([5, 6, 7, 8, 9])
    config = MaskConfig(name=name, ratio=(0.4, 0.6))
    generator = build_mask_generator(config)
    images = Patches.pad([torch.zeros(r * c, 3) for r, c in grids], grids)
    keys = image_keys(1, 2, ids)
    drawn = generator.draw_sizes(images, keys, epoch=2, sample_ids=ids)
    for row, grid in enumerate(grids):
        one = ids[row : row + 1]
        alone = sample_masks(config, grid, seed=1, epoch=2, sample_ids=one)
        count = grid[0] * grid[1]
        assert torch.equal(drawn.is_masked[row, :count], alone.is_masked[0])
        assert not drawn.is_masked[row, count:].any()
        share, valid = drawn[row : row + 1].masked_share(0.5)
        single, single_valid = alone.masked_share(0.5)
        assert torch.equal(share if valid is None else share[valid][None], single)
        assert single_valid is None


@pytest.mark.parametrize("name", LOOKS)
def test_generators_of_one_size_refuse(name: str) -> None:
    generator = build_mask_generator(MaskConfig(name=name), patch_size=(4, 4))
    images = Patches.pad([torch.zeros(4, 3)], [(2, 2)])
    with pytest.raises(UserError, match=r"data\.aspect"):
        generator.draw_sizes(images, torch.tensor([1]))


def test_rows_are_filled_first_fit() -> None:
    assert first_fit([3, 5, 2, 2, 1], 5) == [[1], [0, 2], [3, 4]]
    assert first_fit([4], 4) == [[0]]


VALID = flags("xxxxx", "xxx..", "xx...", "x....")


@pytest.mark.parametrize("num_keys", [None, 2])
def test_packing_there_and_back(num_keys: int | None) -> None:
    packing = Packing.of(VALID, num_keys)
    tokens = torch.arange(1.0, 21).view(4, 5, 1) * VALID[..., None]
    packed = packing.pack(tokens)
    assert (packing.owner >= 0).sum() == VALID.sum()
    assert packed.count_nonzero() == VALID.sum()
    assert torch.equal(packing.unpack(packed), tokens)
    if num_keys is None:
        assert packed.shape == (3, 5, 1)  # 5; 3 and 2; 1
    else:
        assert packing.num_keys is not None
        read = packing.owner[:, : packing.num_keys]
        assert (read >= 0).sum() == sum(min(n, 2) for n in (5, 3, 2, 1))


@pytest.mark.parametrize("kind", ["padding", "keys", "order"])
def test_packed_attention_is_that_of_the_padded_batch(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    readable = VALID.clone()
    readable[0, 3] = readable[1, 1] = False  # hidden keys besides padding
    bias = key_bias(VALID if kind == "padding" else readable, x.dtype)
    num_keys = 2 if kind == "keys" else None
    if kind == "order":
        bias = bias + to_additive(causal(5), x.dtype)
    if num_keys:
        bias = key_bias(VALID[:, :2], x.dtype)

    def attend(x: torch.Tensor, bias: torch.Tensor, keys: int | None) -> torch.Tensor:
        scores = (x @ x[:, :keys].mT)[:, None] + bias
        return (scores.softmax(-1) @ x[:, None, :keys])[:, 0]

    expected = attend(x, bias, num_keys)
    packing = Packing.of(VALID, num_keys)
    packed = attend(packing.pack(x), packing.bias(bias, x.dtype), packing.num_keys)
    assert packed.isfinite().all()
    found = packing.unpack(packed)
    torch.testing.assert_close(found[VALID], expected[VALID], rtol=1e-12, atol=1e-12)
