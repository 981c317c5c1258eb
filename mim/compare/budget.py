"""Equal work: how many steps of each group cost what those of the reference group cost.

An epoch of ``drop`` takes a fraction of the work of one of ``token``, so that equal epochs compare
encoders of unequal cost. Here one group, the reference, trains as long as its config says; the work
of that (its steps, FLOPs or seconds) is every other group's budget too. Schedules stretch with the
steps. What a step costs is kept in ``budget.json``, so that a comparison resumes by the same
lengths whatever the machine does meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mim.compare.cost.step import bench_step
from mim.compare.plan import CompareConfig, Groups, Planned, groups_of, label_of, written
from mim.core.config import Config
from mim.core.errors import UserError
from mim.core.files import write_json_atomic
from mim.core.schedule import CourseSettings
from mim.core.settings import to_dict
from mim.data import open_source, steps_per_epoch
from mim.training import checkpoint
from mim.training.pretrain import measure_flops, total_steps
from mim.training.runtime.precision import model_on

FILE = "budget.json"
LENGTHS = ("train.epochs", "train.max_steps")
"""Axes along which the budget itself varies."""
_DURATIONS = ("length", "warmup", "milestones", "epochs")
"""What schedules count in epochs or steps."""
_UNITS = {"flops": "FLOPs", "seconds": "s"}


@dataclass(frozen=True)
class Length:
    """How long a group trains.

    Attributes:
        axes: of the group.
        steps: of each run.
        epochs: the same in passes over its training images.
        cost: of a step, in the budget's unit.
        key: digest of the config that the cost belongs to.
    """

    axes: dict[str, Any]
    steps: int
    epochs: float
    cost: float
    key: str

    def line(self, budget: str) -> str:
        """The same in words."""
        text = f"{budget}: {label_of(self.axes)}: {self.steps} steps, {self.epochs:.4g} epochs"
        if budget not in _UNITS:
            return text
        return f"{text}, {self.steps * self.cost:.4g} {_UNITS[budget]} a run"


def equal_budget(
    planned: list[Planned], config: CompareConfig, keep: bool = True
) -> tuple[list[Planned], list[Length]]:
    """Give every run the length that its group's budget pays for.

    Args:
        planned: all runs and references.
        config: says what is held equal, and whose work is the budget.
        keep: whether costs are written down; a comparison that is only planned leaves no file.

    Returns:
        The plan with these lengths, and the length of each group; none where epochs are equal and
        configs hold as they are.

    Raises:
        UserError: if a config cannot work.
    """
    if config.budget == "epochs":
        return planned, []
    groups = groups_of(planned)
    first = {key: next(iter(runs.values())).config for key, runs in groups.items()}
    path = Path(config.output) / FILE
    costs = _costs(first, config.budget, _read(path, config.budget))
    epoch = steps_of_epochs()
    lengths: dict[str, Length] = {}
    for key, own in first.items():
        reference = first[_reference(key, config)]
        budget = costs[_digest(reference)] * total_steps(reference, epoch(reference))
        steps = max(1, round(budget / costs[_digest(own)]))
        axes = json.loads(key)
        lengths[key] = Length(axes, steps, steps / epoch(own), costs[_digest(own)], _digest(own))
    if keep:
        content = {"budget": config.budget, "of": config.budget_of}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**content, "groups": [asdict(each) for each in lengths.values()]})
    return _with_lengths(planned, groups, lengths, epoch), list(lengths.values())


def _with_lengths(
    planned: list[Planned],
    groups: Groups,
    lengths: Mapping[str, Length],
    epoch: Callable[[Config], int],
) -> list[Planned]:
    steps = {run.folder: lengths[key].steps for key, own in groups.items() for run in own.values()}
    return [
        replace(item, config=with_steps(item.config, steps[item.folder], epoch(item.config)))
        if item.folder in steps
        else item
        for item in planned
    ]


def with_steps(config: Config, steps: int, per_epoch: int) -> Config:
    """The config with another number of steps; what it counts in epochs stretches along.

    Args:
        config: of a run.
        steps: of the run.
        per_epoch: steps of one pass over its training images.
    """
    before = total_steps(config, per_epoch)
    if steps == before:
        return config
    stretch = steps / before
    whole = steps % per_epoch == 0
    epochs = math.ceil(steps / per_epoch)
    train = replace(config.train, epochs=epochs, max_steps=None if whole else steps)
    parts = {
        name: _stretched(getattr(config, name), stretch) for name in ("optim", "mask", "model")
    }
    return replace(config, train=train, **parts)


def _stretched(settings: Any, times: float) -> Any:
    """Settings whose schedules take ``times`` as long, those of their parts too."""
    changed: dict[str, Any] = {}
    for each in fields(settings):
        value = getattr(settings, each.name)
        moves = isinstance(settings, CourseSettings) and each.name in _DURATIONS
        if is_dataclass(value):
            changed[each.name] = _stretched(value, times)
        elif value and (moves or each.name == "warmup_epochs"):
            is_list = isinstance(value, tuple)
            values = [_longer(item, times) for item in (value if is_list else (value,))]
            changed[each.name] = tuple(values) if is_list else values[0]
    return replace(settings, **changed)


def _longer(value: float, times: float) -> float:
    """A number of epochs or steps; whole ones stay whole."""
    return max(1, round(value * times)) if isinstance(value, int) else value * times


def steps_of_epochs() -> Callable[[Config], int]:
    """A function from a config to its steps in an epoch; each set of images is opened once."""
    known: dict[str, int] = {}

    def of(config: Config) -> int:
        key = json.dumps(to_dict(config.data), sort_keys=True)
        if key not in known:
            known[key] = steps_per_epoch(open_source(config.data, "train"), config.data)
        return known[key]

    return of


def _reference(key: str, config: CompareConfig) -> str:
    """The group whose work is the budget of a group: of its length, and of the first values."""
    own = json.loads(key)
    axes = {name: config.all_axes[name] for name in own}
    wanted = {name: own[name] if name in LENGTHS else axes[name][0] for name in own}
    if config.budget_of:
        values = {written(value): (name, value) for name in own for value in axes[name]}
        name, value = values[config.budget_of]
        wanted[name] = value
    return json.dumps(wanted)


def _digest(config: Config) -> str:
    """Of all that a step's cost depends on, and more."""
    settings = checkpoint.fingerprint(replace(config, seed=0))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, budget: str) -> dict[str, float]:
    """Digest -> cost of a step, as far as they are known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        groups = content["groups"] if content["budget"] == budget else []
        return {each["key"]: float(each["cost"]) for each in groups}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to measure again") from error


def _costs(
    configs: Mapping[str, Config], budget: str, known: Mapping[str, float]
) -> dict[str, float]:
    """Digest -> cost of a step of each config."""
    distinct = {_digest(config): config for config in configs.values()}
    missing = {key: own for key, own in distinct.items() if key not in known}
    if budget == "steps":
        return {**known, **dict.fromkeys(missing, 1.0)}
    return {**known, **(flops_of_steps if budget == "flops" else _seconds)(missing)}


def flops_of_steps(configs: Mapping[str, Config]) -> dict[str, float]:
    """Count floating-point operations of a step, as each run's own result does."""
    found = {}
    for key, config in configs.items():
        model = model_on(config, torch.device("cpu"))
        counted = measure_flops(model, config, open_source(config.data, "val"))
        operations = counted["flops_forward"] + counted["flops_backward"]
        found[key] = float(operations * config.data.batch_size)
    return found


def _seconds(configs: Mapping[str, Config]) -> dict[str, float]:
    """Seconds of a step on this machine, measured in turns."""
    if not configs:
        return {}
    base = next(iter(configs.values()))
    rows = bench_step(base, [], variants=configs)["regimes"]
    return {key: float(rows[key]["seconds_per_step"]) for key in configs}
