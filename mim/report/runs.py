"""Run folders on disk: find them, filter them, tell two apart."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mim.core.errors import UserError, choice_error
from mim.core.files import parse_yaml
from mim.core.settings import flatten
from mim.report.status import (
    ODD,
    UNREADABLE,
    is_unfinished,
    last_metrics,
    read_progress,
    read_yaml,
    why_unreadable,
)

_CONDITION = re.compile(r"([A-Za-z_][\w.]*)(<=|>=|!=|=|<|>)(.*)")
# Facts of a result beside its evaluations, as one reads them.
_MEASURES = (
    *("steps", "epochs", "train_loss", "val_loss", "encoder_tokens", "flops_forward"),
    *("flops_backward", "images_per_second", "peak_memory_bytes", "wall_seconds"),
)


@dataclass(frozen=True)
class FoundRun:
    """One run folder."""

    folder: Path
    status: str
    kind: str = "run"
    error: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted keys."""
    measures: dict[str, Any] = field(default_factory=dict)
    """Numbers of the result; evaluations as ``linear.accuracy``."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Environment and data of the result, with dotted keys."""

    @property
    def values(self) -> dict[str, Any]:
        """Everything a filter can name."""
        own = {"status": self.status, "kind": self.kind, "name": self.folder.name}
        return {**self.config, **self.facts, **self.measures, **own}


def read_run(folder: Path) -> FoundRun:
    """What a run folder says of itself.

    Raises:
        UserError: if it is no run folder, or a file in it cannot be read.
    """
    if not _is_run(folder):
        raise UserError(f"{str(folder)!r} is no run folder: no config.yaml and no result.json")
    try:
        return _read(folder)
    except ODD as error:
        raise UserError(why_unreadable(folder, error)) from error


def _read(folder: Path) -> FoundRun:
    result = _read_result(folder / "result.json")
    path = folder / "config.yaml"
    config = flatten(read_yaml(path) if path.is_file() else result.get("config") or {})
    measures = {key: result[key] for key in _MEASURES if result.get(key) is not None}
    for name, numbers in (result.get("evaluations") or {}).items():
        measures |= {f"{name}.{k}": v for k, v in numbers.items() if isinstance(v, (int, float))}
    if is_unfinished(result):
        progress = read_progress(folder)
        last = last_metrics(folder)
        names = {"loss": "train_loss", "val_loss": "val_loss", "step": "steps", "epoch": "epochs"}
        measures |= {name: last[key] for key, name in names.items() if key in last}
        return FoundRun(folder, progress.status, "run", progress.reason, config, measures)
    sections = {name: result.get(name) for name in ("environment", "data")}
    facts = flatten({name: section for name, section in sections.items() if section})
    status, kind = str(result.get("status", "finished")), str(result.get("kind", "run"))
    return FoundRun(folder, status, kind, str(result.get("error") or ""), config, measures, facts)


def _read_result(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _is_run(folder: Path) -> bool:
    if (folder / "comparison.json").is_file():
        return False
    return (folder / "config.yaml").is_file() or (folder / "result.json").is_file()


def find_runs(root: Path, where: Sequence[str] = ()) -> list[FoundRun]:
    """All run folders in and below a folder, sorted by path; one that cannot be read says why.

    Args:
        root: where to look.
        where: conditions that all hold: ``model.regime.name=zero``, ``linear.accuracy>0.8``,
            ``status=failed``; a run without the key does not meet one.

    Raises:
        UserError: for a folder that is not there, a condition that cannot be read, or a key that
            no run has.
    """
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is no folder")
    conditions = [_condition(text) for text in where]
    found = []
    for place, folders, _ in os.walk(root):
        folders.sort()
        if _is_run(Path(place)):
            folders.clear()
            try:
                found.append(read_run(Path(place)))
            except UserError as error:
                found.append(FoundRun(Path(place), UNREADABLE, error=str(error)))
    known = {key for run in found for key in run.values}
    for key, _, _ in conditions:
        if found and key not in known:
            raise choice_error("--where", key, known)
    return [run for run in found if all(_holds(run, *condition) for condition in conditions)]


def _condition(text: str) -> tuple[str, str, Any]:
    match = _CONDITION.fullmatch(text)
    if not match:
        raise UserError(f"--where: {text!r} has not the form KEY=VALUE (or !=, <, <=, >, >=)")
    try:
        return match[1], match[2], parse_yaml(match[3])
    except yaml.YAMLError as error:
        raise UserError(f"--where: {match[3]!r} cannot be read as a value") from error


def _holds(run: FoundRun, key: str, sign: str, wanted: Any) -> bool:
    if key not in run.values:
        return False
    value = run.values[key]
    if sign in ("=", "!="):
        return (value == wanted) == (sign == "=")
    if not all(isinstance(number, (int, float)) for number in (value, wanted)):
        raise UserError(f"--where: {key} is {value!r} in {run.folder}, which has no order")
    return {
        "<": value < wanted, "<=": value <= wanted, ">": value > wanted, ">=": value >= wanted,
    }[sign]  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ."""

    section: str
    """``config``, ``result``, ``data`` or ``environment``."""
    key: str
    first: Any
    second: Any
    """None where a run has no such value."""

    @property
    def change(self) -> float | None:
        """Second minus first; none unless both are numbers of a result."""
        numbers = [
            value
            for value in (self.first, self.second)
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        if self.section != "result" or len(numbers) < 2:
            return None
        try:
            return float(numbers[1]) - float(numbers[0])
        except OverflowError:  # of a file that no run wrote
            return None


def diff_runs(first: FoundRun, second: FoundRun) -> list[Difference]:
    """What differs between two runs: settings, data, environment, results; but not their place."""
    one, other = _all_values(first), _all_values(second)
    order = {"config": 0, "data": 1, "environment": 1, "result": 2}
    keys = sorted(dict.fromkeys([*one, *other]), key=lambda key: order[key[0]])
    return [
        Difference(*key, one.get(key), other.get(key))
        for key in keys
        if one.get(key) != other.get(key)
    ]


def _all_values(run: FoundRun) -> dict[tuple[str, str], Any]:
    """(section, key) -> value, without the place of the run."""
    found = {("config", k): v for k, v in run.config.items() if k not in ("output", "resume")}
    for key, value in run.facts.items():
        section, _, rest = key.partition(".")
        found[section, rest] = value
    return found | {("result", k): v for k, v in {"status": run.status, **run.measures}.items()}


_MISSING = "\u2013"


def listing(
    runs: Sequence[FoundRun], root: Path, more: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of a list of runs; accuracies in percent, as in the reports.

    Args:
        runs: of :func:`find_runs`.
        root: paths are shown from here.
        more: keys of more columns.

    Raises:
        UserError: for a key that no run has.
    """
    known = {key for run in runs for key in run.values}
    for key in more:
        if runs and key not in known:
            raise choice_error("--show", key, known)
    settings = {
        "regime": "model.regime.name", "mask": "mask.name", "ratio": "mask.ratio", "seed": "seed",
        "steps": "steps", "held-out loss": "val_loss",
    }  # fmt: skip
    accuracies = list(
        dict.fromkeys(key for run in runs for key in run.measures if key.endswith(".accuracy"))
    )
    heads = ["run", "state", *settings, *(f"{key} (%)" for key in accuracies), *more, "reason"]
    rows = []
    for run in runs:
        values = run.values
        row = [str(run.folder.relative_to(root)), run.status]
        for key in settings.values():
            # An evaluation of raw pixels has a config and no regime.
            plain = run.kind in ("run", "given") or key in ("seed", "steps", "val_loss")
            row.append(_show(values.get(key)) if plain else _MISSING)
        for key in accuracies:
            row.append(f"{100 * values[key]:.1f}" if key in values else _MISSING)
        row += [_show(values.get(key)) for key in more]
        rows.append([*row, run.error])
    return heads, rows


def as_json(run: FoundRun) -> dict[str, Any]:
    """A run for scripts."""
    return {
        "folder": str(run.folder), "status": run.status, "kind": run.kind, "reason": run.error,
        "config": run.config, "facts": run.facts, "measures": run.measures,
    }  # fmt: skip


def diff_rows(differences: Sequence[Difference]) -> list[list[str]]:
    """Differences as cells: part, key, both values, and the change of a number."""
    rows = []
    for item in differences:
        change = "" if item.change is None else f"{item.change:+.4g}"
        rows.append([item.section, item.key, _show(item.first), _show(item.second), change])
    return rows


def _show(value: Any) -> str:
    if value is None:
        return _MISSING
    return f"{value:.5g}" if isinstance(value, float) else str(value)
