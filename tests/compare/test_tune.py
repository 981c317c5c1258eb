"""Settings chosen for each group: the work is bounded, and the test images are not read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mim.compare.halving import TuneRule, best_first, rungs
from mim.compare.plan import CompareConfig, Planned, plan
from mim.compare.rounds import forecast
from mim.compare.tune import FILE, FIRST_SEED, tuned
from mim.core.config import DataConfig
from mim.core.errors import TrainingError, UserError
from mim.core.fields import build
from mim.data import open_source

Tree = Callable[..., dict[str, Any]]
RATES = [1e-3, 2e-3, 4e-3, 8e-3]
BEST = {"drop": 2e-3, "token": 8e-3}


def compare(tmp_path: Path, tree: dict[str, Any], **more: Any) -> CompareConfig:
    given = {
        "output": str(tmp_path / "cmp"),
        "axes": {"model.regime.name": ["drop", "token"], "seed": [0, 1, 2]},
        "evaluations": {"knn": {"few_shot": []}, "finetune": {}},
        "tune": {"optim.base_lr": RATES},
        "base": tree,
    }
    return build(CompareConfig, {**given, **more})


def played(seen: list[list[Planned]], fails: Callable[[Planned], bool] = lambda _: False) -> Any:
    """Runs that end at once; the nearer the rate is to its regime's best, the better."""

    def run(items: list[Planned], evaluations: dict[str, Any]) -> None:
        seen.append(items)
        for item in items:
            folder = Path(item.config.output)
            folder.mkdir(parents=True, exist_ok=True)
            off = abs(math.log(item.config.optim.base_lr / BEST[item.config.model.regime.name]))
            result = {"status": "failed" if fails(item) else "finished", "val_loss": off}
            result["evaluations"] = {name: {"accuracy": 1 - off / 9} for name in evaluations}
            (folder / "result.json").write_text(json.dumps(result))

    return run


def rates_of(planned: list[Planned]) -> dict[str, float]:
    runs = [item for item in planned if item.kind == "run"]
    return {item.config.model.regime.name: item.config.optim.base_lr for item in runs}


@pytest.mark.parametrize("by", ["", "val_loss"])
def test_each_group_gets_the_best_of_its_own(tmp_path: Path, tiny_tree: Tree, by: str) -> None:
    config = compare(tmp_path, tiny_tree({}), tune={"optim.base_lr": RATES, "by": by})
    seen: list[list[Planned]] = []
    planned = tuned(plan(config), config, played(seen))
    assert rates_of(planned) == BEST
    assert [len(items) for items in seen] == [8, 4]  # four candidates a group, then the better two
    assert {item.config.seed for items in seen for item in items} == {FIRST_SEED}
    kept = json.loads((tmp_path / "cmp" / FILE).read_text())
    chosen = {g["axes"]["model.regime.name"]: g["chosen"]["optim.base_lr"] for g in kept["groups"]}
    assert chosen == BEST and kept["by"] == (by or "knn.accuracy")
    outside = {item.config.output for item in planned} | {str(tmp_path / "cmp")}
    assert all("/cmp/tune/" in item.config.output for items in seen for item in items)
    assert not outside & {item.config.output for items in seen for item in items}


def test_tuning_reads_no_test_image(tmp_path: Path, tiny_tree: Tree) -> None:
    config = compare(tmp_path, tiny_tree({}))
    planned, seen = plan(config), list[list[Planned]]()
    tuned(planned, config, played(seen))
    test = set(open_source(planned[0].config.data, "val").sample_ids.tolist())
    whole = set(open_source(planned[0].config.data, "train").sample_ids.tolist())
    for item in seen[0] + seen[1]:
        parts = [
            set(open_source(item.config.data, s).sample_ids.tolist()) for s in ("train", "val")
        ]
        assert parts[0] | parts[1] == whole and not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & test
        assert len(parts[1]) == round(0.2 * len(whole))


def test_images_of_a_folder_with_a_split_of_its_own(tmp_path: Path) -> None:
    from PIL import Image

    for place in range(10):
        for split, side in (("train", 8), ("val", 8)):
            path = tmp_path / "set" / split / f"c{place % 2}" / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side), (place, 0, 0)).save(path)
    config = DataConfig(source="imagefolder", path=str(tmp_path / "set"), image_size=8)
    held = build(DataConfig, {**vars(config), "val_from_train": 0.3})
    named = [
        {part.describe(n) for n in range(len(part))}
        for part in (open_source(held, "train"), open_source(held, "val"))
    ]
    assert [len(part) for part in named] == [7, 3]
    assert named[0] | named[1] == {open_source(config, "train").describe(n) for n in range(10)}


def test_a_candidate_that_fails_is_not_chosen(tmp_path: Path, tiny_tree: Tree) -> None:
    config = compare(tmp_path, tiny_tree({}))
    run = played([], lambda item: item.config.optim.base_lr == BEST["drop"])
    assert rates_of(tuned(plan(config), config, run))["drop"] in (1e-3, 4e-3)
    with pytest.raises(TrainingError, match="no candidate of regime=drop"):
        tuned(plan(config), config, played([], lambda _: True))


def test_over_names_the_axes_that_have_a_setting_of_their_own(
    tmp_path: Path, tiny_tree: Tree
) -> None:
    axes = {"model.regime.name": ["drop", "token"], "mask.ratio": [0.5, 0.75], "seed": [0]}
    tune = {"optim.base_lr": RATES, "over": ["model.regime.name"], "budget": 16}
    config = compare(tmp_path, tiny_tree({}), axes=axes, tune=tune)
    seen: list[list[Planned]] = []
    planned = tuned(plan(config), config, played(seen))
    assert rates_of(planned) == BEST
    assert {item.config.mask.ratio for item in seen[0]} == {0.5}
    assert len(seen[0]) == 2 * 4 * 2 and len(seen[1]) == 2 * 2 * 4  # two seeds, then four
    (line,) = [line for line in forecast(config).lines() if line.startswith("tuning")]
    assert "32 runs before these, 16 for each of 2 groups" in line


def test_the_work_is_never_more_than_the_budget() -> None:
    for candidates in range(2, 20):
        for budget in (0.5, 1, 3, 8, 40):
            found = rungs(candidates, budget)
            work = sum(rung.candidates * rung.seeds * rung.length for rung in found)
            assert work <= budget * (1 + 1e-9)
            assert found[0].candidates == candidates and found[-1].candidates == 2
    # By hand: 4 runs' work on two rungs, half of the length for four and all of it for two.
    assert [(r.candidates, r.length, r.seeds) for r in rungs(4, 4)] == [(4, 0.5, 1), (2, 1.0, 1)]


def test_candidates_are_ranked_by_their_mean() -> None:
    scores = {0: [0.5, 0.7], 1: [0.9, None], 2: [0.8, 0.6], 3: [math.nan, 1.0]}
    assert best_first(scores, higher=True) == [2, 0, 1, 3]
    assert best_first(scores, higher=False) == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({}, None),
        ({"optim.base_lr": [1e-3]}, "leaves nothing to choose"),
        ({"optim.base_lr": 1e-3}, "must be a list"),
        ({"optim.lr": [1, 2]}, "optim.base_lr"),
        ({"model.regime.name": ["drop", "zero"]}, "is an axis already"),
        ({"optim.base_lr": RATES, "bugdet": 3}, "bugdet"),
        ({"optim.base_lr": RATES, "by": "finetune"}, "no probe of frozen features"),
        ({"optim.base_lr": RATES, "by": "linear"}, "tune.by"),
        ({"mask.ratio": [0.5, 0.7], "by": "val_loss"}, "means another thing"),
        ({"optim.base_lr": RATES, "over": ["seed"]}, "tune.over"),
        ({"optim.base_lr": RATES, "over": "seed"}, r"tune\.over: 'seed' must be a list"),
        ({"optim.base_lr": RATES, "budget": "many"}, r"tune\.budget: 'many' must be a number"),
        ({"optim.base_lr": RATES, "holdout": "few"}, r"tune\.holdout: 'few' must be a number"),
        ({"optim.base_lr": RATES, "by": "knn.acuracy"}, r"tune\.by: .* not one of knn\.accuracy"),
        ({"optim.base_lr": [1e-3, 1e-3]}, "names a value twice"),
        ({"optim.base_lr": [1e-3, "fast"]}, r"optim\.base_lr: 'fast' must be a number"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, tiny_tree: Tree, tune: dict[str, Any], said: str | None
) -> None:
    if said is None:
        assert compare(tmp_path, tiny_tree({}), tune=tune).tune_rule is None
        with pytest.raises(UserError, match="names no setting"):
            TuneRule({})
        return
    with pytest.raises(UserError, match=said):
        plan(compare(tmp_path, tiny_tree({}), tune=tune))


def test_a_comparison_with_both_from_the_shell(
    tmp_path: Path, mim: Any, tiny_tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compare.yaml"
    content = {
        "output": str(tmp_path / "cmp"),
        "axes": {"model.regime.name": ["drop", "token"]},
        "budget": "flops",
        "tune": {"optim.base_lr": [1e-3, 8e-3], "budget": 1},
        "evaluations": {"knn": {"few_shot": []}},
        "base": tiny_tree({"train.max_steps": 4}),
    }
    path.write_text(yaml.safe_dump(content))
    assert mim("compare", "--config", path).code == 0
    results = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("cmp/*/result.json")}
    drop, token = (results[f"regime={name}"] for name in ("drop", "token"))
    assert token["steps"] < drop["steps"] == 4
    chosen = {g["axes"]["model.regime.name"]: g["chosen"] for g in json.loads(
        (tmp_path / "cmp" / FILE).read_text())["groups"]}  # fmt: skip
    for name, result in (("drop", drop), ("token", token)):
        assert result["config"]["optim"]["base_lr"] == chosen[name]["optim.base_lr"]
        assert result["config"]["data"]["val_from_train"] is None
    listed = (tmp_path / "cmp" / "results.csv").read_text()
    assert "tune" not in listed.partition("\n")[2]
    report = (tmp_path / "cmp" / "report.html").read_text()
    assert 'id="tuning"' in report
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("cmp/**/encoder.safetensors")}
    assert len(times) == 2 + 4
    monkeypatch.setattr("mim.api._report", lambda *_: None)  # it is the same
    again = mim("compare", "--config", path)
    assert again.code == 0 and ": train" not in again.err and "evaluate" not in again.err
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("cmp/**/encoder.safetensors")}
