"""Read a comparison folder: ``comparison.json`` and the ``result.json`` of each run."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim.core.errors import UserError, setting_error
from mim.core.public import public, public_text
from mim.core.settings import flatten
from mim.report.status import (
    ODD,
    UNREADABLE,
    Progress,
    is_unfinished,
    read_progress,
    why_unreadable,
)

FORMAT = 1
REFERENCES = {"untrained": "untrained encoder", "pixels": "raw pixels"}
"""Kinds of the reference rows and how tables call them."""
GIVEN = "given"
"""Kind of the encoders that came from elsewhere; tables call each by its name."""

RULES = (
    *("evaluations", "primary", "margin", "against", "seeds"),
    *("budget", "budget_of", "tune", "components"),
)
"""Keys of ``comparison.json`` that say how a comparison is made and decided."""

LOSSES = ("train_loss", "val_loss")
COSTS = (
    "encoder_tokens",
    "flops_forward",
    "flops_backward",
    "train_flops",
    "images_per_second",
    "peak_memory_bytes",
    "wall_seconds",
    "steps",
    "epochs",
)
"""Measures of a run besides its evaluations; ``train_flops`` is derived here."""

# What changes the meaning of a loss, so that two losses cannot be compared.
_TASK = ("model.target", "mask", "data", "model.backbone_args.patch_size")
_NOT_TASK = ("data.batch_size", "data.workers", "data.path", "data.download")
# Parts of a dotted key that say nothing to a reader of a table.
_SECTIONS = {"model", "optim", "train", "data", "log", "backbone_args"}


@dataclass(frozen=True)
class Run:
    """One ``result.json``."""

    folder: Path
    name: str
    kind: str
    """``run``, or one of the references: ``untrained``, ``pixels``, ``given``."""
    axes: dict[str, Any]
    seed: int
    status: str
    """``finished``, ``failed``; without a result ``waiting``, ``running``, ``stopped``; and
    ``unreadable``."""
    error: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    """Finite numbers only; evaluations under ``evaluation.measure``."""
    environment: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    protocols: dict[str, Any] = field(default_factory=dict)
    """Evaluation -> what its numbers depend on."""
    evaluated: float = 0.0
    """Seconds of its evaluations, in the call that measured them last."""
    shared: bool = False
    """Whether its first steps are those of a shorter run."""
    progress: Progress | None = None
    """Of a run without a result."""
    placed: bool = True
    """Whether its axes are known."""

    @property
    def finished(self) -> bool:
        """Whether the run ended well and its measures count."""
        return self.status == "finished"

    @cached_property
    def answers(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Evaluation -> ``sample_ids``, ``labels`` and measures, an answer for each test image."""
        found: dict[str, dict[str, NDArray[Any]]] = {}
        arrays = read_arrays(self.folder / "predictions.npz", "predictions") or {}
        for name, array in arrays.items():
            evaluation, _, key = name.partition("/")
            found.setdefault(evaluation, {})[key] = array
        return found


@dataclass(frozen=True)
class Group:
    """The runs that differ in nothing but the seed."""

    label: str
    kind: str
    axes: dict[str, Any]
    """The axes without the seed."""
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that count."""
        return tuple(run for run in self.runs if run.finished)

    @property
    def config(self) -> dict[str, Any]:
        """The config of the first run that has one."""
        return next((run.config for run in self.runs if run.config), {})

    @cached_property
    def task(self) -> str:
        """All that gives a loss its meaning, as text: equal where losses can be compared."""
        settings = flatten(self.config) | flatten(self.axes)
        parts = tuple(f"{part}." for part in _TASK)
        task = {
            key: value
            for key, value in settings.items()
            if (key in _TASK or key.startswith(parts)) and key not in _NOT_TASK
        }
        patch = re.search(r"patch(\d+)", str(settings.get("model.backbone", "")))
        return json.dumps([patch and patch[0], task], sort_keys=True)

    def values(self, key: str) -> dict[int, float]:
        """seed -> value of a measure, over the finished runs that have it."""
        return {run.seed: run.measures[key] for run in self.finished if key in run.measures}


@dataclass(frozen=True)
class Comparison:
    """Everything the report is made of."""

    folder: Path
    name: str
    command: str
    base: dict[str, Any]
    axes: dict[str, list[Any]]
    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    """Groups of pre-training runs, in the order of the comparison."""
    references: tuple[Group, ...]
    """Groups of reference rows; at least one of each kind, perhaps without runs."""
    rules: dict[str, Any] = field(default_factory=dict)
    """How it is decided: :data:`RULES` and their values, as far as they were given."""

    @property
    def evaluation_keys(self) -> list[str]:
        """``evaluation.measure`` of every run, in order of appearance."""
        keys = (key for run in self.runs for key in run.measures)
        known = {*LOSSES, *COSTS}
        return list(dict.fromkeys(key for key in keys if key not in known))

    def reference(self, group: Group, kind: str) -> Group | None:
        """The reference of one kind that belongs to a group: its axes, if any, are the group's."""
        found = (
            self._references[names].get((kind, *(show_value(group.axes.get(n)) for n in names)))
            for names in self._references
        )
        return next((reference for reference in found if reference is not None), None)

    @cached_property
    def _references(self) -> dict[tuple[str, ...], dict[tuple[str, ...], Group]]:
        """Names of axes -> kind and values of these axes -> reference; a look-up instead of a
        search where there are as many references as groups."""
        found: dict[tuple[str, ...], dict[tuple[str, ...], Group]] = {}
        for reference in self.references:
            if reference.runs:
                values = (show_value(value) for value in reference.axes.values())
                own = found.setdefault(tuple(reference.axes), {})
                own.setdefault((reference.kind, *values), reference)
        return found


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison folder.

    Raises:
        UserError: if a file is missing, unreadable or of another format.
    """
    path = folder / "comparison.json"
    if not path.is_file():
        reason = "is not a comparison folder (it holds no comparison.json)"
        inside = sorted(str(found.parent) for found in folder.glob("*/comparison.json"))
        if inside:
            reason += f"; {', '.join(inside[:3])} {'is one' if len(inside) == 1 else 'are'}"
        raise UserError(f"{folder}: {reason}")
    written = _read_json(path)
    apart = _twins(written.get("axes", {}))
    content = public(written, apart)
    names = written.get("runs", [])
    plans = {item["folder"]: item for item in content.get("planned", [])}
    axes, base = content.get("axes", {}), content.get("base", {})
    runs = tuple(_read_run(folder / name, base, plans.get(name), apart) for name in names)
    labels = axis_labels(without_seed(axes))
    groups = _group([run for run in runs if run.kind == "run"], labels, base)
    references = [
        group
        for kind in REFERENCES
        for group in _group([run for run in runs if run.kind == kind], labels, base)
        or [Group(REFERENCES[kind], kind, {}, ())]
    ]
    references += [
        Group(run.name.removeprefix(f"{GIVEN},"), GIVEN, {}, (run,))
        for run in runs
        if run.kind == GIVEN
    ]
    return Comparison(
        folder=folder,
        name=str(content.get("name", folder.name)),
        command=str(content.get("command", "")),
        base=base,
        axes=axes,
        runs=runs,
        groups=tuple(groups),
        references=tuple(references),
        rules={key: content[key] for key in RULES if content.get(key)},
    )


def read_metrics(run: Run) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``; empty where there is none.

    Raises:
        UserError: if a line is not JSON. Only a last line that a kill cut short is left out.
    """
    path = run.folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            rows.append(row)
        except ValueError as error:
            if number == len(lines):  # no line end: the writer was stopped in the middle
                break
            raise UserError(f"{path}: line {number} is not JSON ({error})") from error
    return rows


def read_arrays(
    path: Path, what: str, keys: Sequence[str] | None = None
) -> dict[str, NDArray[Any]] | None:
    """The arrays of an ``.npz`` file; None where there is none.

    Args:
        path: the file.
        what: what it holds, for the message of an error.
        keys: of the arrays; by default all.

    Raises:
        UserError: if the file or an array in it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in keys or file.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as {what} ({error})") from error


def axis_labels(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> what tables call it: ``model.regime.name`` is "regime", ``mask.ratio`` "mask
    ratio". Keys whose labels would be the same keep their dots."""
    labels = {}
    for key in keys:
        parts = key.split(".")
        if parts[-1] == "name" and len(parts) > 1:
            words = parts[-2:-1]
        else:
            words = [part for part in parts[-2:-1] if part not in _SECTIONS] + parts[-1:]
        labels[key] = " ".join(words).replace("_", " ")
    texts = list(labels.values())
    return {key: text if texts.count(text) == 1 else key for key, text in labels.items()}


def show_value(value: Any) -> str:
    """A setting as a user would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def same_task(groups: Iterable[Group]) -> bool:
    """Whether the losses of groups mean the same: same target, masks, data and patch size."""
    return len({group.task for group in groups if group.config}) <= 1


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    if content.get("format") != FORMAT:
        reason = f"is not the format this version reads, {FORMAT}"
        raise setting_error(f"{path}: format", content.get("format"), reason)
    return content


def _twins(axes: Mapping[str, list[Any]]) -> set[str]:
    """The values of axes that would have the same name without the folders they lie in."""
    found = set()
    for values in axes.values():
        names = [public(value) for value in values]
        found |= {v for v in values if isinstance(v, str) and names.count(public(v)) > 1}
    return found


def _read_run(
    folder: Path,
    base: Mapping[str, Any],
    plan: Mapping[str, Any] | None = None,
    apart: Collection[str] = (),
) -> Run:
    """A run, whatever its files hold: what cannot be read is said in its place."""
    known = plan or {}
    kind = str(known.get("kind", "run"))
    begun = Run(
        folder,
        folder.name,
        kind,
        known.get("axes") or {},
        int(known.get("seed") or 0),
        UNREADABLE,
        placed=plan is not None,
    )
    try:
        path = folder / "result.json"
        result = _read_json(path) if path.is_file() else {}
        if is_unfinished(result):
            progress = read_progress(folder)
            measures = read_measures(result, {}) if result else {}
            status, reason = progress.status, progress.reason
            reason = public_text(reason)
            return replace(begun, status=status, error=reason, measures=measures, progress=progress)
        return _with_result(path, public(result, apart), base)
    except ODD as error:
        return replace(begun, error=public_text(why_unreadable(folder, error)))


def _with_result(path: Path, result: Mapping[str, Any], base: Mapping[str, Any]) -> Run:
    folder = path.parent
    kind = str(result.get("kind", "run"))
    if kind not in ("run", GIVEN, *REFERENCES):
        reason = f"is not one of run, {', '.join(REFERENCES)}, {GIVEN}"
        raise setting_error(f"{path}: kind", kind, reason)
    config = result.get("config") or {}
    axes = result.get("axes") or {}
    return Run(
        folder=folder,
        name=str(result.get("name", folder.name)),
        kind=kind,
        axes=axes,
        seed=int(result.get("seed", axes.get("seed", 0)) or 0),
        status=str(result.get("status", "finished")),
        error=str(result.get("error") or ""),
        config=config,
        measures=read_measures(result, config or base),
        environment=result.get("environment") or {},
        data=result.get("data") or {},
        protocols=result.get("protocols") or {},
        evaluated=float((result.get("seconds") or {}).get("evaluate", 0.0)),
        shared="shared" in result,
    )


def read_measures(result: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a result; evaluations under ``evaluation.measure``."""
    found: dict[str, Any] = {key: result.get(key) for key in (*LOSSES, *COSTS)}
    for evaluation, numbers in (result.get("evaluations") or {}).items():
        found |= {f"{evaluation}.{key}": value for key, value in numbers.items()}
    flops = (found["flops_forward"], found["flops_backward"], found["steps"])
    batch = flatten(config).get("data.batch_size")
    if _is_number(batch) and all(_is_number(value) for value in flops):
        found["train_flops"] = (flops[0] + flops[1]) * flops[2] * batch
    return {key: value for key, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _group(runs: list[Run], labels: Mapping[str, str], base: Mapping[str, Any]) -> list[Group]:
    members: dict[str, list[Run]] = {}
    for run in runs:
        if run.placed:  # the list of runs without a result shows the others
            key = json.dumps(without_seed(run.axes), sort_keys=True)
            members.setdefault(key, []).append(run)
    groups = []
    for group in members.values():
        axes = without_seed(group[0].axes)
        label = group_label(axes, labels)
        kind = group[0].kind
        if kind != "run":
            label = f"{REFERENCES[kind]} ({label})" if label else REFERENCES[kind]
        elif not label:
            settings = flatten(group[0].config or base)
            label = str(settings.get("model.regime.name", "pre-trained"))
        groups.append(Group(label, kind, axes, tuple(group)))
    return groups


def without_seed(axes: Mapping[str, Any]) -> dict[str, Any]:
    """The axes on which groups lie."""
    return {key: value for key, value in axes.items() if key != "seed"}


def group_label(axes: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """What tables call the group at a place on the axes."""
    parts = []
    for key, value in axes.items():
        # The name of a component or of a variant says what it is; a bare number does not.
        prefix = "" if key.endswith(".name") or key == "variant" else f"{labels.get(key, key)} "
        parts.append(f"{prefix}{show_value(value)}")
    return " · ".join(parts)
