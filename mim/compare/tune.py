"""Settings chosen for each group before the comparison: ``tune`` in its config.

One learning rate for all regimes is fair only if it suits all. Every group gets the same candidates
and the same work to choose among them, on seeds that the comparison does not have and on a part of
the training images that stands in for the test images (``data.val_from_train``), which no run of
tuning reads. The runs lie in ``tune/`` beside those of the comparison, and ``tune.json`` holds what
they reached and what was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mim.compare.budget import steps_of_epochs, with_steps
from mim.compare.halving import VAL_LOSS, Rung, TuneRule, best_first, is_end
from mim.compare.plan import CompareConfig, Planned, groups_of, label_of, vary
from mim.compare.statistics import more_is_better
from mim.core import progress
from mim.core.config import Config
from mim.core.errors import TrainingError
from mim.core.files import write_json_atomic
from mim.training.pretrain import total_steps
from mim.training.results import read_result

FILE, FOLDER = "tune.json", "tune"
FIRST_SEED = 1_000_000
"""Seeds of tuning count from here."""
Run = Callable[[list[Planned], dict[str, Any]], object]
"""Computes runs with some evaluations, as far as they are not finished."""


@dataclass
class _Group:
    """A group that is tuned, and how far it is."""

    axes: dict[str, Any]
    item: Planned
    left: list[int]
    rungs: list[dict[str, Any]]


def tuned(planned: list[Planned], config: CompareConfig, run: Run) -> list[Planned]:
    """Choose each group's settings, and return the plan with them.

    Args:
        planned: of the comparison, with lengths and images settled.
        config: with its ``tune``.
        run: computes what is missing.

    Raises:
        TrainingError: if all candidates of a group failed.
    """
    rule = config.tune_rule
    if rule is None:
        return planned
    groups = tuned_groups(planned, rule)
    evaluation = rule.by.partition(".")[0]
    evaluations = {k: v for k, v in config.evaluations.items() if k == evaluation}
    epoch = steps_of_epochs()
    for number, rung in enumerate(rule.rungs):
        after = rule.rungs[number + 1 :]
        goes_on = after[0].candidates if after else 1
        runs = {key: _runs(group, rung, rule, config, epoch) for key, group in groups.items()}
        wanted = [item for own in runs.values() for items in own.values() for item in items]
        run(wanted, evaluations)
        for key, group in groups.items():
            scores = {place: [_score(i, rule.by) for i in own] for place, own in runs[key].items()}
            _close(group, rung, rule, scores, goes_on)
    chosen = {key: rule.candidates[group.left[0]] for key, group in groups.items()}
    _write(Path(config.output), rule, groups)
    return [
        replace(item, config=vary(item.config, chosen[_key(item, rule)], Path(item.config.output)))
        if item.kind == "run"
        else item
        for item in planned
    ]


def tuned_groups(planned: list[Planned], rule: TuneRule) -> dict[str, _Group]:
    """The groups that get a setting of their own; of the others' axes the first value is tuned."""
    found: dict[str, _Group] = {}
    for runs in groups_of(planned).values():
        item = next(iter(runs.values()))
        places = list(range(len(rule.candidates)))
        found.setdefault(_key(item, rule), _Group(_axes(item, rule), item, places, []))
    return found


def tuning_lines(planned: list[Planned], config: CompareConfig) -> list[str]:
    """What ``--plan`` says of the tuning."""
    rule = config.tune_rule
    if rule is None:
        return []
    groups = len(tuned_groups(planned, rule))
    each = sum(rung.candidates * rung.seeds for rung in rule.rungs)
    work = sum(rung.candidates * rung.seeds * rung.length for rung in rule.rungs)
    halves = " -> ".join(
        f"{rung.candidates} x {rung.length:.3g} of the length"
        + (f" x {rung.seeds} seeds" if rung.seeds > 1 else "")
        for rung in rule.rungs
    )
    return [
        f"tuning: {groups * each} runs before these, {each} for each of {groups} groups ({halves} "
        f"-> 1 by {rule.by}), the work of {groups * work:.3g} full runs"
    ]


def tuning_steps(planned: list[Planned], config: CompareConfig) -> dict[str, int]:
    """Count the steps that tuning trains, by the folder of the run they are like."""
    rule, epoch = config.tune_rule, steps_of_epochs()
    if rule is None or (Path(config.output) / FILE).is_file():
        return {}
    found = {}
    for group in tuned_groups(planned, rule).values():
        own = group.item.config
        found[group.item.folder] = sum(
            rung.candidates * rung.seeds * _steps(own, rung, epoch) for rung in rule.rungs
        )
    return found


def _steps(config: Config, rung: Rung, epoch: Callable[[Config], int]) -> int:
    """Of a rung's runs."""
    return max(1, round(rung.length * total_steps(config, epoch(config))))


def _axes(item: Planned, rule: TuneRule) -> dict[str, Any]:
    over = item.axes if rule.over is None else rule.over
    return {key: value for key, value in item.axes.items() if key in over and key != "seed"}


def _key(item: Planned, rule: TuneRule) -> str:
    return json.dumps(_axes(item, rule))


def _runs(
    group: _Group, rung: Rung, rule: TuneRule, config: CompareConfig, epoch: Callable[[Config], int]
) -> dict[int, list[Planned]]:
    """Candidate -> its runs of a rung, one a seed."""
    own = group.item.config
    steps = _steps(own, rung, epoch)
    found: dict[int, list[Planned]] = {}
    for place in group.left:
        for seed in range(FIRST_SEED, FIRST_SEED + rung.seeds):
            settings = {**rule.candidates[place], "seed": seed}
            name = label_of({**group.axes, "length": f"{rung.length:.4g}", **settings})
            folder = f"{FOLDER}/{name}"
            images = {"data.val_from_train": rule.holdout, "data.fingerprint": None}
            varied = vary(own, {**settings, **images}, Path(config.output) / folder)
            varied = with_steps(varied, steps, epoch(varied))
            found.setdefault(place, []).append(Planned(folder, "run", settings, varied))
    return found


def _score(item: Planned, by: str) -> float | None:
    """What decides of a finished run; None of one that failed."""
    result = read_result(Path(item.config.output))
    evaluation, _, name = by.partition(".")
    numbers: Mapping[str, Any] = result.get("evaluations", {}).get(evaluation, {})
    value = result.get(VAL_LOSS) if by == VAL_LOSS else numbers.get(name)
    is_known = result.get("status") == "finished" and isinstance(value, (int, float))
    return float(value) if is_known and value is not None else None


def _close(
    group: _Group,
    rung: Rung,
    rule: TuneRule,
    scores: Mapping[int, list[float | None]],
    goes_on: int,
) -> None:
    """Note what a rung reached, and keep the better candidates."""
    if all(value is None for values in scores.values() for value in values):
        name = label_of(group.axes)
        raise TrainingError(f"tune: no candidate of {name} has finished with a {rule.by}")
    tried = [{"settings": rule.candidates[k], "values": values} for k, values in scores.items()]
    group.rungs.append({"length": rung.length, "seeds": rung.seeds, "tried": tried})
    group.left = best_first(scores, rule.by != VAL_LOSS and more_is_better(rule.by))[:goes_on]
    if goes_on == 1:
        settings = rule.candidates[group.left[0]]
        said = ", ".join(
            f"{key}={value}" + (" (the end of its values)" if is_end(value, rule.grid[key]) else "")
            for key, value in settings.items()
        )
        progress.note(f"tune: {label_of(group.axes)}: {said} by {rule.by}")


def _write(output: Path, rule: TuneRule, groups: Mapping[str, _Group]) -> None:
    found = []
    for group in groups.values():
        chosen = rule.candidates[group.left[0]]
        ends = [key for key, value in chosen.items() if is_end(value, rule.grid[key])]
        found.append({"axes": group.axes, "rungs": group.rungs, "chosen": chosen, "ends": ends})
    write_json_atomic(output / FILE, {"by": rule.by, "holdout": rule.holdout, "groups": found})
