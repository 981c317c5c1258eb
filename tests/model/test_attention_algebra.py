"""The algebra of attention masks, against published numbers, timm's Swin and PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformerBlock, window_partition
from torch import Tensor, nn

from mim.core.errors import UserError
from mim.masks import PatchMask
from mim.model.attention import (
    both,
    causal,
    either,
    masked_softmax,
    readable_keys,
    shifted_windows,
    sliding_window,
    to_additive,
    to_padding,
    visible_keys,
)

SCORES = torch.tensor(
    [
        [-0.786, 1.136, 1.624, 0.417, 1.366],
        [-0.520, -0.127, -0.219, -0.489, 0.276],
        [-0.937, -0.734, 1.221, -0.305, 1.020],
        [2.252, -0.042, -1.098, 1.135, -0.075],
    ]
)
WEIGHTS = torch.tensor(
    [
        [0.231, 0, 0, 0.769, 0],
        [0.492, 0, 0, 0.508, 0],
        [0.347, 0, 0, 0.653, 0],
        [0.754, 0, 0, 0.246, 0],
    ]
)
KEYS = torch.tensor([[True, False, False, True, False]])  # columns 1, 2 and 4 are masked


def flags(*rows: str) -> Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


@pytest.mark.parametrize("fill", [-math.inf, -1e9, -1e4])
def test_the_published_example(fill: float) -> None:
    # Scores are printed with three digits, too: that moves a weight by up to 2e-4.
    weights = (SCORES + to_additive(readable_keys(KEYS), fill=fill)[0, 0]).softmax(-1)
    torch.testing.assert_close(weights, WEIGHTS, rtol=0, atol=7e-4)
    assert (weights[:, [1, 2, 4]] == 0).all()
    torch.testing.assert_close(masked_softmax(SCORES, KEYS), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    for fill in (-math.inf, -1e4):
        weights = (SCORES.to(dtype) + to_additive(KEYS, dtype, fill)).softmax(-1)
        torch.testing.assert_close(weights.float(), WEIGHTS, rtol=0, atol=5e-3)
    if dtype == torch.float16:
        with pytest.raises(UserError, match=r"fill: -1000000000\.0 is below the lowest float16"):
            to_additive(KEYS, dtype, -1e9)
    else:
        assert to_additive(KEYS, dtype, -1e9).isfinite().all()


@pytest.mark.parametrize("fill", [0.0, 1.0, math.nan])
def test_a_fill_that_hides_nothing_is_refused(fill: float) -> None:
    with pytest.raises(UserError, match=r"fill: .* must be below 0"):
        to_additive(KEYS, fill=fill)


def test_a_mask_that_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="True = may attend"):
        to_additive(torch.zeros(1, 5))


def test_an_empty_row_gives_zeros_and_no_nan_gradient() -> None:
    scores = SCORES.clone().requires_grad_()
    allowed = torch.ones(4, 5, dtype=torch.bool)
    allowed[1] = False
    allowed[2, :3] = False
    weights = masked_softmax(scores, allowed)
    assert (weights[1] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.tensor([1.0, 0, 1, 1]))
    (weights * torch.arange(5)).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert (scores.grad[1] == 0).all() and (scores.grad[2, :3] == 0).all()
    assert scores.grad[0].abs().max() > 0
    full = torch.ones(4, 5, dtype=torch.bool)
    torch.testing.assert_close(masked_softmax(SCORES, full), SCORES.softmax(-1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 6))
def test_forms_agree_wherever_a_row_reads_something(seed: int, queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, keys, generator=generator)
    allowed = torch.rand(queries, keys, generator=generator) < 0.6
    allowed[:, 0] |= ~allowed.any(1)
    expected = masked_softmax(scores, allowed)
    for fill in (-math.inf, -1e4, -1e9):
        bias = to_additive(allowed, fill=fill)
        torch.testing.assert_close((scores + bias).softmax(-1), expected)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator) for n in (queries, keys, keys))
    by_bool = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # True = may attend
    by_bias = F.scaled_dot_product_attention(q, k, v, attn_mask=to_additive(allowed))
    torch.testing.assert_close(by_bool, by_bias)


def test_padding_is_pytorchs() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, valid = torch.randn(2, 4, 8), flags("xxx.", "xx..")
    allowed = readable_keys(valid)
    with torch.no_grad():
        _, weights = attention(x, x, x, key_padding_mask=to_padding(allowed))
        bias = to_additive(allowed).expand(2, 2, 4, 4).reshape(4, 4, 4)
        _, same = attention(x, x, x, attn_mask=bias)
    torch.testing.assert_close(weights, same)
    assert (weights[0, :, 3] == 0).all() and (weights[1, :, 2:] == 0).all()
    with pytest.raises(ValueError, match="padding"):
        to_padding(causal(4))


def test_masked_patches_with_a_prefix() -> None:
    mask = PatchMask(flags("x..x", "..x."))
    expected = flags("xx.xx.", "xxxx.x")[:, None, None]
    assert torch.equal(visible_keys(mask, 2), expected)
    assert visible_keys(mask).shape == (2, 1, 1, 4)


def test_orders_by_hand() -> None:
    assert torch.equal(causal(3)[0, 0], flags("x..", "xx.", "xxx"))
    assert torch.equal(causal(4, 2)[0, 0], flags("xx..", "xx..", "xxx.", "xxxx"))
    assert causal(3, 3).all()
    for wrong in (-1, 4):
        with pytest.raises(UserError, match=f"num_prefix: {wrong}"):
            causal(3, wrong)


@pytest.mark.parametrize("num_prefix", [0, 3])
def test_no_later_token_reaches_an_earlier_one(num_prefix: int) -> None:
    """Through two layers: the gradient of a token with respect to what comes after it is 0."""
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    allowed = causal(6, num_prefix)
    y: Tensor = x
    for _ in range(2):
        y = y + masked_softmax(y @ y.mT, allowed[0]) @ y
    for token in range(6):
        (grad,) = torch.autograd.grad(y[0, token].sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(1) > 0
        last = max(token, num_prefix - 1) if token < num_prefix else token
        assert reached.tolist() == [place <= last for place in range(6)]


def test_a_sliding_window_by_hand() -> None:
    near = sliding_window((3, 3), 1)[0, 0]
    assert torch.equal(near[4], torch.ones(9, dtype=torch.bool))
    assert torch.equal(near[0].view(3, 3), flags("xx.", "xx.", "..."))
    assert torch.equal(sliding_window((2, 3), 0)[0, 0], torch.eye(6, dtype=torch.bool))
    assert torch.equal(near, near.mT)
    with pytest.raises(UserError, match="radius: -1"):
        sliding_window((2, 2), -1)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (1, 2)])
@pytest.mark.parametrize("grid", [(8, 8), (12, 4)])
def test_windows_are_those_of_timms_swin(grid: tuple[int, int], shift: tuple[int, int]) -> None:
    block = SwinTransformerBlock(
        8, grid, num_heads=1, head_dim=8, window_size=4, shift_size=shift, always_partition=True
    )
    allowed = shifted_windows(grid, (4, 4), shift)[0, 0]
    ids = torch.arange(grid[0] * grid[1]).view(1, *grid).roll((-shift[0], -shift[1]), dims=(1, 2))
    ids = window_partition(ids[..., None], (4, 4)).flatten(1)  # (windows, 16), as timm cuts them
    ours = allowed[ids[:, :, None], ids[:, None, :]]
    theirs = block.get_attn_mask(device=torch.device("cpu"), dtype=torch.float32)
    if theirs is None:
        assert ours.all() and shift == (0, 0)
    elif all(shift):
        assert torch.equal(ours, theirs == 0)
    # Whoever shares a window, and is no stranger there, may attend; nobody else.
    assert allowed.sum() == ours.sum()
    assert torch.equal(allowed, allowed.mT) and allowed.diagonal().all()


def test_a_swin_block_computes_what_the_full_mask_says() -> None:
    """Window attention equals full attention under the L x L mask (without position bias)."""
    torch.manual_seed(0)
    block = SwinTransformerBlock(8, (8, 8), num_heads=2, window_size=4, shift_size=2).double()
    block.eval()
    nn.init.zeros_(block.attn.relative_position_bias_table)
    # timm's mask is -100, not -inf: its weights are zero to 1e-40.
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    attn = block.attn
    with torch.no_grad():
        theirs = block._attn(x).view(1, 64, 8)
        q, k, v = attn.qkv(x.view(1, 64, 8)).view(1, 64, 3, 2, 4).permute(2, 0, 3, 1, 4)
        allowed = shifted_windows((8, 8), (4, 4), (2, 2))
        weights = masked_softmax(q * attn.scale @ k.mT, allowed)
        ours = attn.proj((weights @ v).transpose(1, 2).reshape(1, 64, 8))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "shift", "message"),
    [
        ((3, 4), (0, 0), r"window: \(3, 4\) does not divide the grid of 8 x 8 patches"),
        ((0, 4), (0, 0), r"window: \(0, 4\)"),
        ((4, 4), (4, 0), r"shift: \(4, 0\)"),
        ((4, 4), (0, -1), r"shift: \(0, -1\)"),
    ],
)
def test_windows_that_do_not_fit_are_named(
    window: tuple[int, int], shift: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        shifted_windows((8, 8), window, shift)


def test_and_and_or() -> None:
    padding, order = readable_keys(flags("xx.", "xxx")), causal(3)
    together = both(padding, order)
    assert together.shape == (2, 1, 3, 3)
    assert torch.equal(together[0, 0], flags("x..", "xx.", "xx."))
    assert torch.equal(together[1, 0], flags("x..", "xx.", "xxx"))
    assert torch.equal(either(causal(3), causal(3).mT)[0, 0], torch.ones(3, 3, dtype=torch.bool))
    assert torch.equal(either(padding, ~padding).all(), torch.tensor(True))
