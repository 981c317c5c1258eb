"""Differences between groups of runs, their intervals, and what a design can show.

Groups that share seeds share initial weights, data order and masks, so a comparison is a randomised
block design with seeds as blocks: value = group + seed + error. Its residual has (G - 1)(S - 1)
degrees of freedom where each pair alone has S - 1. Everything here is a function of plain numbers.

Symbols: G groups, S seeds, I test images, D few-shot draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]
Values = Mapping[str, Mapping[int, float]]
"""Group -> seed -> value."""

_SHARES = re.compile(
    r"accuracy|(pixel|class|clean)_accuracy|(image_)?miou$|mce$|mean_error$|(mask_)?(map|mar)(_|$)"
)


def is_share(name: str) -> bool:
    """Whether a measure lies between 0 and 1 and is printed, as papers do, in per cent."""
    return _SHARES.match(name) is not None


def more_is_better(name: str) -> bool:
    """Whether a measure is a quality, and neither a loss nor an error."""
    return not re.search("loss|error|mce|alignment|uniformity", name)


LEVEL = 0.05
"""Share of families of true zeros in which any difference may be shown by chance."""
POWER = 0.8
LEAST_SEEDS = 3
"""With fewer seeds no interval is given: a spread of two values says next to nothing."""
MOST_SEEDS = 200
"""Beyond this a forecast says only that it takes more."""
_UNEQUAL = 0.01
"""Below this p-value the groups' spreads are taken to differ, and pairs stand by themselves."""
_SIMULATIONS = 2000
_MOST_TABLED = 60
"""Groups up to which Tukey's and Dunnett's distributions are integrated."""

_TABLED = (*map(float, range(1, 31)), 40.0, 60.0, 120.0, 1e6)
"""Degrees of freedom between which critical values are interpolated."""


@dataclass(frozen=True)
class Family:
    """The comparisons that share one error rate.

    Attributes:
        kind: ``pairs``, all pairs of groups (Tukey's range); ``reference``, each group against one
            of them (Dunnett); ``separate``, ``count`` differences with spreads of their own
            (Bonferroni).
        groups: G.
        count: how many differences there are.
    """

    kind: Literal["pairs", "reference", "separate"]
    groups: int = 2
    count: int = 1

    @property
    def _is_tabled(self) -> bool:
        """Whether it takes Tukey's or Dunnett's distribution; for many groups Bonferroni's bound
        is as near, and needs no integral."""
        return self.kind != "separate" and 2 < self.groups <= _MOST_TABLED

    def critical(self, df: float, level: float = LEVEL) -> float:
        """How many standard errors from 0 a difference must lie to be shown."""
        if not self._is_tabled:
            return float(stats.t.isf(level / (2 * self.count), df))
        if df == int(df):
            return _critical(self.kind, self.groups, df, level)
        # Between degrees of freedom that are tabled once, linear in 1 / df.
        after = next(i for i, tabled in enumerate(_TABLED) if tabled >= df)
        ends = [_TABLED[after], _TABLED[max(after - 1, 0)]]
        values = [_critical(self.kind, self.groups, end, level) for end in ends]
        return float(np.interp(1 / df, [1 / end for end in ends], values))


@lru_cache(maxsize=4096)
def _critical(kind: str, groups: int, df: float, level: float) -> float:
    if kind == "pairs":
        quantile = stats.studentized_range.isf(level, groups, df)
        return float(quantile) / math.sqrt(2)
    top = float(stats.t.isf(level / (2 * groups), df))  # Bonferroni's
    found = optimize.brentq(lambda c: _dunnett(c, groups - 1, df) - (1 - level), 0.1, 1.2 * top)
    return float(found)


def _dunnett(critical: float, others: int, df: float) -> float:
    """Probability that all of ``others`` true zeros against one reference stay within."""
    z, weight = np.polynomial.hermite_e.hermegauss(80)
    u, share = np.polynomial.legendre.leggauss(80)
    s = np.sqrt(stats.chi2.ppf((u + 1) / 2, df) / df)  # the estimated spread over the true one
    reach = critical * math.sqrt(2) * s[:, None]
    inside = (stats.norm.cdf(z + reach) - stats.norm.cdf(z - reach)) ** others
    return float((share / 2) @ inside @ (weight / math.sqrt(2 * math.pi)))


@dataclass(frozen=True)
class Spread:
    """The residual of the table groups x seeds.

    Attributes:
        sd: standard deviation of a run around group + seed.
        df: its degrees of freedom, (G - 1)(S - 1) of a full table.
        equal: p-value of the test that all groups spread alike; 1 where it cannot be tested.
    """

    sd: float
    df: int
    equal: float

    @property
    def pooled(self) -> bool:
        """Whether one spread may stand for all groups."""
        return self.equal >= _UNEQUAL


def pooled_spread(values: Values) -> Spread | None:
    """The residual spread of all groups; None where none is left to estimate it from.

    Whether the groups spread alike is tested by the largest share that one group has in the
    residual sum of squares; its distribution under equal normal errors depends on the table's
    shape alone and is simulated, always by the same draws.
    """
    groups = [group for group, own in values.items() if own]
    seeds = sorted({seed for group in groups for seed in values[group]})
    cells = [(g, s) for g, group in enumerate(groups) for s in seeds if s in values[group]]
    if len(groups) < 2:
        return None
    shape = tuple((g, seeds.index(s)) for g, s in cells)
    table = np.array([values[groups[g]][s] for g, s in cells], dtype=np.float64)
    rest = _residual(table[None], shape)[0]
    df = len(cells) - _rank(shape)
    total = float(np.square(rest).sum())
    if df < 1:
        return None
    equal = 1.0
    largest = float(np.abs(table).max(initial=0.0))
    if len(groups) > 2 and math.sqrt(total) > 1e-12 * largest:
        null = _largest_shares(shape)
        found = _shares(rest[None], shape).max()
        equal = (1 + int((null >= found - 1e-12).sum())) / (1 + len(null))
    return Spread(math.sqrt(total / df), df, equal)


Shape = tuple[tuple[int, int], ...]
"""(group, seed) of each cell that there is."""


@lru_cache(maxsize=64)
def _largest_shares(shape: Shape) -> Floats:
    noise = np.random.default_rng(0).standard_normal((_SIMULATIONS, len(shape)))
    return np.asarray(_shares(_residual(noise, shape), shape).max(1))


def _shares(rest: Floats, shape: Shape) -> Floats:
    """(n, cells) -> (n, G): mean square of each group over the sum of these."""
    group = np.array([g for g, _ in shape])
    squares = np.square(rest)
    means = np.stack([squares[:, group == g].mean(1) for g in np.unique(group)], axis=1)
    total = means.sum(1, keepdims=True)
    return np.asarray(np.divide(means, total, out=np.zeros_like(means), where=total > 0))


def _dummies(shape: Shape) -> Floats:
    group, seed = np.array(shape).T
    return np.concatenate(
        [group[:, None] == np.unique(group), seed[:, None] == np.unique(seed)], axis=1
    ).astype(np.float64)


def _is_full(shape: Shape) -> tuple[int, int] | None:
    groups, seeds = len({g for g, _ in shape}), len({s for _, s in shape})
    return (groups, seeds) if len(shape) == groups * seeds else None


def _rank(shape: Shape) -> int:
    full = _is_full(shape)
    return sum(full) - 1 if full else int(np.linalg.matrix_rank(_dummies(shape)))


def _residual(rows: Floats, shape: Shape) -> Floats:
    """What group and seed leave of each of n tables, (n, cells)."""
    full = _is_full(shape)
    if full:
        table = rows.reshape(-1, *full)
        rest = table - table.mean(1, keepdims=True)
        return np.asarray(rest - rest.mean(2, keepdims=True)).reshape(rows.shape)
    dummies = _dummies(shape)
    return np.asarray(rows - (dummies @ np.linalg.lstsq(dummies, rows.T, rcond=None)[0]).T)


@dataclass(frozen=True)
class Source:
    """What one source adds to the squared error of a mean difference.

    Attributes:
        variance: 0 at the least.
        spread: its own variance times 2, for the degrees of freedom (Satterthwaite).
    """

    variance: float = 0.0
    spread: float = 0.0


def item_source(differences: Floats) -> Source:
    """What test images, or few-shot draws, add to a mean difference, beside the seeds.

    In the crossed model ``var = s_seed^2/S + s_item^2/I + s_both^2/(S I)`` the spread over seeds
    already holds the first and the last term; the second is (MS_item - MS_both) / (S I).

    Args:
        differences: (S, I), of two groups for each seed and item.
    """
    seeds, items = differences.shape
    if items < 2:
        return Source()
    rest = differences - differences.mean(0) - differences.mean(1, keepdims=True)
    both = float(np.square(rest + differences.mean()).sum())
    between = seeds * float(np.square(differences.mean(0) - differences.mean()).sum())
    own = between / (items - 1)
    shared, df = (
        (both / ((seeds - 1) * (items - 1)), (seeds - 1) * (items - 1)) if seeds > 1 else (0, 1)
    )
    n = seeds * items
    variance = max(own - shared, 0.0) / n
    return Source(variance, (own**2 / (items - 1) + shared**2 / df) / n**2 if variance else 0.0)


@dataclass(frozen=True)
class Difference:
    """A mean difference of two groups over the seeds that they share.

    Attributes:
        mean: of first - second.
        n: seeds in common.
        error: standard error of the mean over seeds; None with fewer than three seeds.
        df: its degrees of freedom.
        low, high: the 95 % interval, which holds for all of its family at once; None without.
        wide: the interval for new images, (low, high), from the same family.
    """

    mean: float
    n: int
    error: float | None = None
    df: float = 0.0
    low: float | None = None
    high: float | None = None
    wide: tuple[float, float] | None = None

    def __neg__(self) -> Difference:
        """Second - first."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        wide = None if self.wide is None else (-self.wide[1], -self.wide[0])
        return replace(self, mean=-self.mean, low=low, high=high, wide=wide)

    @property
    def shown(self) -> bool:
        """Whether a difference is shown: there is an interval and it leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def is_within(self, margin: float) -> bool:
        """Whether the interval lies within ``margin`` of 0."""
        return (
            self.low is not None
            and self.high is not None
            and -margin < self.low <= self.high < margin
        )

    def p_equal(self, margin: float) -> float:
        """P-value of two one-sided tests of being further apart than ``margin``; 1 without."""
        if self.error is None or self.df < 1:
            return 1.0
        room = margin - abs(self.mean)
        if self.error == 0:
            return 0.0 if room > 0 else 1.0
        return float(stats.t.sf(room / self.error, self.df))


def difference(
    first: Mapping[int, float],
    second: Mapping[int, float],
    family: Family | None = None,
    spread: Spread | None = None,
    *,
    draws: Source | None = None,
    images: Source | None = None,
    level: float = LEVEL,
) -> Difference | None:
    """Mean of ``first - second`` over their common seeds, with its intervals.

    Args:
        first: seed -> value.
        second: likewise; seeds that only one of the two has are left out.
        family: what the interval is simultaneous with; by default it stands alone.
        spread: the pooled residual; by default the pair's own spread.
        draws: what few-shot draws add to the error, of these and of new test images.
        images: what test images add for new ones.
        level: 1 - the coverage.

    Returns:
        The difference, without an interval below three seeds, and where it is the same for every
        seed but not 0: few values of a measure that moves in steps coincide; None without a
        common seed.
    """
    family = family or Family("separate")
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    each = np.array([first[seed] - second[seed] for seed in seeds], dtype=np.float64)
    mean, n = float(each.mean()), len(seeds)
    if n < LEAST_SEEDS:
        return Difference(mean, n)
    variance, df = float(each.var(ddof=1)) / n, float(n - 1)
    if spread is not None and spread.pooled:
        variance, df = 2 * spread.sd**2 / n, float(spread.df)
    parts = [Source(variance, variance**2 / df), draws or Source()]
    error, df = _total(parts)
    if error == 0 and mean != 0:
        return Difference(mean, n)
    half = family.critical(df, level) * error
    wide = None
    if images is not None:
        far, far_df = _total([*parts, images])
        reach = max(family.critical(far_df, level) * far, half)  # it never claims more
        wide = (mean - reach, mean + reach)
    return Difference(mean, n, error, df, mean - half, mean + half, wide)


Places = Sequence[Mapping[int, float]]
"""Seed -> value of one cell at each place on the other axes."""


def interaction(
    one: Places, two: Places, three: Places, four: Places, family: Family, spread: Spread | None
) -> Difference | None:
    """The difference of differences ``(one - two) - (three - four)``, the mean over the places.

    Args:
        one, two, three, four: M places each, in the same order.
        family: what the interval is simultaneous with.
        spread: the pooled residual of all groups; by default the contrast's own.
    """
    cells = [cell for part in (one, two, three, four) for cell in part]
    seeds = set.intersection(*(set(cell) for cell in cells)) if cells else set()

    def mean(places: Places, seed: int) -> float:
        return sum(cell[seed] for cell in places) / len(places)

    first, second = (
        {seed: mean(a, seed) - mean(b, seed) for seed in seeds}
        for a, b in ((one, two), (three, four))
    )
    if spread is not None:  # each side is a difference already, the mean over M
        spread = replace(spread, sd=spread.sd * math.sqrt(2 / len(one)))
    return difference(first, second, family, spread)


def _total(parts: Sequence[Source]) -> tuple[float, float]:
    """Standard error and degrees of freedom of a sum of sources."""
    variance = sum(part.variance for part in parts)
    spread = sum(part.spread for part in parts)
    return math.sqrt(variance), min(max(variance**2 / spread if spread > 0 else 1e6, 1.0), 1e6)


def p_value(found: Difference) -> float:
    """Two-sided p-value of a difference that stands by itself; 1 without an interval."""
    if found.error is None:
        return 1.0
    if found.error == 0:
        return float(found.mean == 0)
    return float(2 * stats.t.sf(abs(found.mean) / found.error, found.df))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, each step by those that are left (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = highest
    return adjusted


# What a design can show.


def power_of_difference(truth: float, error: float, df: float, critical: float) -> float:
    """Probability that a true difference is shown.

    Args:
        truth: the difference.
        error: the true standard error of its estimate.
        df: degrees of freedom with which the error is estimated.
        critical: standard errors that it takes.
    """
    shift = abs(truth) / error
    ratio, share = _estimated_errors(df)  # SciPy's noncentral t is NaN in the far tail
    shown = stats.norm.sf(critical * ratio - shift) + stats.norm.cdf(-critical * ratio - shift)
    return float(share @ shown)


def _estimated_errors(df: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimated over true standard error at points of its distribution, and their weights."""
    u, share = np.polynomial.legendre.leggauss(200)
    return np.sqrt(stats.chi2.ppf((u + 1) / 2, df) / df), share / 2


def power_of_equality(truth: float, margin: float, error: float, df: float, count: int) -> float:
    """Probability that two one-sided tests show a difference to lie within ``margin``.

    By the estimated spread s: both tests pass where |estimate| < margin - t s.
    """
    t = float(stats.t.isf(LEVEL / count, df))
    ratio, share = _estimated_errors(df)
    room = np.maximum(margin - t * error * ratio, 0.0)
    inside = stats.norm.cdf((room - truth) / error) - stats.norm.cdf((-room - truth) / error)
    return float(share @ np.where(room > 0, inside, 0.0))


@dataclass(frozen=True)
class Design:
    """What a comparison of S seeds is planned to be, or was.

    Attributes:
        family: which differences share the error rate.
        seeds: S.
        sd: residual standard deviation of a run.
        level: of the test; that of the last look where there are several.
    """

    family: Family
    seeds: int
    sd: float
    level: float = LEVEL

    @property
    def df(self) -> int:
        """Degrees of freedom of the residual."""
        blocks = 1 if self.family.kind == "separate" else self.family.groups - 1
        return blocks * (self.seeds - 1)

    @property
    def error(self) -> float:
        """Standard error of a difference."""
        return self.sd * math.sqrt(2 / self.seeds)

    def smallest(self) -> float | None:
        """The smallest true difference that is shown with 80 % power; None below three seeds."""
        if self.seeds < LEAST_SEEDS:
            return None
        if self.sd == 0:
            return 0.0
        critical = self.family.critical(self.df, self.level)

        def lacks(shift: float) -> float:
            return power_of_difference(shift, 1.0, self.df, critical) - POWER

        top = critical + 2.0
        while lacks(top) < 0:
            top *= 1.5
        return float(optimize.brentq(lacks, 0.0, top)) * self.error

    def seeds_to_decide(self, truth: float, margin: float) -> int | None:
        """Seeds with which a difference of this size is shown, or shown to lie within ``margin``.

        None where more than ``MOST_SEEDS`` would be needed.
        """
        candidates = [n for n in _COUNTS if n > self.seeds and n >= LEAST_SEEDS]
        low, high = 0, len(candidates)
        while low < high:  # more seeds never decide less
            middle = (low + high) // 2
            if replace(self, seeds=candidates[middle])._decides(truth, margin):
                high = middle
            else:
                low = middle + 1
        return candidates[low] if low < len(candidates) else None

    def _decides(self, truth: float, margin: float) -> bool:
        if self.sd == 0:
            return True
        size = abs(truth)
        critical = self.family.critical(self.df, self.level)
        if power_of_difference(size, self.error, self.df, critical) >= POWER:
            return True
        count = max(self.family.count, 1)
        return power_of_equality(size, margin, self.error, self.df, count) >= POWER


_COUNTS = (*range(3, 31), 35, 40, 45, 50, 60, 70, 80, 100, 120, 150, MOST_SEEDS)
