"""From patches nobody may read to what attention adds to its scores."""

from __future__ import annotations

import torch
from torch import Tensor


def key_bias(readable: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive attention mask under which nobody reads some keys.

    Args:
        readable: (B, L) bool, True where a key may be read. No row may be all False: a softmax
            over nothing is NaN.
        dtype: of the scores.

    Returns:
        (B, 1, 1, L): 0 where readable, -inf elsewhere; adds to scores (B, heads, queries, L).
    """
    bias = torch.zeros(readable.shape, dtype=dtype, device=readable.device)
    return bias.masked_fill_(~readable, float("-inf"))[:, None, None, :]
