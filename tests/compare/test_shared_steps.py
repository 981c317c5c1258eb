"""Runs of several lengths: what they share is trained once, and changes no number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mim.compare import run_comparison
from mim.compare.budget import equal_budget
from mim.compare.plan import CompareConfig, plan
from mim.compare.shared_steps import with_shared_steps
from mim.core.fields import build
from mim.report.collect import read_comparison
from mim.report.page import notes
from mim.training import checkpoint
from mim.training.pretrain import pretrain
from mim.training.results import read_result

Tree = Callable[..., dict[str, Any]]
COOLED = {
    "optim.schedule.shape": "constant",
    "optim.schedule.cooldown": 0.2,
    "train.max_steps": None,
}
EPOCH = 25  # steps


def compare(tmp_path: Path, tree: dict[str, Any], **more: Any) -> CompareConfig:
    axes = {"train.epochs": [1, 2, 4], "seed": [0]}
    given = {"output": str(tmp_path / "cmp"), "axes": axes, "evaluations": {}, "base": tree}
    return build(CompareConfig, {**given, **more})


def begins(config: CompareConfig) -> dict[str, list[tuple[str, int]]]:
    planned, _ = equal_budget(plan(config), config)
    return {item.folder: list(item.begins_with) for item in with_shared_steps(planned)}


def curve(run: str) -> list[tuple[int, float, float]]:
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["lr"]) for line in lines if "loss" in line]


def test_a_longer_run_ends_as_one_trained_alone(tmp_path: Path, tiny_tree: Tree) -> None:
    config = compare(tmp_path, tiny_tree(COOLED))
    assert run_comparison(config) == []
    begun = []
    for item in plan(config):
        ours = read_result(item.config.output)
        alone = replace(item.config, output=str(tmp_path / "alone" / item.folder))
        theirs = pretrain(alone)
        assert ours["train_loss"] == theirs["train_loss"] and ours["steps"] == theirs["steps"]
        assert curve(item.config.output) == curve(alone.output)
        weights = load_file(Path(alone.output, "encoder.safetensors"))
        for name, tensor in load_file(Path(item.config.output, "encoder.safetensors")).items():
            assert torch.equal(tensor, weights[name])
        begun.append(ours.get("shared"))
    first, second = "epochs=1,seed=0", "epochs=2,seed=0"
    page = notes(read_comparison(Path(config.output)), [])
    assert any("begins with the steps of a shorter one" in note for note in page)
    assert begun == [None, {"run": first, "steps": 20}, {"run": second, "steps": 40}]


def test_what_is_shared_follows_from_the_schedules(tmp_path: Path, tiny_tree: Tree) -> None:
    one, two, four = (f"epochs={epochs},seed=0" for epochs in (1, 2, 4))
    shared = {one: [], two: [(one, 20)], four: [(two, 40), (one, 20)]}
    assert begins(compare(tmp_path, tiny_tree(COOLED))) == shared
    apart: dict[str, list[Any]] = {one: [], two: [], four: []}
    spans_all = {"optim.decay_schedule.shape": "cosine", "optim.decay_schedule.to": 0.1}
    cools_before = {"optim.decay_schedule.cooldown": 0.4, "optim.decay_schedule.to": 0.1}
    warms_by_length = {"optim.warmup_epochs": 0.6}  # at most a half of the shortest
    cools_at_once = {**cools_before, "optim.decay_schedule.cooldown": 0.999}
    cosine = {"optim.schedule": {"shape": "cosine"}}
    for settings in (cosine, spans_all, cools_before, cools_at_once):
        assert begins(compare(tmp_path, tiny_tree({**COOLED, **settings}))) == apart
    found = begins(compare(tmp_path, tiny_tree({**COOLED, **warms_by_length})))
    assert found == {one: [], two: [], four: [(two, 40)]}
    ends_alike = {**spans_all, "optim.decay_schedule.length": 0.5}
    assert begins(compare(tmp_path, tiny_tree({**COOLED, **ends_alike}))) == shared


def test_only_runs_that_differ_in_length_alone_share(tmp_path: Path, tiny_tree: Tree) -> None:
    axes = {"mask.ratio": [0.5, 0.75], "train.epochs": [1, 2], "seed": [0, 1]}
    for folder, shared in begins(compare(tmp_path, tiny_tree(COOLED), axes=axes)).items():
        expected = [(folder.replace("epochs=2", "epochs=1"), 20)] if "epochs=2" in folder else []
        assert shared == expected


def test_equal_work_shares_too(tmp_path: Path, tiny_tree: Tree) -> None:
    axes = {"model.regime.name": ["drop", "token"], "train.epochs": [1, 2], "seed": [0]}
    warmup = {"optim.schedule.unit": "steps", "optim.schedule.warmup": 4}
    tree = tiny_tree({**COOLED, **warmup})
    config = compare(tmp_path, tree, axes=axes, budget="flops", budget_of="token")
    shared = begins(config)
    ((shorter, steps),) = shared["regime=drop,epochs=2,seed=0"]
    assert shorter == "regime=drop,epochs=1,seed=0" and steps > EPOCH
    assert shared["regime=token,epochs=2,seed=0"] == [("regime=token,epochs=1,seed=0", 20)]


def test_without_its_shorter_run_a_run_is_trained_whole(tmp_path: Path, tiny_tree: Tree) -> None:
    config = compare(tmp_path, tiny_tree(COOLED), axes={"train.epochs": [2, 1], "seed": [0]})
    assert run_comparison(config) == []
    whole = read_result(Path(config.output, "epochs=2,seed=0"))
    assert "shared" not in whole and whole["steps"] == 50
    kept = checkpoint.path_of(Path(config.output, "epochs=1,seed=0"), 20)
    assert kept.is_file()  # beside the newest two
