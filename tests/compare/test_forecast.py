"""What a comparison is forecast to take and to show."""

from __future__ import annotations

import numpy as np
import pytest

from mim.compare.forecast import Forecast
from mim.compare.statistics import Design, Family, pooled_spread


def test_runs_hours_and_power_of_a_plan() -> None:
    values = {f"g{g}": {s: 0.8 + 0.01 * ((g * s) % 3) for s in range(3)} for g in range(3)}
    plan = Forecast(3, (5, 5), 6, 9, [100.0] * 9, 2, values)
    runs, hours, power = plan.lines()
    assert runs == "runs: 15 (3 groups, 5 seeds), 6 references; 9 are finished"
    assert hours == "time: 0.083 h left, 100 s a run by the mean of 9 finished, 2 at once"
    spread = pooled_spread(values)
    assert spread is not None
    expected = Design(Family("pairs", 3, 3), 5, spread.sd).smallest()
    assert expected is not None and f": {100 * expected:.3g} points" in power


def test_what_is_not_known_is_not_made_up() -> None:
    _, hours, power = Forecast(2, (3, 3)).lines()
    assert hours == "time: not known before a run has finished"
    assert "standard deviations of a run over seeds" in power
    assert "fewer than three seeds" in Forecast(2, (2, 2)).lines()[2]
    assert "nothing to compare" in Forecast(1, (3, 3)).lines()[2]


def test_a_sequential_plan_names_both_ends_and_pays_for_its_looks() -> None:
    plan = Forecast(3, (3, 8), seconds=[3600.0])
    runs, hours, _ = plan.lines()
    assert "9 to 24 (3 groups, 3 to 8 seeds, until decided)" in runs and "9 to 24 h left" in hours
    fixed = Forecast(3, (8, 8)).design(1.0).smallest()
    looked = plan.design(1.0).smallest()
    assert fixed is not None and looked is not None and fixed < looked < 1.4 * fixed


def test_the_forecast_power_of_all_looks_is_reached() -> None:
    """Of a difference that the last look alone shows in 80 %, all looks show at least as many."""
    from mim.compare.sequential import SeedRule, follow

    rng, rule, count = np.random.default_rng(3), SeedRule(3, 6), 300
    smallest = Forecast(2, (3, 6)).design(1.0).smallest()
    assert smallest is not None
    shown = 0
    for _ in range(count):
        first, second = rng.normal(size=(2, 6))
        rows = {"a": dict(enumerate(first + smallest)), "b": dict(enumerate(second))}
        shown += follow(rows, rule, 0.0).differences["a", "b"].shown
    assert shown / count == pytest.approx(0.82, abs=0.07)
