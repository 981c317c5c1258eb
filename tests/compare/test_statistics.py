"""Intervals and forecasts against tables, SciPy, hand computation and simulation.

Simulations are of comparisons with known truth: coverage and error rates must agree with what is
claimed within Monte-Carlo error, three standard errors of a proportion.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from mim.compare.statistics import (
    Design,
    Difference,
    Family,
    Source,
    Spread,
    difference,
    holm,
    interaction,
    item_source,
    p_value,
    pooled_spread,
    power_of_difference,
    power_of_equality,
)

Rows = dict[str, dict[int, float]]
Draw = Callable[[np.random.Generator], Rows]


def _table(values: np.ndarray) -> Rows:
    """(S, G) -> group -> seed -> value."""
    return {f"g{g}": dict(enumerate(column.tolist())) for g, column in enumerate(values.T)}


def _close(found: float, claimed: float, n: int) -> bool:
    return abs(found - claimed) <= 3 * math.sqrt(claimed * (1 - claimed) / n)


def _all_pairs(rows: Rows, **more: Source) -> dict[tuple[int, int], Difference]:
    spread = pooled_spread(rows)
    names = list(rows)
    pairs = [(a, b) for a in range(len(names)) for b in range(a)]
    family = Family("pairs", len(names), len(pairs))
    if spread is None or not spread.pooled:
        family = Family("separate", count=len(pairs))
    found = {}
    for a, b in pairs:
        result = difference(rows[names[a]], rows[names[b]], family, spread, **more)
        assert result is not None
        found[a, b] = result
    return found


def test_critical_values_are_those_of_printed_tables() -> None:
    # Studentized range 5.04 for 3 groups and 4 degrees of freedom; Dunnett 1964, two-sided: 3.03
    # for 2 treatments and 5 degrees, 2.76 for 3 and 10.
    assert Family("pairs", 3).critical(4) * math.sqrt(2) == pytest.approx(5.040, abs=1e-3)
    assert Family("reference", 3).critical(5) == pytest.approx(3.03, abs=5e-3)
    assert Family("reference", 4).critical(10) == pytest.approx(2.76, abs=5e-3)
    assert Family("pairs", 2).critical(2) == pytest.approx(4.302653)


def test_dunnett_is_scipys() -> None:
    first, second, control = rows = np.random.default_rng(0).normal(size=(3, 6))
    drawn = stats.dunnett(first, second, control=control, random_state=0)  # integrates by chance
    interval = drawn.confidence_interval()
    error = math.sqrt(rows.var(axis=1, ddof=1).mean() * 2 / 6)
    expected = (interval.high - interval.low) / 2 / error
    assert expected == pytest.approx(Family("reference", 3).critical(15), abs=0.01)


def test_degrees_between_tabled_ones_are_interpolated() -> None:
    family = Family("pairs", 3)
    for df in (4.5, 33.3, 90.0):
        exact = stats.studentized_range.isf(0.05, 3, df) / math.sqrt(2)
        assert family.critical(df + 1e-9) == pytest.approx(exact, rel=3e-3)


def test_residual_of_the_two_way_table_by_hand() -> None:
    # Group effects 0, 1 and seed effects 0, 10, 20, and one error of 3 in the last cell, which
    # leaves residuals of 1/2, 1/2 and 1 in each group: their squares sum to 3.
    spread = pooled_spread(_table(np.array([[0.0, 1.0], [10.0, 11.0], [20.0, 24.0]])))
    assert spread is not None
    assert spread.df == 2
    assert spread.sd == pytest.approx(math.sqrt(3 / 2))
    # Two groups: the same as the paired t test.
    found = difference({0: 0.0, 1: 10.0, 2: 20.0}, {0: 1.0, 1: 11.0, 2: 24.0}, None, spread)
    paired = stats.ttest_rel([0, 10, 20], [1, 11, 24]).confidence_interval()
    assert found is not None and (found.low, found.high) == pytest.approx((paired.low, paired.high))


def test_a_run_that_failed_costs_one_degree_of_freedom() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3))
    full = _table(values)
    whole = pooled_spread(full)
    del full["g1"][2]
    spread = pooled_spread(full)
    assert whole is not None and spread is not None
    assert (whole.df, spread.df) == (6, 5)
    found = difference(full["g0"], full["g1"], Family("pairs", 3), spread)
    assert found is not None and found.n == 3
    assert found.error == pytest.approx(spread.sd * math.sqrt(2 / 3))


def test_an_interval_by_hand_and_by_scipy() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653.
    found = difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    half = 4.302652729911275 / math.sqrt(3)
    assert found is not None and found.mean == pytest.approx(2.0)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert not found.shown  # 2 - 2.484 is below 0
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=7), rng.normal(size=7) - 2
    found = difference(dict(enumerate(first)), dict(enumerate(second)), level=0.1)
    expected = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert found is not None and found.shown
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_only_common_seeds_are_paired() -> None:
    found = difference({0: 1.0, 1: 5.0, 7: 99.0}, {1: 3.0, 0: 2.0, 8: -99.0})
    assert found is not None and found.n == 2
    assert found.mean == pytest.approx((-1 + 2) / 2)


def test_equal_differences_show_none_unless_they_are_0() -> None:
    """Accuracies move in steps, so that three equal differences are chance, not certainty."""
    first, second = {0: 3.0, 1: 4.0, 2: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    found, same = difference(first, second), difference(first, first)
    assert found is not None and found.mean == 2.0 and found.low is None and not found.shown
    assert same is not None and same.is_within(0.01) and same.p_equal(0.01) == 0
    drawn = difference(first, second, draws=Source(0.01, 0.0001))
    assert drawn is not None and drawn.low is not None


def test_the_other_way_round_is_the_negative() -> None:
    first, second = {0: 3.0, 1: 4.5, 2: 5.0}, {0: 1.0, 1: 2.0, 2: 3.5}
    found = difference(first, second, images=Source(0.1, 0.01))
    other = difference(second, first, images=Source(0.1, 0.01))
    assert found is not None and other is not None and found.wide and other.wide
    assert (-found).wide == pytest.approx(other.wide)
    assert [(-found).low, (-found).high] == pytest.approx([other.low, other.high])
    assert (-found).mean == other.mean and (-found).error == other.error


@pytest.mark.parametrize("seeds", [1, 2])
def test_below_three_seeds_there_is_no_interval(seeds: int) -> None:
    found = difference(dict.fromkeys(range(seeds), 9.0), dict.fromkeys(range(seeds), 0.0))
    assert found is not None and found.n == seeds and found.low is None and not found.shown
    assert found.p_equal(100.0) == 1.0
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert Design(Family("pairs", 3, 3), 2, 1.0).smallest() is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_unequal_spread_is_seen_and_pairs_then_stand_alone() -> None:
    rng = np.random.default_rng(0)
    spreads = np.array([1.0, 1.0, 30.0])
    spread = pooled_spread(_table(rng.normal(size=(10, 3)) * spreads))
    assert spread is not None and not spread.pooled
    alike = [pooled_spread(_table(rng.normal(size=(4, 4)))) for _ in range(600)]
    refused = np.mean([spread is not None and not spread.pooled for spread in alike])
    assert _close(float(refused), 0.01, 600)


@pytest.mark.parametrize(("groups", "seeds"), [(3, 3), (4, 5)])
def test_intervals_of_all_pairs_hold_at_once(groups: int, seeds: int) -> None:
    rng, count, held = np.random.default_rng(groups), 800, 0
    truth = np.arange(groups) / 2
    for _ in range(count):
        values = truth + 3 * rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, groups))
        found = _all_pairs(_table(values))
        held += all(
            d.low is not None and d.high is not None and d.low <= truth[a] - truth[b] <= d.high
            for (a, b), d in found.items()
        )
    assert _close(held / count, 0.95, count)


def test_intervals_against_a_reference_hold_at_once() -> None:
    rng, count, held = np.random.default_rng(1), 800, 0
    for _ in range(count):
        rows = _table(rng.normal(size=(4, 1)) + rng.normal(size=(4, 4)))
        spread = pooled_spread(rows)
        assert spread is not None
        found = [
            difference(
                rows[f"g{g}"], rows["g0"], Family("reference", 4, 3), Spread(spread.sd, 9, 1)
            )
            for g in (1, 2, 3)
        ]
        held += not any(d is None or d.shown for d in found)
    assert _close(held / count, 0.95, count)


def _crossed(
    rng: np.random.Generator, seeds: int, items: int, sds: tuple[float, float, float]
) -> np.ndarray:
    """(2, S, I) values of two groups; ``sds`` of their difference by seed, item and both."""
    by_seed, by_item, by_both = (
        sd / math.sqrt(2) * rng.normal(size=shape)
        for sd, shape in zip(sds, [(2, seeds, 1), (2, 1, items), (2, seeds, items)], strict=True)
    )
    return by_seed + by_item + by_both


@pytest.mark.parametrize(
    ("seeds", "items", "sds"),
    [(3, 60, (0.1, 1.0, 1.0)), (5, 60, (0.5, 0.5, 1.0)), (3, 5, (0.3, 0.3, 0.3))],
)
def test_the_interval_for_new_images_holds(
    seeds: int, items: int, sds: tuple[float, float, float]
) -> None:
    """Images as in a test set, and few items, as few-shot draws are."""
    rng, count = np.random.default_rng(items), 1500
    wide, narrow = 0, 0
    for _ in range(count):
        first, second = _crossed(rng, seeds, items, sds)
        source = item_source(first - second)
        rows = [dict(enumerate(part.mean(1).tolist())) for part in (first, second)]
        found = difference(*rows, images=source)
        assert found is not None and found.wide is not None and found.low is not None
        wide += found.wide[0] <= 0 <= found.wide[1]
        narrow += not found.shown
    assert wide / count >= 0.95 - 3 * math.sqrt(0.0475 / count)
    assert narrow < wide
    if sds[1] > sds[0]:  # of the images' own spread the seeds know nothing
        assert narrow / count < 0.9


def test_items_by_hand() -> None:
    # Two seeds, three items: the items' effects are -1, 0, 1, and nothing else varies.
    source = item_source(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
    # MS_item = 2 * 2 / 2 = 2, MS_both = 0: the variance is 2 / (2 * 3).
    assert source.variance == pytest.approx(1 / 3)
    assert item_source(np.array([[1.0, 2.0], [2.0, 1.0]])).variance == 0.0


def test_an_interaction_by_hand() -> None:
    one, two, three, four = ({0: a, 1: a + 1.0, 2: a + 3.0} for a in (7.0, 4.0, 2.0, 1.5))
    two |= {0: 3.0, 7: 99.0}
    alone = Family("separate")
    found = interaction([one], [two], [three], [four], alone, None)
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx((3.5 + 2.5 + 2.5) / 3)  # (1 - 2) - (3 - 4), seed by seed
    assert found.error == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    pooled = interaction([one], [two], [three], [four], alone, Spread(0.3, 6, 1.0))
    assert pooled is not None and pooled.df == 6
    assert pooled.error == pytest.approx(0.3 * math.sqrt(4 / 3))
    # Over two places the mean of the contrasts, with half of the variance.
    twice = [[cell, cell] for cell in (one, two, three, four)]
    halved = interaction(*twice, alone, Spread(0.3, 6, 1.0))
    assert halved is not None and halved.error == pytest.approx(0.3 * math.sqrt(2 / 3))
    assert halved.mean == pytest.approx(pooled.mean)
    assert interaction([], [], [], [], alone, None) is None


@pytest.mark.parametrize(("rows", "columns", "places"), [(2, 2, 1), (3, 3, 2)])
def test_intervals_of_all_interactions_hold_at_once(rows: int, columns: int, places: int) -> None:
    rng, count, seeds = np.random.default_rng(rows), 400, 4
    truth = rng.normal(size=(rows, columns, places))
    family, missed = Family("separate", count=(rows - 1) * (columns - 1)), 0
    for _ in range(count):
        shared = rng.normal(0, 3, seeds)
        cells = truth[..., None] + shared + rng.normal(size=(rows, columns, places, seeds))
        table = cells.reshape(-1, seeds)
        spread = pooled_spread(_table(table.T))

        def at(row: int, column: int, cells: np.ndarray = cells) -> list[dict[int, float]]:
            return [dict(enumerate(values.tolist())) for values in cells[row, column]]

        wrong = False
        for r in range(1, rows):
            for c in range(1, columns):
                four = (at(r, c), at(0, c), at(r, 0), at(0, 0))
                found = interaction(*four, family, spread)
                true = (truth[r, c] - truth[0, c] - truth[r, 0] + truth[0, 0]).mean()
                assert found is not None and found.low is not None and found.high is not None
                wrong |= not found.low <= true <= found.high
        missed += wrong
    if family.count == 1:
        assert _close(missed / count, 0.05, count)
    else:  # Bonferroni's bound
        assert missed / count <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / count)
        assert missed > 0


def test_a_p_value_agrees_with_its_interval() -> None:
    first, second = {0: 1.0, 1: 2.0, 2: 3.5}, {0: 0.5, 1: 0.9, 2: 2.0}
    found = difference(first, second)
    assert found is not None
    expected = stats.ttest_rel(list(first.values()), list(second.values())).pvalue
    assert p_value(found) == pytest.approx(expected)
    assert (p_value(found) < 0.05) == found.shown


def test_planned_power_is_simulated_power() -> None:
    rng, count = np.random.default_rng(5), 1200
    design = Design(Family("pairs", 3, 3), 4, sd=1.3)
    smallest = design.smallest()
    assert smallest is not None
    shown = 0
    for _ in range(count):
        values = rng.normal(size=(4, 1)) + 1.3 * rng.normal(size=(4, 3)) + [0, 0, smallest]
        shown += _all_pairs(_table(values))[2, 0].shown
    assert shown / count == pytest.approx(0.8, abs=0.03)


def test_power_to_show_equality_is_simulated_power() -> None:
    rng, count, seeds = np.random.default_rng(6), 20_000, 5
    each = 0.2 + math.sqrt(2) * rng.normal(size=(count, seeds))
    mean, error = each.mean(1), each.std(1, ddof=1) / math.sqrt(seeds)
    p = stats.t.sf((1.8 - np.abs(mean)) / error, seeds - 1)
    planned = power_of_equality(0.2, 1.8, math.sqrt(2 / seeds), seeds - 1, 1)
    assert planned == pytest.approx((p < 0.05).mean(), abs=0.01)


def test_equality_is_wrongly_claimed_in_five_per_cent_at_the_most() -> None:
    rng, count = np.random.default_rng(7), 2000
    claims = 0
    for _ in range(count):
        first = 1.0 + 0.2 * rng.normal(size=6)
        found = difference(dict(enumerate(first)), dict.fromkeys(range(6), 0.0))
        assert found is not None
        claims += found.p_equal(1.0) < 0.05
    assert _close(claims / count, 0.05, count)


def test_seeds_to_decide_are_the_first_that_do() -> None:
    design = Design(Family("pairs", 2, 1), 3, sd=1.0)
    needed = design.seeds_to_decide(1.5, margin=0.1)
    assert needed is not None

    def power(seeds: int) -> float:
        later = Design(design.family, seeds, 1.0)
        critical = float(stats.t.isf(0.025, seeds - 1))
        return power_of_difference(1.5, later.error, seeds - 1, critical)

    assert power(needed) >= 0.8 > power(needed - 1)
    assert design.seeds_to_decide(0.001, margin=1e-6) is None
    # The nearer to 0, the sooner equality within 1 is shown.
    near, far = (design.seeds_to_decide(truth, margin=1.0) for truth in (0.0, 0.5))
    assert near is not None and far is not None and near < far


@pytest.mark.slow
@pytest.mark.parametrize("groups", [2, 3, 6])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_power_and_coverage_of_many_designs(groups: int, seeds: int) -> None:
    rng, count = np.random.default_rng(groups * seeds), 4000
    design = Design(Family("pairs", groups, groups * (groups - 1) // 2), seeds, sd=1.0)
    smallest = design.smallest()
    assert smallest is not None
    shown, held = 0, 0
    for _ in range(count):
        values = rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, groups))
        values[:, 0] += smallest
        found = _all_pairs(_table(values))
        shown += found[1, 0].shown
        truths = {pair: -smallest if pair[1] == 0 else 0.0 for pair in found}
        held += all(
            d.low is not None and d.high is not None and d.low <= truths[pair] <= d.high
            for pair, d in found.items()
        )
    assert shown / count == pytest.approx(0.8, abs=0.03)
    assert _close(held / count, 0.95, count)


@pytest.mark.parametrize("df", [2, 8, 100, 2000])
def test_power_is_the_noncentral_t_and_a_number_far_out(df: int) -> None:
    """SciPy's own is NaN where the other tail is too small to tell, as with hundreds of seeds."""
    for shift in (0.0, 1.0, 3.0):
        exact = stats.nct.sf(2.0, df, shift) + np.nan_to_num(stats.nct.cdf(-2.0, df, shift))
        assert power_of_difference(shift, 1.0, df, 2.0) == pytest.approx(exact, abs=1e-4)
    assert 0.9 < power_of_difference(-6.92, 1.0, df, 2.8) <= 1.0
    assert 0.9 < power_of_difference(40.0, 1.0, df, 4.9) <= 1.0
