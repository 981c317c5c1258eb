"""Stateless randomness: the published stream, independence of order, and uniformity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mim.core.rng import (
    image_keys,
    mix,
    name_to_int,
    permutation,
    random_bits,
    seed_of,
    uniforms,
)

INT64 = st.integers(-(2**63), 2**63 - 1)


def test_mix_is_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 0, as its authors publish them.
    states = [(n * 0x9E3779B97F4A7C15) % 2**64 for n in (1, 2, 3)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in states])
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(v) % 2**64 for v in mix(signed)] == published


@settings(max_examples=30, deadline=None)
@given(INT64)
def test_mix_against_integers_of_any_size(value: int) -> None:
    z = value % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    assert int(mix(torch.tensor([value]))[0]) % 2**64 == z ^ (z >> 31)


def test_golden_values() -> None:
    """The stream is an interface: were it to change, published masks could not be drawn again."""
    assert image_keys(0, 0, [0, 1, 2]).tolist() == [
        -2760069741735527249,
        5011207705144513723,
        -1812325529024553388,
    ]
    assert image_keys(7, 3, [5, -9, 2**62], "augment").tolist() == [
        -5884798906101365444,
        -7952846874105124834,
        -3923850752067307038,
    ]
    key = image_keys(0, 0, [0])
    assert random_bits(key, 3).tolist() == [
        [-5162783747753685776, -57076617858844956, -5408582347806240877]
    ]
    assert random_bits(key, 3, stream=2).tolist() == [
        [3470774882432778215, 185336888539462620, 143085300953947821]
    ]
    assert uniforms(key, 3).tolist() == [
        [0.7201249322306299, 0.9969058703459657, 0.7068001634220861]
    ]
    assert permutation(0, 0, 8).tolist() == [6, 3, 4, 1, 5, 7, 0, 2]
    assert name_to_int("a/b.png") == 6081340755068888190
    assert (seed_of(0, "decoder"), seed_of(1, "x", 2)) == (5414260982634214721, 5467255438293639674)


def test_a_key_depends_on_its_image_alone() -> None:
    ids = torch.randint(-(2**63), 2**63 - 1, (97,))
    keys = image_keys(3, 5, ids)
    order = torch.randperm(97)
    assert torch.equal(image_keys(3, 5, ids[order]), keys[order])
    parts = [image_keys(3, 5, part) for part in ids.split(13)]
    assert torch.equal(torch.cat(parts), keys)
    assert torch.equal(image_keys(3, 5, ids.tolist()), keys)


def test_the_numbers_of_a_key_depend_on_it_alone() -> None:
    keys = image_keys(3, 5, torch.arange(31))
    whole = random_bits(keys, 20, stream=1)
    assert torch.equal(torch.cat([random_bits(k, 20, stream=1) for k in keys.split(4)]), whole)
    assert torch.equal(random_bits(keys, 7, stream=1), whole[:, :7])  # asking for fewer: a prefix


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = (image_keys(1, 2, [3]), permutation(1, 2, 9), uniforms(torch.tensor([4]), 5))
    torch.manual_seed(99)
    second = (image_keys(1, 2, [3]), permutation(1, 2, 9), uniforms(torch.tensor([4]), 5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.set_rng_state(before)
    permutation(1, 2, 9)
    uniforms(image_keys(1, 2, [3]), 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_collisions_over_samples_epochs_seeds_and_purposes() -> None:
    ids = torch.arange(20_000)
    parts = [
        image_keys(seed, epoch, ids, purpose)
        for seed in (0, 1)
        for epoch in (-1, 0, 1)
        for purpose in ("mask", "augment")
    ]
    keys = torch.cat(parts)
    assert keys.unique().numel() == keys.numel()


def test_seed_and_epoch_are_not_interchangeable() -> None:
    assert not torch.equal(image_keys(1, 2, [0]), image_keys(2, 1, [0]))


def test_no_collisions_within_and_across_streams() -> None:
    keys = image_keys(0, 0, torch.arange(200))
    bits = torch.cat([random_bits(keys, 196, stream) for stream in range(3)])
    assert bits.unique().numel() == bits.numel()


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def test_uniforms_are_uniform_and_independent() -> None:
    # Neighbouring seeds and ids are the hard case for a hash: they differ in a bit.
    draws = uniforms(image_keys(0, 0, torch.arange(4000)), 25)  # 100,000 numbers
    assert draws.dtype == torch.float64
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, 50, 0, 1)
    expected = draws.numel() / 50
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 49 + 6 * (2 * 49) ** 0.5  # six deviations above the mean
    bound = 5 / draws.numel() ** 0.5
    assert abs(correlation(draws[:-1], draws[1:])) < bound  # images beside each other
    assert abs(correlation(draws[:, :-1], draws[:, 1:])) < bound  # numbers beside each other
    other = uniforms(image_keys(0, 1, torch.arange(4000)), 25)
    assert abs(correlation(draws, other)) < bound  # epochs
    other = uniforms(image_keys(1, 0, torch.arange(4000)), 25)
    assert abs(correlation(draws, other)) < bound  # seeds
    other = uniforms(image_keys(0, 0, torch.arange(4000)), 25, stream=1)
    assert abs(correlation(draws, other)) < bound  # streams


def test_every_bit_is_set_half_the_time() -> None:
    bits = random_bits(image_keys(0, 0, torch.arange(1000)), 20).flatten()
    share = torch.stack([((bits >> b) & 1).double().mean() for b in range(64)])
    assert (share - 0.5).abs().max() < 5 * 0.5 / len(bits) ** 0.5


@pytest.mark.parametrize("size", [1, 2, 257])
def test_permutation_holds_each_once_and_changes_with_the_epoch(size: int) -> None:
    orders = [permutation(0, epoch, size) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(size))
    if size > 100:
        assert not torch.equal(orders[0], orders[1])
        assert not torch.equal(orders[0], permutation(1, 0, size))


def test_seed_of_fits_torch_and_tells_names_apart() -> None:
    seeds = [seed_of(s, *parts) for s in (0, 1, 12) for parts in (("a",), ("b",), ("a", 1))]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        assert 0 <= seed < 2**63
        torch.Generator().manual_seed(seed)
