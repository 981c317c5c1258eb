"""How long what is left of a comparison takes, by the steps and evaluations that were seen."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mim.compare.budget import Length, flops_of_steps, steps_of_epochs
from mim.compare.cost.step import time_step
from mim.compare.plan import CompareConfig, Groups, Planned, groups_of
from mim.compare.shared_steps import with_shared_steps
from mim.compare.tune import tuning_steps
from mim.training.pretrain import total_steps
from mim.training.results import read_result

Results = Mapping[str, dict[str, Any]]
"""Folder -> result of a run that has finished."""
_MOST_GROUPS = 8
"""Groups whose steps are counted or measured for a forecast."""
_MOST_FLOPS = {"cpu": 5e10, "cuda": 5e13}
"""FLOPs of a step of every group up to which measuring takes seconds."""


def finished(planned: Sequence[Planned]) -> dict[str, dict[str, Any]]:
    """Read the results of the runs and references that have ended well."""
    found = {item.folder: read_result(Path(item.config.output)) for item in planned}
    return {key: result for key, result in found.items() if result.get("status") == "finished"}


def seconds_left(
    planned: list[Planned], done: Results, config: CompareConfig, lengths: Sequence[Length] = ()
) -> tuple[list[float], str]:
    """Estimate what is left, one run after the other, for the least and for the most seeds.

    Args:
        planned: with the steps of each run.
        done: the results there are.
        config: of the comparison.
        lengths: of the groups, with what a step costs.

    Returns:
        Seconds, and how they are known and what is among them; no seconds where nothing is known.
    """
    planned, epoch = with_shared_steps(planned), steps_of_epochs()
    groups = groups_of(planned)
    costs = {json.dumps(each.axes): each.cost for each in lengths}
    rates, source = _rates(groups, done, costs, config.budget)
    if not rates:
        return [], ""
    rate = {item.folder: rates[key] for key, own in groups.items() for item in own.values()}
    measuring = [each for r in done.values() if (each := r.get("seconds", {}).get("evaluate"))]
    evaluation = sum(measuring) / len(measuring) if measuring else 0.0
    tuning = sum(rate[folder] * steps for folder, steps in tuning_steps(planned, config).items())

    def seconds(item: Planned) -> float:
        if item.kind != "run":
            return evaluation
        shared = item.begins_with[0][1] if item.begins_with else 0
        steps = total_steps(item.config, epoch(item.config)) - shared
        return evaluation + rate[item.folder] * steps

    left, rule = [item for item in planned if item.folder not in done], config.seed_rule
    ends = [left]
    if rule:
        fixed = ("pixels", "given")
        ends = [
            [item for item in left if item.kind in fixed or item.config.seed < seeds]
            for seeds in dict.fromkeys((rule.least, rule.most))
        ]
    counted = f"training{' and tuning' if tuning else ''} by {source}"
    if config.evaluations:
        counted += (
            f"; evaluations and references {'by their mean' if evaluation else 'are not counted'}"
        )
    return [tuning + sum(map(seconds, items)) for items in ends], counted


def _rates(
    groups: Groups, done: Results, costs: Mapping[str, float], budget: str
) -> tuple[dict[str, float], str]:
    """Find the seconds of a step of each group, and say how.

    They are those of the group's finished runs, of the others' by the FLOPs of a step, or measured.
    """
    seen = {
        key: [result for item in own.values() if (result := done.get(item.folder, {})).get("steps")]
        for key, own in groups.items()
    }
    rates = {
        key: sum(r["wall_seconds"] for r in own) / sum(r["steps"] for r in own)
        for key, own in seen.items()
        if own
    }
    said = f"the steps of {sum(map(len, seen.values()))} finished runs"
    if len(rates) == len(groups):
        return rates, said
    first = {key: next(iter(own.values())).config for key, own in groups.items()}
    if budget == "seconds":
        return {**costs, **rates}, "measured steps"
    few = len(groups) <= _MOST_GROUPS
    flops: Mapping[str, float] = dict.fromkeys(first, 1.0)  # a step is a step
    if budget == "flops":
        flops = costs
    elif few:
        flops = flops_of_steps(first)
    if rates:
        each = sum(rates.values()) / sum(flops[key] for key in rates)
        return {key: rates.get(key, each * flops[key]) for key in groups}, f"{said} and FLOPs"
    most = _MOST_FLOPS["cuda" if torch.cuda.is_available() else "cpu"]
    if few and sum(flops.values()) <= most:
        with contextlib.suppress(torch.OutOfMemoryError):  # another program has the GPU
            return {key: time_step(config) for key, config in first.items()}, "steps measured here"
    return {}, ""
