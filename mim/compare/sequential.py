"""Seeds until a comparison is decided, with one error rate over all looks.

Looking after every seed with an interval made for one look finds differences that are not there. A
group-sequential test pays for the looks in advance: look n of at most N has the nominal level
``a (n / N)``, small at first, and ``a`` is set so that all looks at all pairs together show a
difference by chance in 5 % of comparisons. ``a`` is found by simulating the design, since the joint
distribution of its t statistics under no difference depends on nothing that is unknown. The
intervals are repeated confidence intervals (Jennison and Turnbull 1984): they hold at every look at
once, so that a pair may stop for a difference or for equality whenever its interval allows.

Always-valid t intervals (Wang and Ramdas 2023, https://arxiv.org/abs/2310.03722) need no N, and are
much wider at the few seeds that pre-training can afford.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np

from mim.compare.statistics import (
    LEAST_SEEDS,
    LEVEL,
    MOST_SEEDS,
    Difference,
    Family,
    Floats,
    Values,
    difference,
    pooled_spread,
)
from mim.core.fields import Settings, at_least, at_most

Pair = tuple[str, str]
_SIMULATIONS = 20_000


@dataclass(frozen=True)
class SeedRule(Settings, where="seeds"):
    """How many seeds a comparison takes: ``seeds`` in its config."""

    least: Annotated[int, at_least(LEAST_SEEDS)] = LEAST_SEEDS
    """Seeds of every group before the first look."""
    most: Annotated[int, at_most(MOST_SEEDS)] = 20
    """Seeds at which it ends, decided or not; it sets the bounds and may not be raised later."""
    until: Literal["decided"] = "decided"
    """When a group stops: once each of its differences is shown, or shown to be within the
    margin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most < self.least:
            raise self.error("most", f"must be at least {self.least}, the least")


@dataclass(frozen=True)
class Progress:
    """Where a sequential comparison stands.

    Attributes:
        differences: pair -> its difference; of a decided pair, that of its deciding look.
        decided: pair -> seeds at which it was decided.
        looks: how many looks were taken.
        running: groups that need another seed.
    """

    differences: dict[Pair, Difference] = field(default_factory=dict)
    decided: dict[Pair, int] = field(default_factory=dict)
    looks: int = 0
    running: tuple[str, ...] = ()


def follow(values: Values, rule: SeedRule, margin: float, reference: str | None = None) -> Progress:
    """Take every look that the seeds so far allow, and find the groups that need another seed.

    Args:
        values: group -> seed -> the primary measure; seeds are 0, 1, 2, ... A seed that failed is
            left out.
        rule: of the seeds.
        margin: two groups nearer than this are as good as each other.
        reference: the group that all others are compared with; by default all pairs are.

    Returns:
        The state. Before the first look every group runs.
    """
    groups = list(values)
    pairs, family = family_pairs(groups, reference), family_of(groups, reference)
    differences: dict[Pair, Difference] = {}
    decided: dict[Pair, int] = {}
    done = max((1 + max(own) for own in values.values() if own), default=0)
    looks = 0
    for n in range(rule.least, min(done, rule.most) + 1):
        seen = {g: {s: v for s, v in own.items() if s < n} for g, own in values.items()}
        spread = pooled_spread(seen)
        level = nominal_level(n, rule, family)
        looks += 1
        for pair in pairs:
            if pair in decided:
                continue
            own = family
            if spread is None or not spread.pooled:
                own = Family("separate", count=family.count)
            found = difference(seen[pair[0]], seen[pair[1]], own, spread, level=level)
            if found is None:
                continue
            differences[pair] = found
            if found.shown or found.is_within(margin):
                decided[pair] = n
    running = {group for pair in pairs if pair not in decided for group in pair}
    if done >= rule.most:
        running = set()
    return Progress(differences, decided, looks, tuple(g for g in groups if g in running))


def next_round(
    values: Values,
    started: Mapping[str, int],
    rule: SeedRule,
    margin: float,
    reference: str | None = None,
) -> list[tuple[str, int]]:
    """The runs to compute next, as (group, seed); none once the comparison has ended.

    Args:
        values: as for :func:`follow`; a group whose runs all failed, and has none, is left out.
        started: group -> number of its seeds that were begun, failed ones among them.
        rule, margin, reference: as for :func:`follow`.
    """
    first = [(g, s) for g, n in started.items() for s in range(n, rule.least)]
    if first:
        return first
    seed = max(started.values())
    if seed >= rule.most:
        return []
    known = {group: own for group, own in values.items() if own}
    if reference not in known:
        reference = None
    return [(group, seed) for group in follow(known, rule, margin, reference).running]


def family_pairs(groups: list[str], reference: str | None = None) -> list[Pair]:
    """All pairs of groups, or each group with the reference."""
    if reference is None:
        return list(itertools.combinations(groups, 2))
    return [(group, reference) for group in groups if group != reference]


def family_of(groups: list[str], reference: str | None = None) -> Family:
    """The family of these pairs."""
    kind: Literal["pairs", "reference"] = "pairs" if reference is None else "reference"
    return Family(kind, len(groups), max(len(family_pairs(groups, reference)), 1))


def nominal_level(n: int, rule: SeedRule, family: Family) -> float:
    """The level of the look at ``n`` seeds, simultaneous over the family at that look."""
    return _scale(rule.least, rule.most, family.kind, family.groups) * n / rule.most


@lru_cache(maxsize=32)
def _scale(least: int, most: int, kind: str, groups: int) -> float:
    """The nominal level of the last look.

    Of each look the largest statistic's rank among the simulations is its p-value; no distribution
    has to be known.
    """
    rank = largest_statistics(least, most, kind, groups).argsort(0).argsort(0)
    p = 1 - rank / len(rank)
    return float(np.quantile((p * most / np.arange(least, most + 1)).min(1), LEVEL))


def largest_statistics(least: int, most: int, kind: str, groups: int) -> Floats:
    """(simulations, looks): the family's largest t statistic at each look, of no difference."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(20):
        noise = rng.standard_normal((_SIMULATIONS // 20, most, groups))
        noise -= noise.mean(2, keepdims=True)  # the seeds' own effects go
        seeds = np.arange(1, most + 1)
        means = noise.cumsum(1) / seeds[:, None]
        squares = np.square(noise).sum(2).cumsum(1) - seeds * np.square(means).sum(2)
        counts = np.arange(least, most + 1)
        variance = squares[:, least - 1 :] / ((groups - 1) * (counts - 1))
        late = means[:, least - 1 :]
        far = np.ptp(late, 2) if kind == "pairs" else np.abs(late - late[..., :1]).max(2)
        parts.append(far / np.sqrt(2 * variance / counts))
    return np.concatenate(parts)
