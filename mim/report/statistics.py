"""Mean, standard deviation and the paired t interval: all the statistics of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one measure over the seeds of a group."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1 in the denominator); none with a single value."""
    n: int


@dataclass(frozen=True)
class Paired:
    """A mean difference over the seeds that two groups share, with its t interval."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def shown(self) -> bool:
        """Whether a difference is shown: there is an interval and it leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def summarize(values: Iterable[float]) -> Summary | None:
    """Mean, sample standard deviation and count; none without values."""
    array = np.asarray(list(values), dtype=np.float64)
    if not array.size:
        return None
    sd = float(array.std(ddof=1)) if array.size > 1 else None
    return Summary(float(array.mean()), sd, int(array.size))


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], confidence: float = 0.95
) -> Paired | None:
    """Mean of ``first - second`` over common seeds, with Student's t interval of that mean.

    Args:
        first: seed -> value.
        second: seed -> value; seeds that only one of the two has are left out.
        confidence: coverage of the interval.

    Returns:
        The difference; without an interval where there is one common seed, none without any.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = np.array([first[seed] - second[seed] for seed in seeds], dtype=np.float64)
    mean, n = float(differences.mean()), len(seeds)
    if n == 1:
        return Paired(mean, None, None, n)
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Paired(mean, mean - half, mean + half, n)
