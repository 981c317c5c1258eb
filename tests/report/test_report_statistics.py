"""The paired interval against hand-computed and SciPy's values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mim.compare.statistics import difference as paired_difference
from mim.report.measures import summarize


def test_summary_uses_the_sample_standard_deviation() -> None:
    summary = summarize([1.0, 2.0, 6.0])
    assert summary is not None
    assert (summary.mean, summary.n) == (3.0, 3)
    assert summary.sd == pytest.approx(math.sqrt(7.0))  # (4 + 1 + 9) / 2


def test_summary_of_one_value_has_no_spread_and_of_none_is_none() -> None:
    one = summarize([4.0])
    assert one is not None and one.sd is None and one.n == 1
    assert summarize([]) is None


def test_paired_interval_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653.
    paired = paired_difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert paired is not None and paired.low is not None and paired.high is not None
    half = 4.302652729911275 / math.sqrt(3)
    assert paired.mean == pytest.approx(2.0)
    assert (paired.low, paired.high) == pytest.approx((2 - half, 2 + half))
    assert not paired.shown  # 2 - 2.484 is below 0


def test_paired_interval_is_scipys() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=7), generator.normal(size=7) - 2
    paired = paired_difference(dict(enumerate(first)), dict(enumerate(second)), level=0.1)
    expected = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert paired is not None and paired.shown
    assert (paired.low, paired.high) == pytest.approx((expected.low, expected.high))


def test_only_common_seeds_are_paired() -> None:
    paired = paired_difference({0: 1.0, 1: 5.0, 7: 99.0}, {1: 3.0, 0: 2.0, 8: -99.0})
    assert paired is not None and paired.n == 2
    assert paired.mean == pytest.approx((-1 + 2) / 2)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_show_no_difference_however_large(seeds: int) -> None:
    paired = paired_difference(dict.fromkeys(range(seeds), 9.0), dict.fromkeys(range(seeds), 0.0))
    assert paired is not None and paired.low is None and not paired.shown


def test_equal_differences_make_an_interval_of_no_width() -> None:
    first, second = {0: 3.0, 1: 4.0, 2: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    paired = paired_difference(first, second)
    assert paired is not None and (paired.low, paired.high) == (2.0, 2.0)
    same = paired_difference(first, first)
    assert same is not None and not same.shown
