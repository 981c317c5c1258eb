"""Who may attend to whom: a small algebra of attention masks.

In every function ``True`` means *may attend*, and a mask broadcasts to (B, heads, Q, L), Q queries
and L keys: keys nobody may read are (B, 1, 1, L), an order of tokens is (1, 1, L, L). Masks are
combined as booleans (:func:`both`, :func:`either`) and turned into what an attention takes at the
end (:func:`to_additive`, :func:`to_padding`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mim.core.errors import setting_error
from mim.masks.patch_mask import PatchMask

Grid = tuple[int, int]


def readable_keys(valid: Tensor) -> Tensor:
    """Nobody reads padding.

    Args:
        valid: (B, L) bool, False where a key is padding.

    Returns:
        (B, 1, 1, L) bool.
    """
    return valid[:, None, None, :]


def visible_keys(mask: PatchMask, num_prefix: int = 0) -> Tensor:
    """Nobody reads masked patches or padding; prefix tokens are read by all (the regime ``zero``).

    Args:
        mask: (B, N), what is hidden.
        num_prefix: P, tokens in front of the patches.

    Returns:
        (B, 1, 1, P + N) bool.
    """
    visible = mask.is_visible
    prefix = visible.new_ones(len(visible), num_prefix)
    return readable_keys(torch.cat([prefix, visible], dim=1))


def causal(length: int, num_prefix: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A token reads itself and those before it; the first ``num_prefix`` also read each other.

    With a prefix it is the prefix-causal order of autoregressive image models (AIM,
    El-Nouby et al. 2024, arXiv:2401.08541).

    Args:
        length: L, tokens, those of the prefix among them.
        num_prefix: how many tokens in front attend in both directions.
        device: where the mask is made.

    Returns:
        (1, 1, L, L) bool.

    Raises:
        UserError: if the prefix is longer than the sequence, or negative.
    """
    if not 0 <= num_prefix <= length:
        raise setting_error("num_prefix", num_prefix, f"must lie between 0 and {length} tokens")
    places = torch.arange(length, device=device)
    before = places[None, :] <= places[:, None]  # (queries, keys)
    inside = (places < num_prefix)[None, :]
    return (before | (inside & inside.mT))[None, None]


def sliding_window(grid: Grid, radius: int) -> Tensor:
    """A patch reads those at most ``radius`` rows and columns away.

    Args:
        grid: (rows, columns) of patches.
        radius: 0 reads the patch itself alone.

    Returns:
        (1, 1, N, N) bool.

    Raises:
        UserError: if the radius is negative.
    """
    if radius < 0:
        raise setting_error("radius", radius, "must be at least 0")
    rows, columns = _places(grid)
    near = (rows[:, None] - rows).abs() <= radius
    near &= (columns[:, None] - columns).abs() <= radius
    return near[None, None]


def shifted_windows(grid: Grid, window: Grid, shift: Grid = (0, 0)) -> Tensor:
    """Swin's windows, shifted cyclically, none reading across the image's border.

    Liu et al. 2021, arXiv:2103.14030.

    Args:
        grid: (rows, columns) of patches.
        window: (rows, columns) of a window; divides the grid.
        shift: rows and columns the windows are moved by, each below the window's.

    Returns:
        (1, 1, N, N) bool, patches in the order of the image.

    Raises:
        UserError: if the window does not divide the grid, or the shift is no part of it.
    """
    _check_window(grid, window, shift)
    allowed = torch.ones(1, 1, dtype=torch.bool)
    for places, side, width, moved in zip(_places(grid), grid, window, shift, strict=True):
        rolled = (places - moved) % side
        # A patch that was rolled over the border lies in a window with strangers.
        part = 2 * (rolled // width) + (places < moved)
        allowed = allowed & (part[:, None] == part)
    return allowed[None, None]


def window_masks(grid: Grid, window: Grid, shift: Grid = (0, 0)) -> Tensor:
    """:func:`shifted_windows` as window attention takes it.

    Returns:
        (W, A, A) bool for each of W windows of A patches, windows and patches in the order of the
        image after it is rolled by ``-shift``.

    Raises:
        UserError: as :func:`shifted_windows`.
    """
    allowed = shifted_windows(grid, window, shift)[0, 0]  # (N, N)
    ids = torch.arange(grid[0] * grid[1]).view(grid)
    ids = ids.roll((-shift[0], -shift[1]), dims=(0, 1))
    ids = ids.view(grid[0] // window[0], window[0], grid[1] // window[1], window[1])
    ids = ids.transpose(1, 2).reshape(-1, window[0] * window[1])  # (W, A)
    return allowed[ids[:, :, None], ids[:, None, :]]


def _places(grid: Grid) -> tuple[Tensor, Tensor]:
    """(N,) rows and (N,) columns of the patches."""
    ids = torch.arange(grid[0] * grid[1])
    return ids // grid[1], ids % grid[1]


def _check_window(grid: Grid, window: Grid, shift: Grid) -> None:
    for side, width in zip(grid, window, strict=True):
        if width < 1 or side % width:
            reason = f"does not divide the grid of {grid[0]} x {grid[1]} patches"
            raise setting_error("window", window, reason)
    for width, moved in zip(window, shift, strict=True):
        if not 0 <= moved < width:
            reason = f"must be at least 0 and below the window's {window[0]} x {window[1]}"
            raise setting_error("shift", shift, reason)


def both(*masks: Tensor) -> Tensor:
    """What all masks allow; they broadcast."""
    return functools.reduce(torch.logical_and, masks)


def either(*masks: Tensor) -> Tensor:
    """What any of the masks allows; they broadcast."""
    return functools.reduce(torch.logical_or, masks)


def to_additive(
    allowed: Tensor, dtype: torch.dtype = torch.float32, fill: float = -math.inf
) -> Tensor:
    """What is added to attention scores.

    Args:
        allowed: bool, True = may attend.
        dtype: of the scores.
        fill: stands where nobody may attend. With -inf a row must allow something, else its softmax
            is NaN (see :func:`masked_softmax`); a finite value only makes weights small.

    Returns:
        0 where allowed, ``fill`` elsewhere.

    Raises:
        UserError: if ``fill`` is not below 0, or finite but out of the dtype's range: -1e9 would
            silently become -inf in float16.
    """
    if not fill < 0:
        raise setting_error("fill", fill, "must be below 0; -inf hides exactly")
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        kind = getattr(allowed, "dtype", type(allowed).__name__)
        raise TypeError(f"allowed must be a bool tensor (True = may attend), not {kind}")
    lowest = torch.finfo(dtype).min
    if math.isfinite(fill) and fill < lowest:
        name = str(dtype).removeprefix("torch.")
        reason = f"is below the lowest {name}, {lowest:g}; use -inf, or -1e4"
        raise setting_error("fill", fill, reason)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill_(~allowed, fill)


def from_additive(bias: Tensor, threshold: float = -1e4) -> Tensor:
    """Bool, True = may attend, from what is added to scores.

    Args:
        bias: 0 where allowed.
        threshold: at and below it nobody may attend.
    """
    return bias > threshold


def to_padding(allowed: Tensor) -> Tensor:
    """PyTorch's ``key_padding_mask`` (True = ignored) from readable keys.

    Args:
        allowed: (B, 1, 1, L) bool, True = may attend, the same for all queries.

    Returns:
        (B, L) bool, as ``torch.nn.MultiheadAttention`` takes it.

    Raises:
        ValueError: if queries or heads differ: that is no padding.
    """
    if allowed.ndim != 4 or allowed.shape[1:3] != (1, 1):
        shape = tuple(allowed.shape)
        raise ValueError(f"only a mask (B, 1, 1, L) is a padding mask, not one of shape {shape}")
    return ~allowed[:, 0, 0]


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the keys that may be read; zeros, not NaN, where there are none.

    Args:
        scores: (..., Q, L).
        allowed: bool, broadcasts to ``scores``; True = may attend.

    Returns:
        (..., Q, L); a row sums to 1, or to 0 where nothing is allowed. So do its gradients.
    """
    some = allowed.any(dim=-1, keepdim=True)
    # An empty row is made full, so that neither it nor its gradient is NaN, and then erased.
    weights = scores.masked_fill(~(allowed | ~some), -math.inf).softmax(dim=-1)
    return weights.masked_fill(~some, 0.0)


def key_bias(readable: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive attention mask under which nobody reads some keys.

    Args:
        readable: (B, L) bool, True where a key may be read. No row may be all False: a softmax
            over nothing is NaN.
        dtype: of the scores.

    Returns:
        (B, 1, 1, L): 0 where readable, -inf elsewhere; adds to scores (B, heads, queries, L).
    """
    return to_additive(readable_keys(readable), dtype)
