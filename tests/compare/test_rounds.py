"""Seeds are added to the groups that need them, by the results on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim.compare.plan import CompareConfig, Planned, plan
from mim.compare.rounds import forecast, rounds
from mim.core.errors import UserError

TRUTH = {"drop": 0.5, "zero": 0.501, "token": 0.9}
NOISE = (0.010, -0.013, 0.004, -0.006, 0.009, -0.002)


def _config(folder: Path, **more: Any) -> CompareConfig:
    axes = {"model.regime.name": list(TRUTH)}
    given = {"seeds": {"least": 3, "most": 5}, "evaluations": {"knn": {}}, "margin": 0.1, **more}
    return CompareConfig(output=str(folder), axes=axes, **given)


def _finish(item: Planned) -> None:
    """What a run leaves; noise differs by group so that the near ones stay undecided."""
    folder = Path(item.config.output)
    folder.mkdir(parents=True, exist_ok=True)
    seed = item.config.seed
    place = list(TRUTH).index(item.axes.get("model.regime.name", "drop"))
    value = TRUTH.get(item.axes.get("model.regime.name", ""), 0.3) + NOISE[(seed + 2 * place) % 6]
    result = {"status": "finished", "seconds": {"run": 60.0}, "evaluations": {
        "linear_online": {"accuracy": 0.0}, "knn": {"accuracy": value},
    }}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))


def _played(config: CompareConfig, finish: Callable[[Planned], None]) -> list[set[str]]:
    found = []
    for part in rounds(plan(config), config):
        for item in part:
            finish(item)
        found.append({item.folder for item in part})
    return found


def test_a_group_that_is_decided_stops_and_its_references_come_with_each_seed(
    tmp_path: Path,
) -> None:
    config = _config(tmp_path)
    first, *later = _played(config, _finish)
    expected = {f"regime={name},seed={seed}" for name in TRUTH for seed in range(3)}
    assert first == expected | {"pixels", *(f"untrained,seed={seed}" for seed in range(3))}
    assert later == [
        {"regime=drop,seed=3", "regime=zero,seed=3", "untrained,seed=3"},
        {"regime=drop,seed=4", "regime=zero,seed=4", "untrained,seed=4"},
    ]
    # Called again on finished runs it takes the same rounds, whatever lies further on.
    assert _played(config, lambda item: None) == [first, *later]


def test_runs_that_fail_everywhere_end_it(tmp_path: Path) -> None:
    assert len(_played(_config(tmp_path), lambda item: None)) == 1


def test_without_a_rule_there_is_one_round(tmp_path: Path) -> None:
    config = CompareConfig(output=str(tmp_path), evaluations={})
    assert [len(part) for part in rounds(plan(config), config)] == [3]


def test_the_forecast_reads_what_has_finished(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert forecast(config).lines()[1].startswith("time: not known")
    _played(config, _finish)
    runs, hours, power = forecast(config, jobs=2).lines()
    assert runs.startswith("runs: 9 to 15 (3 groups, 3 to 5 seeds, until decided), 6 references")
    assert "13 are finished" in runs and "60 s a run by the mean of 13 finished" in hours
    assert "points, by a standard deviation over seeds of" in power


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seeds": {"least": 2}}, "seeds.least"),
        ({"seeds": {"lest": 3}}, "seeds"),
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
