"""Equal work: steps that follow from what a step costs, and schedules that stretch with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mim.compare import budget
from mim.compare.budget import equal_budget, with_steps
from mim.compare.plan import CompareConfig, plan
from mim.core.errors import UserError
from mim.core.fields import build
from mim.data import open_source, steps_per_epoch
from mim.training.optim import build_schedule
from mim.training.pretrain import total_steps
from mim.training.runtime.precision import model_on

Tree = Callable[..., dict[str, Any]]
REGIMES = ["drop", "zero", "token"]


def compare(tmp_path: Path, tree: dict[str, Any], **more: Any) -> CompareConfig:
    axes = {"model.regime.name": REGIMES, "seed": [0, 1]}
    given = {"output": str(tmp_path / "cmp"), "axes": axes, "evaluations": {"knn": {}}}
    return build(CompareConfig, {**given, "base": tree, **more})


def per_epoch(config: Any) -> int:
    return steps_per_epoch(open_source(config.data, "train"), config.data)


def steps_of(planned: list[Any]) -> dict[str, int]:
    runs = [item for item in planned if item.kind == "run"]
    return {item.folder: total_steps(item.config, per_epoch(item.config)) for item in runs}


def test_flops_are_equal_within_one_step(tmp_path: Path, tiny_tree: Tree) -> None:
    config = compare(tmp_path, tiny_tree({"train.epochs": 3}), budget="flops", budget_of="token")
    planned, lengths = equal_budget(plan(config), config)
    spent, costs = [], []
    for item in planned:
        if item.kind == "run":
            model = model_on(item.config, budget.torch.device("cpu"))
            counted = budget.measure_flops(model, item.config, open_source(item.config.data, "val"))
            cost = counted["flops_forward"] + counted["flops_backward"]
            costs.append(cost * item.config.data.batch_size)
            spent.append(costs[-1] * steps_of([item])[item.folder])
    assert max(spent) - min(spent) <= max(costs)
    steps = {each.axes["model.regime.name"]: each.steps for each in lengths}
    base = next(item.config for item in plan(config) if item.folder == "regime=token,seed=0")
    assert steps["token"] == total_steps(base, per_epoch(base)) < steps["drop"]


def test_a_step_is_a_step_and_references_keep_their_config(tmp_path: Path, tiny_tree: Tree) -> None:
    axes = {"data.subset.fraction": [1.0, 0.25], "seed": [0]}
    tree = tiny_tree({"train.epochs": 2, "train.max_steps": None})
    config = compare(tmp_path, tree, axes=axes, budget="steps")
    before, (planned, _) = plan(config), equal_budget(plan(config), config)
    full, quarter = steps_of(before).values()
    assert quarter < full
    assert set(steps_of(planned).values()) == {full}
    references = [item for item in planned if item.kind != "run"]
    assert references == [item for item in before if item.kind != "run"]


def test_the_budget_follows_each_length(
    tmp_path: Path, tiny_tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {"model.regime.name": ["drop", "token"], "train.epochs": [2, 6], "seed": [0]}
    tree = tiny_tree({"train.max_steps": None})
    config = compare(tmp_path, tree, axes=axes, budget="seconds")

    def bench(base: Any, regimes: Any, variants: dict[str, Any]) -> dict[str, Any]:
        rates = {"drop": 0.1, "token": 0.3}
        rows = {k: {"seconds_per_step": rates[c.model.regime.name]} for k, c in variants.items()}
        return {"regimes": rows}

    monkeypatch.setattr(budget, "bench_step", bench)
    _, lengths = equal_budget(plan(config), config)
    steps = {tuple(each.axes.values()): each.steps for each in lengths}
    drop = steps["drop", 2]
    assert steps["drop", 6] == 3 * drop
    assert steps["token", 2] == round(drop / 3) and steps["token", 6] == drop

    # What was measured holds: another rate of today changes nothing, unless nothing was kept.
    monkeypatch.setattr(budget, "bench_step", lambda *_, **__: pytest.fail("measured again"))
    assert equal_budget(plan(config), config)[1] == lengths
    (tmp_path / "cmp" / budget.FILE).write_text("{")
    with pytest.raises(UserError, match="remove it to measure again"):
        equal_budget(plan(config), config)


def test_a_plan_alone_leaves_no_file(tmp_path: Path, tiny_tree: Tree) -> None:
    config = compare(tmp_path, tiny_tree({}), budget="steps")
    equal_budget(plan(config), config, keep=False)
    assert not (tmp_path / "cmp").exists()
    equal_budget(plan(config), config)
    assert json.loads((tmp_path / "cmp" / budget.FILE).read_text())["budget"] == "steps"


@pytest.mark.parametrize("steps", [7, 20, 45])
def test_schedules_stretch_with_the_steps(tmp_path: Path, tiny_tree: Tree, steps: int) -> None:
    changes = {
        "train.epochs": 4,
        "train.max_steps": None,
        "optim.warmup_epochs": 1.0,
        "mask.schedule": {"to": 0.5, "epochs": 4, "shape": "linear"},
        "optim.decay_schedule": {"shape": "multistep", "milestones": [1.5, 3.0]},
    }
    config = compare(tmp_path, tiny_tree(changes)).base
    stretched = with_steps(config, steps, per_epoch=5)  # 20 steps before
    assert total_steps(stretched, 5) == steps
    before = build_schedule(config.optim, 64, 20, 5)
    after = build_schedule(stretched.optim, 64, steps, 5)
    assert after.warmup / steps == pytest.approx(before.warmup / 20)
    assert after.peak == before.peak
    assert stretched.mask.schedule.epochs == max(1, round(4 * steps / 20))
    decay = stretched.optim.decay_schedule
    assert decay.milestones == pytest.approx([1.5 * steps / 20, 3.0 * steps / 20])
    assert with_steps(config, 20, 5) == config


def test_mistakes_are_named(tmp_path: Path, tiny_tree: Tree) -> None:
    config = compare(tmp_path, tiny_tree({}), budget="steps", budget_of="drip")
    with pytest.raises(UserError, match=r"budget_of: 'drip'.*drop"):
        equal_budget(plan(config), config)
    with pytest.raises(UserError, match="budget"):
        compare(tmp_path, tiny_tree({}), budget="hours")
