"""PatchMask: what it derives, how it checks itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mim.masks import PatchMask
from mim.model.attention import key_bias


def rows(*texts: str) -> Tensor:
    """'.x..' -> hidden where x."""
    return torch.tensor([[c == "x" for c in text] for text in texts])


def test_equal_rows_by_hand() -> None:
    mask = PatchMask(rows("x..x.", "..x.x"))
    assert mask.visible_ids.tolist() == [[1, 2, 4], [0, 1, 3]]
    assert mask.masked_ids.tolist() == [[0, 3], [2, 4]]
    assert mask.visible_valid is None and mask.masked_valid is None
    assert mask.is_equal
    assert (len(mask), mask.num_patches, mask.num_visible, mask.num_masked) == (2, 5, 3, 2)


def test_unequal_rows_by_hand() -> None:
    mask = PatchMask(rows("xx.x", "...x", "....", "xxxx"))
    assert mask.visible_valid is not None and mask.masked_valid is not None
    assert mask.visible_ids.tolist() == [[2, 0, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 0]]
    assert mask.visible_valid.int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
    ]
    assert mask.masked_ids.tolist() == [[0, 1, 3, 0], [3, 0, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert mask.masked_valid.int().tolist() == [
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 1, 1, 1],
    ]
    assert not mask.is_equal
    assert (mask.num_visible, mask.num_masked) == (4, 4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)
    )
)
def test_ids_say_what_the_flags_say(flags: list[list[bool]]) -> None:
    mask = PatchMask(torch.tensor(flags))
    for ids, valid, want in (
        (mask.visible_ids, mask.visible_valid, False),
        (mask.masked_ids, mask.masked_valid, True),
    ):
        keep = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        expected = [[n for n, hidden in enumerate(row) if hidden == want] for row in flags]
        assert [i[k].tolist() for i, k in zip(ids, keep, strict=True)] == expected
        assert not ids[~keep].any()  # padding points at patch 0
        assert ids.shape[1] == max(map(len, expected))
        assert (valid is None) == (len(set(map(len, expected))) == 1)


@pytest.mark.parametrize("hides", [False, True])
def test_nothing_and_everything_hidden(hides: bool) -> None:
    mask = PatchMask(torch.full((2, 3), hides))
    assert mask.visible_ids.shape == (2, 0 if hides else 3)
    assert mask.masked_ids.shape == (2, 3 if hides else 0)
    assert mask.is_equal
    assert (mask.num_visible, mask.num_masked) == ((0, 3) if hides else (3, 0))


def test_empty_hides_nothing() -> None:
    mask = PatchMask.empty(2, 4)
    assert not mask.is_masked.any()
    assert mask.visible_ids.tolist() == [[0, 1, 2, 3]] * 2


def test_from_ranks_hides_the_first() -> None:
    ranks = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    assert torch.equal(PatchMask.from_ranks(ranks, 2).is_masked, rows(".x.x", "xx.."))
    unequal = PatchMask.from_ranks(ranks, torch.tensor([1, 3]))
    assert torch.equal(unequal.is_masked, rows(".x..", "xxx."))
    assert not unequal.is_equal


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(2, 3, dtype=torch.int64),
        [[True, False]],
        None,
    ],
    ids=["float", "uint8", "int64", "list", "none"],
)
def test_flags_must_be_a_bool_tensor(value: object) -> None:
    with pytest.raises(TypeError, match=r"is_masked must be a bool tensor \(True = hidden\)"):
        PatchMask(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3), (2, 0), ()])
def test_shape_must_be_images_by_patches(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(images, patches\)") as error:
        PatchMask(torch.zeros(shape, dtype=torch.bool))
    assert str(shape) in str(error.value)


def test_is_immutable() -> None:
    mask = PatchMask(rows(".x"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.is_masked = rows("x.")  # type: ignore[misc]


def test_slices_are_masks_of_those_images() -> None:
    unequal = PatchMask(rows("xx.", "x..", ".x.", "..."))
    part = unequal[1:3]
    assert torch.equal(part.is_masked, rows("x..", ".x."))
    assert part.visible_valid is not None and part.masked_valid is not None
    for row, visible, hidden in ((0, [1, 2], [0]), (1, [0, 2], [1])):
        assert part.visible_ids[row][part.visible_valid[row]].tolist() == visible
        assert part.masked_ids[row][part.masked_valid[row]].tolist() == hidden
    assert part.num_visible == unequal.num_visible  # its own would be read from the device
    equal = PatchMask(rows("xx.", ".xx", "x.x"))
    assert len(equal[1:]) == 2 and equal[1:].masked_ids.tolist() == [[1, 2], [0, 2]]
    assert torch.equal(equal[::2].is_masked, rows("xx.", "x.x"))


@pytest.mark.parametrize("texts", [("x..", ".x."), ("xx.", ".x.")], ids=["equal", "unequal"])
def test_to_moves_everything(texts: tuple[str, ...]) -> None:
    mask = PatchMask(rows(*texts))
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    for name in ("is_masked", "visible_ids", "masked_ids", "visible_valid", "masked_valid"):
        before, after = getattr(mask, name), getattr(moved, name)
        assert (before is None) == (after is None), name
        if before is not None:
            assert after.device.type == "meta" and after.shape == before.shape, name
    assert moved.is_equal == mask.is_equal and moved.num_visible == mask.num_visible
    assert mask.is_masked.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("texts", [("x..", ".x."), ("xx.", ".x.")], ids=["equal", "unequal"])
def test_a_mask_built_on_the_gpu_is_the_one_built_here(texts: tuple[str, ...]) -> None:
    here, there = PatchMask(rows(*texts)), PatchMask(rows(*texts).cuda())
    for name in ("visible_ids", "masked_ids", "visible_valid", "masked_valid"):
        before, after = getattr(here, name), getattr(there, name)
        assert (before is None) == (after is None), name
        if before is not None:
            assert torch.equal(before, after.cpu()), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_key_bias_gives_exactly_no_weight(dtype: torch.dtype) -> None:
    readable = ~rows("x.x.", "...x")
    bias = key_bias(readable, dtype)
    assert bias.shape == (2, 1, 1, 4) and bias.dtype == dtype
    weights = (torch.randn(2, 3, 5, 4).to(dtype) + bias).softmax(-1)
    assert torch.equal((weights == 0).all(dim=(1, 2)), ~readable)
    torch.testing.assert_close(weights.sum(-1).float(), torch.ones(2, 3, 5), rtol=0, atol=1e-2)
