"""What a comparison is forecast to take and to show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim.compare import hours
from mim.compare.forecast import Forecast
from mim.compare.plan import CompareConfig, plan
from mim.compare.statistics import Design, Family, pooled_spread
from mim.core.fields import build


def test_runs_hours_and_power_of_a_plan() -> None:
    values = {f"g{g}": {s: 0.8 + 0.01 * ((g * s) % 3) for s in range(3)} for g in range(3)}
    plan = Forecast(3, (5, 5), 6, 9, [600.0], "training by steps", 2, values)
    runs, hours, power = plan.lines()
    assert runs == "runs: 15 (3 groups, 5 seeds), 6 references; 9 are finished"
    assert hours == "time: 0.083 h left, 2 at once: training by steps"
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
    plan = Forecast(3, (3, 8), seconds=[9 * 3600.0, 24 * 3600.0])
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


@pytest.fixture
def left(
    tmp_path: Path, tiny_tree: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[float], str]]:
    """What is left where some runs have finished, a step of ``token`` costing three of ``drop``."""

    def flops(configs: dict[str, Any]) -> dict[str, float]:
        return {k: {"drop": 1.0, "token": 3.0}[c.model.regime.name] for k, c in configs.items()}

    monkeypatch.setattr(hours, "flops_of_steps", flops)
    monkeypatch.setattr(hours, "time_step", lambda config: 0.5)

    def left(
        done: dict[str, tuple[int, float]], lengths: list[int] | None = None, **more: Any
    ) -> tuple[list[float], str]:
        axes = {"model.regime.name": ["drop", "token"], "train.max_steps": lengths or [10]}
        given = {"output": str(tmp_path), "axes": axes, "evaluations": {"knn": {}}, **more}
        config = build(CompareConfig, {**given, "base": tiny_tree({})})
        for folder, (steps, seconds) in done.items():
            (tmp_path / folder).mkdir()
            result = {"status": "finished", "steps": steps, "wall_seconds": seconds}
            result["seconds"] = {"run": seconds + 4, "evaluate": 4.0}
            (tmp_path / folder / "result.json").write_text(json.dumps(result))
        planned = plan(config)
        return hours.seconds_left(planned, hours.finished(planned), config)

    return left


def test_seconds_left_are_those_of_each_groups_steps(left: Callable[..., Any]) -> None:
    short = {"regime=drop,max_steps=10": (10, 20.0), "regime=token,max_steps=10": (10, 70.0)}
    # Runs of 40 steps by FLOPs: 9 s for those of 1 + 3; each with two references is evaluated.
    seconds, counted = left(short, [10, 40])
    assert seconds == [pytest.approx(40 * 9 / 4 + 40 * 9 * 3 / 4 + 4 * 4)]
    said = "training by the steps of 2 finished runs and FLOPs"
    assert counted == f"{said}; evaluations and references by their mean"


def test_seeds_and_tuning_are_counted(tmp_path: Path, left: Callable[..., Any]) -> None:
    done = {"regime=drop,max_steps=10,seed=0": (10, 20.0)}
    tune = {"optim.base_lr": [1e-3, 2e-3], "budget": 1}  # two runs of half the length
    more = {"seeds": {"least": 3, "most": 4}, "tune": tune}
    seconds, counted = left(done, **more)
    # Runs left: 2 or 3 of 20 s, 3 or 4 of 60 s; as many untrained encoders as seeds, and pixels.
    expected = [2 * 20 + 3 * 60 + 9 * 4, 3 * 20 + 4 * 60 + 12 * 4]
    assert seconds == [pytest.approx(each + 20 + 60) for each in expected]
    assert counted.startswith("training and tuning by")
    (tmp_path / "tune.json").write_text("{}")
    assert left({}, **more)[0] == [pytest.approx(each) for each in expected]


def test_before_a_run_steps_are_measured_if_that_takes_seconds(
    left: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = "training by steps measured here; evaluations and references are not counted"
    assert left({}) == ([pytest.approx(2 * 10 * 0.5)], counted)
    monkeypatch.setattr(hours, "flops_of_steps", lambda configs: dict.fromkeys(configs, 1e15))
    assert left({}) == ([], "")
