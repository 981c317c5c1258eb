"""Stateless randomness: (seed, epoch, sample id) -> numbers, the same on every device.

A counter-based hash: one 64-bit key names an image in an epoch, and the n-th number of a key is a
mix of the key and n. Nothing depends on what was drawn before, so masks and augmentations do not
change with batch size, workers, processes, device or a resume. The mixer is SplitMix64's
finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), written
in torch's wrapping int64 arithmetic, which CPU and GPU compute alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 whose bits are those of ``value`` modulo 2**64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection on int64 whose output bits look independent."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def name_to_int(name: str) -> int:
    """A stable int64 for a string: the sample id of a file is that of its relative path."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def image_keys(
    seed: int, epoch: int, sample_ids: Tensor | Sequence[int], purpose: str = "mask"
) -> Tensor:
    """Derive one key (B,) int64 for each of the images with the stable ids ``sample_ids`` (B,).

    Args:
        seed: the run's seed.
        epoch: the pass over the data; -1 is used for what must not change over epochs.
        sample_ids: their device is that of the keys.
        purpose: separates streams that must not share numbers ("mask", "augment", "order", ...).
    """
    ids = torch.as_tensor(sample_ids, dtype=torch.int64)
    state = torch.tensor(name_to_int(purpose), dtype=torch.int64, device=ids.device)
    for part in (seed, epoch):
        state = mix((state ^ _signed(part)) + _GOLDEN)
    return mix((state ^ ids) + _GOLDEN)


def random_bits(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """Return the first ``count`` numbers of a stream of each key (B,), independent of the others.

    They are (B, count) int64, uniform over all 64 bits.
    """
    counter = torch.arange(count, dtype=torch.int64, device=keys.device)
    start = mix(keys + _signed((stream + 1) * _GOLDEN))
    return mix(start[:, None] + (counter + 1) * _GOLDEN)


def uniforms(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """(B, count) float64 in [0, 1), from the upper 53 bits of :func:`random_bits`."""
    return _shift_right(random_bits(keys, count, stream), 11).double() * 2.0**-53


def permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Order ``range(size)`` by key: (size,) int64."""
    keys = image_keys(seed, epoch, torch.arange(size), purpose="order")
    return torch.argsort(keys, stable=True)


def seed_of(seed: int, *parts: int | str) -> int:
    """A seed for torch's own generators, in [0, 2**63), derived from the run's seed and names."""
    text = "/".join(str(part) for part in (seed, *parts))
    return name_to_int(text) & ((1 << 63) - 1)
