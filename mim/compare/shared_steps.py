"""First steps that runs of several lengths share: trained once, by the shortest of them.

Under a rate that stays until it cools down (``optim.schedule: {shape: constant, cooldown: 0.2}``) a
long run does the same as a short one until the latter cools down. It therefore begins with the
checkpoint that the short one keeps from there, and ends with the weights of a run trained alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mim.compare.budget import LENGTHS, steps_of_epochs
from mim.compare.plan import Planned
from mim.core.config import Config
from mim.core.lock import sole_use
from mim.core.progress import note
from mim.core.schedule import Schedule
from mim.core.settings import read_mapping
from mim.training import checkpoint
from mim.training.optim import build_schedule
from mim.training.pretrain import SUBSETS, total_steps

_FILE = "shared.json"


def with_shared_steps(planned: list[Planned]) -> list[Planned]:
    """The plan, with the shorter runs that each run may begin with, the longest first."""
    epoch = steps_of_epochs()
    families: dict[str, list[tuple[Planned, tuple[Schedule, ...]]]] = {}
    for item in planned:
        if item.kind == "run" and item.config.optim.schedule.cooldown:
            family = families.setdefault(_but_length(item.config), [])
            family.append((item, _courses(item.config, epoch(item.config))))
    begins = {}
    for family in families.values():
        for item, own in family:
            shared = [(other.folder, _shared(own, courses)) for other, courses in family]
            found = sorted((each for each in shared if each[1]), key=lambda each: -each[1])
            begins[item.folder] = tuple(found)
    return [replace(item, begins_with=begins.get(item.folder, ())) for item in planned]


def _but_length(config: Config) -> str:
    settings = checkpoint.fingerprint(config)
    return json.dumps({key: settings[key] for key in settings if key not in LENGTHS})


def _courses(config: Config, per_epoch: int) -> tuple[Schedule, ...]:
    """All that moves with the steps of a run, the learning rate first."""
    length = (total_steps(config, per_epoch), per_epoch)
    optim, model = config.optim, config.model
    return (
        build_schedule(optim, config.data.batch_size, *length),
        optim.decay_schedule.build(optim.weight_decay, *length),
        model.teacher_schedule.build(model.teacher_decay, *length),
    )


def _shared(own: tuple[Schedule, ...], shorter: tuple[Schedule, ...]) -> int:
    """The steps that a run has in common with a shorter one; 0 where it is not shorter."""
    steps = shorter[0].cools_from
    if steps is None or shorter[0].total >= own[0].total:
        return 0
    return steps if all(map(partial(_same_until, steps), own, shorter)) else 0


def _same_until(steps: int, one: Schedule, other: Schedule) -> bool:
    spans_all = one.shape in ("linear", "cosine") and one.length is None
    begun = (each.cools_from for each in (one, other))
    cools = any(step is not None and step < steps for step in begun)
    alike = replace(one, total=0, cooldown=0) == replace(other, total=0, cooldown=0)
    return alike and not spans_all and not cools


def take_shared_steps(item: Planned) -> dict[str, Any]:
    """Give a run that has not begun the longest beginning that there is.

    Returns:
        What the run's result says of it: the other run, and how many steps; {} without one.

    Raises:
        UserError: if the checkpoint cannot be read.
        InUse: if another process computes the run.
    """
    run = Path(item.config.output)
    if not checkpoint.checkpoints(run):
        (run / _FILE).unlink(missing_ok=True)
        for folder, steps in item.begins_with:
            path = checkpoint.path_of(run.with_name(folder), steps)
            if path.is_file():
                checkpoint.prepare_folder(run)
                with sole_use(run):
                    _begin(item, path, {"run": folder, "steps": steps})
                note(f"{item.folder}: begins with the first {steps:,} steps of {folder}")
                break
    return {"shared": read_mapping(run / _FILE)} if (run / _FILE).is_file() else {}


def _begin(item: Planned, path: Path, shared: dict[str, Any]) -> None:
    run, other = Path(item.config.output), path.parents[1]
    state = checkpoint.read_checkpoint(path)
    state["fingerprint"] = json.dumps(checkpoint.fingerprint(item.config))
    for name in ("metrics.jsonl", *SUBSETS):
        if (other / name).is_file():
            shutil.copyfile(other / name, run / name)
    checkpoint.write_config(run, item.config)
    checkpoint.write_json_atomic(run / _FILE, shared)
    checkpoint.save_checkpoint(run, state, shared["steps"], item.config.train.keep_checkpoints)
