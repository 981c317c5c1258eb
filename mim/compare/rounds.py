"""Which runs of a plan are computed together: all, or a seed at a time until it is decided."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mim.compare.budget import equal_budget
from mim.compare.disagreement import FILE, write_disagreement
from mim.compare.forecast import Forecast
from mim.compare.hours import finished, seconds_left
from mim.compare.plan import CompareConfig, Groups, Planned, groups_of, plan, written
from mim.compare.sequential import next_round
from mim.compare.statistics import is_share
from mim.compare.tune import tuning_lines
from mim.core.progress import note
from mim.core.settings import to_dict
from mim.training.results import read_result


def rounds(planned: list[Planned], config: CompareConfig) -> Iterator[list[Planned]]:
    """The runs and references of each round; the results of one decide about the next."""
    rule = config.seed_rule
    if rule is None:
        yield planned
        return
    groups = groups_of(planned)
    others = [item for item in planned if item.kind != "run"]
    started = dict.fromkeys(groups, 0)
    reference = _reference(groups, config.against)
    margin = config.margin / 100 if is_share(config.decides.partition(".")[2]) else 0.0
    values: dict[str, dict[int, float]] = {}
    while chosen := next_round(values, started, rule, margin, reference):
        seeds = {seed for _, seed in chosen}
        now = [item for item in others if item.kind != "untrained" or item.config.seed in seeds]
        others = [item for item in others if item not in now]
        yield [*(groups[group][seed] for group, seed in chosen), *now]
        for group, seed in chosen:
            started[group] = max(started[group], seed + 1)
        values = values_of(groups, config, started)
    if not any(values.values()):
        note(f"seeds: no run has ended with a {config.decides}, so that none is added")


def _reference(groups: Groups, against: str) -> str | None:
    """The group that has ``against`` as its value on an axis."""
    for group in groups if against else ():
        if against in map(written, json.loads(group).values()):
            return group
    return None


def values_of(
    groups: Groups, config: CompareConfig, started: dict[str, int] | None = None
) -> dict[str, dict[int, float]]:
    """Group -> seed -> the primary measure, of the runs that have finished.

    Args:
        groups: of the plan.
        config: says which measure is the primary one.
        started: group -> how many of its seeds count; by default all.
    """
    evaluation, _, name = config.decides.partition(".")
    found: dict[str, dict[int, float]] = {}
    for group, runs in groups.items():
        own = found.setdefault(group, {})
        for seed, item in runs.items():
            if started is not None and seed >= started[group]:
                continue
            result = read_result(Path(item.config.output))
            value = result.get("evaluations", {}).get(evaluation, {}).get(name)
            if result.get("status") == "finished" and isinstance(value, (int, float)):
                own[seed] = float(value)
    return found


def keep_disagreement(planned: list[Planned], config: CompareConfig) -> None:
    """Keep the test images on which groups disagree, where all groups saw the same images."""
    output = Path(config.output)
    groups = groups_of(planned)
    runs = [item for own in groups.values() for item in own.values()]
    (output / FILE).unlink(missing_ok=True)
    if not config.evaluations or len({json.dumps(to_dict(r.config)["data"]) for r in runs}) != 1:
        return
    folders = {
        group: [Path(item.config.output) for item in own.values()] for group, own in groups.items()
    }
    write_disagreement(output, folders, config.decides.partition(".")[0], runs[0].config.data)


def forecast(config: CompareConfig, jobs: int = 1) -> Forecast:
    """What a comparison will take and show, by its plan and by what has finished of it.

    Raises:
        UserError: as :func:`mim.compare.plan.plan`.
    """
    planned, lengths = equal_budget(plan(config), config, keep=False)
    groups = groups_of(planned)
    done = finished(planned)
    rule = config.seed_rule
    most = max(map(len, groups.values()), default=0)
    seconds, counted = seconds_left(planned, done, config, lengths)
    values = {group: own for group, own in values_of(groups, config).items() if own}
    return Forecast(
        groups=len(groups),
        seeds=(rule.least, rule.most) if rule else (most, most),
        references=sum(item.kind != "run" for item in planned),
        finished=sum(item.folder in done for item in planned if item.kind == "run"),
        seconds=seconds,
        counted=counted,
        jobs=jobs,
        values=values if len(values) > 1 else None,
        scale=100.0 if is_share(config.decides.partition(".")[2]) else 1.0,
        against=bool(config.against),
        more=(
            *(each.line(config.budget) for each in lengths),
            *tuning_lines(planned, config),
        ),
    )
