"""Seeds until decided: the error rate holds over all looks, and groups that are decided stop."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mim.compare.sequential import SeedRule, follow, largest_statistics, next_round, nominal_level
from mim.compare.statistics import Family
from mim.core.errors import UserError


def _simulate(
    truth: np.ndarray, margin: float, rule: SeedRule, count: int, reference: str | None = None
) -> dict[str, float]:
    """Shares of comparisons with a wrong verdict and with an interval that misses; mean runs."""
    rng = np.random.default_rng(len(truth))
    wrong, missed, runs = 0, 0, 0
    for _ in range(count):
        noise = 3 * rng.normal(size=(rule.most, 1)) + rng.normal(size=(rule.most, len(truth)))
        values = truth + noise
        have = {f"g{g}": rule.least for g in range(len(truth))}
        while True:
            seen = {
                name: {seed: float(values[seed, g]) for seed in range(have[name])}
                for g, name in enumerate(have)
            }
            state = follow(seen, rule, margin, reference)
            if not state.running:
                break
            for name in state.running:
                have[name] += 1
        bad, miss = False, False
        for pair, found in state.differences.items():
            first, second = (truth[int(name[1:])] for name in pair)
            true = first - second
            assert found.low is not None and found.high is not None
            miss |= not found.low <= true <= found.high
            bad |= found.shown and found.mean * true <= 0
            bad |= pair in state.decided and not found.shown and abs(true) >= margin
        wrong, missed, runs = wrong + bad, missed + miss, runs + sum(have.values())
    return {"wrong": wrong / count, "missed": missed / count, "runs": runs / count}


def _limit(count: int) -> float:
    return 0.05 + 3 * math.sqrt(0.0475 / count)


def test_looks_at_nothing_show_a_difference_in_five_per_cent() -> None:
    count = 250
    found = _simulate(np.zeros(3), 0.0, SeedRule(3, 8), count)
    assert found["wrong"] <= _limit(count) and found["missed"] <= _limit(count)


def test_a_clear_difference_stops_early_and_a_near_one_is_called_equal() -> None:
    rule = SeedRule(3, 12)
    clear = _simulate(np.array([0.0, 6.0]), 0.1, rule, 60)
    equal = _simulate(np.zeros(2), 4.0, rule, 60)
    assert clear["wrong"] == equal["wrong"] == 0
    assert clear["runs"] < 16 and equal["runs"] < 20  # of 24


def test_the_bounds_spend_five_per_cent_over_all_looks() -> None:
    """By other draws than those the bounds were made of: Tukey's quantiles at each look."""
    rule, family = SeedRule(4, 9), Family("pairs", 3, 3)
    rng, count = np.random.default_rng(99), 20_000
    noise = rng.normal(size=(count, 9, 3))
    crossed = np.zeros(count, dtype=bool)
    for n in range(4, 10):
        part = noise[:, :n]
        rest = part - part.mean(1, keepdims=True) - part.mean(2, keepdims=True)
        rest += part.mean((1, 2), keepdims=True)
        error = np.sqrt(2 * np.square(rest).sum((1, 2)) / (2 * (n - 1)) / n)
        critical = family.critical(2 * (n - 1), nominal_level(n, rule, family))
        crossed |= np.ptp(part.mean(1), 1) / error > critical
    assert crossed.mean() == pytest.approx(0.05, abs=0.007)


def test_the_simulated_statistics_are_t_statistics() -> None:
    statistics = largest_statistics(5, 6, "pairs", 2)
    assert (statistics[:, 0] > 2.776445).mean() == pytest.approx(0.05, abs=0.005)  # t(0.975, 4)


def test_a_decided_group_stops_and_the_others_go_on() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 3)) * 0.5 + np.array([0.0, 0.4, 100.0])
    rows = {f"g{g}": dict(enumerate(values[:, g].tolist())) for g in range(3)}
    state = follow(rows, SeedRule(3, 20), margin=0.01)
    assert state.running == ("g0", "g1")
    assert state.looks == 4  # after 3, 4, 5 and 6 seeds
    assert {pair for pair in state.decided} == {("g0", "g2"), ("g1", "g2")}
    # What was decided stays as it was, whatever the groups that go on still find.
    first = follow({g: {s: v for s, v in own.items() if s < 4} for g, own in rows.items()},
                   SeedRule(3, 20), margin=0.01)  # fmt: skip
    kept = state.decided["g0", "g2"]
    assert kept <= 4 and state.differences["g0", "g2"] == first.differences["g0", "g2"]


def test_before_the_first_look_and_after_the_last() -> None:
    rule = SeedRule(3, 4)
    empty = follow({"a": {}, "b": {}}, rule, 0.1)
    assert empty.running == ("a", "b") and empty.looks == 0
    same = {seed: 0.0 for seed in range(4)}
    noisy = {seed: float(seed % 2) for seed in range(4)}
    ended = follow({"a": same, "b": noisy}, rule, 0.001)
    assert ended.running == () and not ended.decided and ended.looks == 2


def test_rounds_begin_with_the_least_and_go_on_with_the_undecided() -> None:
    rule = SeedRule(3, 5)
    assert next_round({"a": {}, "b": {}}, {"a": 0, "b": 1}, rule, 0.1) == [
        ("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    far = dict(enumerate((1000 + rng.normal(size=5)).tolist()))
    near = [dict(enumerate(rng.normal(size=5).tolist())) for _ in range(2)]

    def seen(n: int) -> dict[str, dict[int, float]]:
        return {g: {s: v for s, v in own.items() if s < n} for g, own in
                (("a", near[0]), ("b", near[1]), ("c", far), ("failed", {}))}  # fmt: skip

    started = dict.fromkeys(("a", "b", "c", "failed"), 3)
    assert next_round(seen(3), started, rule, 0.001) == [("a", 3), ("b", 3)]
    # A seed that failed in every group is not tried again, and the rule's end is the end.
    later = {"a": 4, "b": 4, "c": 3, "failed": 3}
    assert next_round(seen(3), later, rule, 0.001) == [("a", 4), ("b", 4)]
    assert next_round(seen(5), {**later, "a": 5, "b": 5}, rule, 0.001) == []


@pytest.mark.parametrize("given", [{"least": 2}, {"least": 5, "most": 4}, {"until": "bored"}])
def test_rules_that_cannot_be(given: dict[str, int]) -> None:
    with pytest.raises(UserError, match="seeds"):
        SeedRule(**given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "margin", "reference"),
    [
        ([0.0, 0.0, 0.0], 0.01, None),
        ([0.0, 0.0, 2.0], 1.0, None),
        ([0.0, 1.0, 2.0], 1.0, None),
        ([0.0, 0.0, 0.0, 2.0], 0.01, "g0"),
    ],
)
def test_verdicts_under_many_truths(
    truth: list[float], margin: float, reference: str | None
) -> None:
    count = 1500
    found = _simulate(np.array(truth), margin, SeedRule(3, 10), count, reference)
    assert found["wrong"] <= _limit(count) and found["missed"] <= _limit(count)
