"""Seeds are added to the groups that need them, by the results on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mim.compare import runner
from mim.compare.plan import CompareConfig, Planned, plan
from mim.compare.rounds import forecast, rounds
from mim.core.errors import UserError

TRUTH = {"drop": 0.5, "zero": 0.501, "token": 0.9}
NOISE = (0.010, -0.013, 0.004, -0.006, 0.009, -0.002)


def _config(folder: Path, **more: Any) -> CompareConfig:
    axes = {"model.regime.name": list(TRUTH)}
    given = {"seeds": {"least": 3, "most": 5}, "evaluations": {"knn": {}}, "margin": 0.1, **more}
    return CompareConfig(output=str(folder), axes=axes, **given)


def _finish(item: Planned, measure: str = "knn.accuracy") -> None:
    """What a run leaves; noise differs by group so that the near ones stay undecided."""
    folder = Path(item.config.output)
    folder.mkdir(parents=True, exist_ok=True)
    seed = item.config.seed
    place = list(TRUTH).index(item.axes.get("model.regime.name", "drop"))
    value = TRUTH.get(item.axes.get("model.regime.name", ""), 0.3) + NOISE[(seed + 2 * place) % 6]
    evaluation, _, name = measure.partition(".")
    result = {"status": "finished", "steps": 10, "wall_seconds": 60.0, "evaluations": {
        "linear_online": {"accuracy": 0.0}, evaluation: {"accuracy": 0.0, name: value},
    }}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def _played(config: CompareConfig, finish: Callable[[Planned], None]) -> list[set[str]]:
    found = []
    for part in rounds(plan(config), config):
        for item in part:
            finish(item)
        found.append({item.folder for item in part})
    return found


@pytest.mark.parametrize(
    "measure", ["knn.accuracy", "segment.miou", "detect.map", "label_free.effective_rank"]
)
def test_a_group_that_is_decided_stops_and_its_references_come_with_each_seed(
    tmp_path: Path, measure: str
) -> None:
    config = _config(tmp_path, evaluations={measure.partition(".")[0]: {}, "linear": {}})
    first, *later = _played(config, partial(_finish, measure=measure))
    expected = {f"regime={name},seed={seed}" for name in TRUTH for seed in range(3)}
    assert first == expected | {"pixels", *(f"untrained,seed={seed}" for seed in range(3))}
    assert later == [
        {"regime=drop,seed=3", "regime=zero,seed=3", "untrained,seed=3"},
        {"regime=drop,seed=4", "regime=zero,seed=4", "untrained,seed=4"},
    ]
    # Called again on finished runs it takes the same rounds, whatever lies further on.
    assert _played(config, lambda item: None) == [first, *later]


def test_runs_that_fail_everywhere_end_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(_played(_config(tmp_path), lambda item: None)) == 1
    assert "no run has ended with a knn.accuracy" in capsys.readouterr().err


@pytest.mark.parametrize("todo", ["train", "done"])
def test_a_measure_that_the_first_run_lacks_ends_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, todo: str
) -> None:
    started: list[Planned] = []

    class Jobs:
        def __init__(self, work: Any, count: int) -> None:
            self.running: list[Planned] = []

        def start(self, item: Planned) -> None:
            started.append(item)
            self.running.append(item)
            _finish(item)

        def wait(self) -> list[tuple[Planned, int]]:
            return [(self.running.pop(), 0)]

        def stop(self) -> list[Any]:
            return []

    monkeypatch.setattr(runner, "LocalJobs", Jobs)
    planned = plan(_config(tmp_path))
    states = {item.folder: runner.State("train", {}) for item in planned}
    if todo == "done":
        _finish(planned[0])
        states[planned[0].folder] = runner.State("done", {})
    with pytest.raises(UserError, match=r"primary: 'knn\.f1' is not one of knn\.accuracy"):
        runner._run_all(
            planned, states, {}, ("primary", "knn.f1"), output=tmp_path, show="quiet",
            launch=runner.Launch(),
        )  # fmt: skip
    assert len(started) == (todo == "train")


def test_without_a_rule_there_is_one_round(tmp_path: Path) -> None:
    config = CompareConfig(output=str(tmp_path), evaluations={})
    assert [len(part) for part in rounds(plan(config), config)] == [3]


def test_the_forecast_reads_what_has_finished(tmp_path: Path) -> None:
    config = _config(tmp_path)
    _played(config, _finish)
    runs, hours, power = forecast(config, jobs=2).lines()
    assert runs.startswith("runs: 9 to 15 (3 groups, 3 to 5 seeds, until decided), 6 references")
    assert "13 are finished" in runs and "by the steps of 13 finished runs" in hours
    assert "points, by a standard deviation over seeds of" in power


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seeds": {"least": 2}}, "seeds.least"),
        ({"seeds": {"lest": 3}}, "seeds"),
        ({"seeds": {"least": "three"}}, r"seeds\.least: 'three' must be a whole number"),
        ({"seeds": {"least": 3.5, "most": 5}}, r"seeds\.least: 3\.5 must be a whole number"),
        ({"seeds": {"least": 3, "most": 5.5}}, r"seeds\.most: 5\.5 must be a whole number"),
        ({"seeds": {"most": 5000}}, r"seeds\.most: 5000 must be at most 200"),
        ({"primary": "linear"}, "primary"),
        ({"margin": 0.0}, "margin"),
        ({"evaluations": {}}, "needs an evaluation"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        _config(tmp_path, **given)
    with pytest.raises(UserError, match=r"axes\.seed"):
        CompareConfig(axes={"seed": [0, 1]}, seeds={"least": 3})
