"""Who may attend to whom: a small algebra of attention masks.

In every function ``True`` means *may attend*, and a mask broadcasts to (B, heads, Q, L), Q queries
and L keys: hidden keys are (B, 1, 1, L), an order of tokens is (1, 1, L, L). Masks are
combined as booleans (:func:`both`, :func:`either`) and turned into what an attention takes at the
end (:func:`to_additive`, :func:`to_padding`).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mim.core.errors import setting_error
from mim.masks.patch_mask import PatchMask

Grid = tuple[int, int]


def readable_keys(valid: Tensor) -> Tensor:
    """Let all read the keys that are ``valid``: (B, L) -> (B, 1, 1, L) bool."""
    return valid[:, None, None, :]


def visible_keys(mask: PatchMask, num_prefix: int = 0) -> Tensor:
    """Hide the keys of masked patches and padding (the regime ``zero``): (B, 1, 1, P + N) bool.

    All ``num_prefix`` tokens in front of the patches are read.
    """
    return readable_keys(with_prefix(mask.is_visible, num_prefix))


def with_prefix(valid: Tensor, num_prefix: int) -> Tensor:
    """Put prefix tokens, which are always valid, in front: (B, T) -> (B, P + T) bool."""
    return F.pad(valid, (num_prefix, 0), value=True)


def causal(length: int, num_prefix: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Let each token read itself and those before it: (1, 1, L, L) bool.

    The first ``num_prefix`` of the ``length`` tokens also read each other: the prefix-causal order
    of autoregressive image models (AIM, El-Nouby et al. 2024, arXiv:2401.08541).

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
    """Let each patch read those at most ``radius`` rows and columns away: (1, 1, N, N) bool.

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
    """Let patches read within Swin's windows (Liu et al. 2021, arXiv:2103.14030).

    The windows are shifted cyclically by ``shift`` patches; none reads across the image's border.

    Returns:
        (1, 1, N, N) bool, patches in the order of the image.

    Raises:
        UserError: if the window does not divide the grid, or the shift is no part of the window.
    """
    for side, width, moved in zip(grid, window, shift, strict=True):
        if width < 1 or side % width:
            reason = f"does not divide the grid of {grid[0]} x {grid[1]} patches"
            raise setting_error("window", window, reason)
        if not 0 <= moved < width:
            reason = f"must be at least 0 and below the window's {window[0]} x {window[1]}"
            raise setting_error("shift", shift, reason)
    allowed = torch.ones(1, 1, dtype=torch.bool)
    for places, side, width, moved in zip(_places(grid), grid, window, shift, strict=True):
        rolled = (places - moved) % side
        # A patch that was rolled over the border lies in a window with strangers.
        part = 2 * (rolled // width) + (places < moved)
        allowed = allowed & (part[:, None] == part)
    return allowed[None, None]


def _places(grid: Grid) -> tuple[Tensor, Tensor]:
    """Rows (N,) and columns (N,) of the patches."""
    ids = torch.arange(grid[0] * grid[1])
    return ids // grid[1], ids % grid[1]


def both(*masks: Tensor) -> Tensor:
    """Allow what all masks allow; they broadcast."""
    return functools.reduce(torch.logical_and, masks)


def either(*masks: Tensor) -> Tensor:
    """Allow what any of the masks allows; they broadcast."""
    return functools.reduce(torch.logical_or, masks)


def to_additive(
    allowed: Tensor, dtype: torch.dtype = torch.float32, fill: float = -math.inf
) -> Tensor:
    """Turn ``allowed`` into what is added to attention scores: 0, and ``fill`` elsewhere.

    With -inf a row must allow something, else its softmax is NaN (see :func:`masked_softmax`); a
    finite value only makes weights small.

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


def to_padding(allowed: Tensor) -> Tensor:
    """Turn readable keys (B, 1, 1, L) into PyTorch's ``key_padding_mask`` (B, L), True = ignored.

    Raises:
        ValueError: if queries or heads differ: that is no padding.
    """
    if allowed.ndim != 4 or allowed.shape[1:3] != (1, 1):
        shape = tuple(allowed.shape)
        raise ValueError(f"only a mask (B, 1, 1, L) is a padding mask, not one of shape {shape}")
    return ~allowed[:, 0, 0]


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Take the softmax of scores (..., Q, L) over the keys that may be read.

    A row without any is 0, and so is its gradient; neither is NaN.
    """
    some = allowed.any(dim=-1, keepdim=True)
    # An empty row is made full, so that neither it nor its gradient is NaN, and then erased.
    weights = scores.masked_fill(~(allowed | ~some), -math.inf).softmax(dim=-1)
    return weights.masked_fill(~some, 0.0)


def key_bias(readable: Tensor, dtype: torch.dtype, num_prefix: int = 0) -> Tensor:
    """Hide keys by adding to scores (B, heads, queries, P + L).

    Args:
        readable: (B, L) bool, True where a key may be read. No row may be all False without a
            prefix: a softmax over nothing is NaN.
        dtype: of the scores.
        num_prefix: P, tokens in front, which are read.

    Returns:
        (B, 1, 1, P + L): 0 where readable, -inf elsewhere.
    """
    return to_additive(readable_keys(with_prefix(readable, num_prefix)), dtype)
