"""What a comparison is to run: one config for each combination of the axes, and the references."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mim.compare.halving import VAL_LOSS, TuneRule, check_values, tune_rule
from mim.compare.sequential import SeedRule
from mim.core.config import Config, MeasuredConfig
from mim.core.errors import UserError, choice_error, setting_error
from mim.core.fields import Settings, build
from mim.core.fingerprints import check_images
from mim.core.plugins import beside, keep_plugins
from mim.core.settings import leaves, read_args, to_dict
from mim.data import open_source, steps_per_epoch
from mim.evaluate import (
    EVALUATIONS,
    AnyEvaluation,
    Evaluation,
    build_evaluation,
    check_files,
)
from mim.training import checkpoint
from mim.training.settings import load_config

VARIANT = "variant"
Budget = Literal["epochs", "steps", "flops", "seconds"]
_AXES = {"model.regime.name": ["drop", "zero", "token"], "seed": [0]}
RULES = (
    *("evaluations", "primary", "margin", "against", "seeds"),
    *("budget", "budget_of", "tune"),
)
"""Settings that say how a comparison is decided; ``comparison.json`` holds them."""


@dataclass(frozen=True)
class CompareConfig(Settings):
    """A comparison: a base config, the axes that vary, and the evaluations."""

    output: str = "runs/compare"
    """The comparison folder; holds a folder for each run."""
    name: str = "comparison"
    """Title of the report."""
    axes: dict[str, Any] = field(default_factory=lambda: dict(_AXES))
    """Dotted config keys and the values each takes; every combination is a run."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """One more axis, of settings that change together: a name and its dotted keys."""
    evaluations: dict[str, Any] = field(default_factory=lambda: {"linear": {}, "knn": {}})
    """Evaluations and their settings; empty for images without labels."""
    references: list[str] = field(default_factory=list)
    """Run folders, imported ones above all, whose encoders are evaluated on the same images and
    stand in the tables beside the runs; nothing is trained for them."""
    primary: str = ""
    """What decides: an evaluation, or one of its numbers (knn.accuracy); by default the first
    evaluation."""
    margin: float = 1.0
    """Points within which two groups are as good as each other."""
    against: str = ""
    """The group that all others are compared with, by its value on an axis; by default all pairs
    are compared."""
    seeds: dict[str, Any] = field(default_factory=dict)
    """Seeds until the primary measure is decided, in the place of the axis seed:
    {least: 3, most: 20, until: decided}."""
    budget: Budget = "epochs"
    """What all groups have in common: epochs, steps, training FLOPs (flops) or seconds of training
    by a measured rate. For the last three the group of budget_of trains as long as its config says,
    and the steps of every other one, with its schedules, follow from it."""
    budget_of: str = ""
    """The group whose work is the budget, by its value on an axis; by default the first value of
    each axis."""
    tune: dict[str, Any] = field(default_factory=dict)
    """Settings that are chosen for each group before the comparison, by successive halving on seeds
    of their own and a part of the training images: {optim.base_lr: [2e-3, 4e-3, 8e-3]}. Also budget
    (runs of full length for each group; by default as many as candidates), by (linear.accuracy or
    val_loss; by default the primary measure), over (the axes whose values each get their own; by
    default all) and holdout (share of the training images that decides, 0.2)."""
    base: Config = field(default_factory=Config)
    """What all runs share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds:
            self._check_seeds()
        if self.primary and self.primary.partition(".")[0] not in self.evaluations:
            raise choice_error("primary", self.primary, self.evaluations)
        if self.margin <= 0:
            raise setting_error("margin", self.margin, "must be above 0")
        for key, values in self.axes.items():
            hint = """; write --axes '{"mask.ratio": [0.5, 0.75]}'"""
            check_values(f"axes.{key}", values, hint if isinstance(values, dict) else "")
            self._check_key("axes", key)
        for name, settings in self.variants.items():
            setting = f"variants.{name}"
            if not isinstance(settings, dict):
                raise setting_error(setting, settings, "must map dotted keys to values")
            for key in settings:
                self._check_key(setting, key)
                if key in self.axes:
                    hint = "; write axes: {seed: [0]}" if self.axes == _AXES else ""
                    raise setting_error(setting, key, f"is an axis already{hint}")
        if self.tune:
            self._check_tune()

    def _check_tune(self) -> None:
        rule = self.tune_rule
        assert rule is not None
        varied = {*self.axes, *(key for own in self.variants.values() for key in own)}
        for key in rule.grid:
            self._check_key("tune", key)
            if key in varied:
                raise setting_error("tune", key, "is an axis already")
        for key in rule.over or ():
            if key not in self.all_axes or key == "seed":
                raise choice_error("tune.over", key, [k for k in self.all_axes if k != "seed"])
        name = rule.by.partition(".")[0]
        if rule.by == VAL_LOSS:
            for key in rule.grid:
                if key.startswith(("mask.", "data.", "model.target")):
                    raise setting_error("tune.by", rule.by, f"means another thing under each {key}")
        elif name not in self.evaluations:
            raise choice_error("tune.by", name, [*self.evaluations, VAL_LOSS])
        elif not issubclass(EVALUATIONS.get(name), Evaluation):
            reason = "is no probe of frozen features; choose one, or val_loss"
            raise setting_error("tune.by", rule.by, reason)

    def _check_key(self, setting: str, key: str) -> None:
        known = leaves(Config)
        if key not in known and not key.startswith("model.backbone_args."):
            raise choice_error(setting, key, known)
        if key in ("output", "resume"):
            raise setting_error(setting, key, "cannot vary: each run has its own folder")

    def _check_seeds(self) -> None:
        build(SeedRule, self.seeds, "seeds")
        if not self.evaluations:
            raise setting_error("seeds", self.seeds, "needs an evaluation that decides")
        if "_per_class" in self.decides:
            reason = "is drawn, and bounds for seeds until decided know no draws; name axes.seed"
            raise setting_error("primary", self.primary, reason)
        if self.axes.get("seed", [0]) != [0]:
            raise setting_error("axes.seed", self.axes["seed"], "cannot stand beside seeds")

    @property
    def seed_rule(self) -> SeedRule | None:
        """How seeds are added; None where the axis seed names them."""
        return build(SeedRule, self.seeds, "seeds") if self.seeds else None

    @property
    def tune_rule(self) -> TuneRule | None:
        """How settings are chosen; None where none are."""
        if not self.tune:
            return None
        rule = tune_rule(self.tune)
        return replace(rule, by=self._measure(rule.by) if rule.by else self.decides or VAL_LOSS)

    @property
    def decides(self) -> str:
        """The primary measure, as knn.accuracy; empty where nothing is evaluated."""
        return self._measure(self.primary or next(iter(self.evaluations), ""))

    def _measure(self, wanted: str) -> str:
        """The first measure of an evaluation that is named alone."""
        if wanted not in self.evaluations:
            return wanted
        return f"{wanted}.{build_evaluation(wanted, self.evaluations[wanted]).measures()[0]}"

    @property
    def all_axes(self) -> dict[str, list[Any]]:
        """The axes; first the names of the variants, where there are any."""
        axes = {VARIANT: list(self.variants), **self.axes} if self.variants else self.axes
        rule = self.seed_rule
        return {**axes, "seed": list(range(rule.most))} if rule else axes

    def settings_of(self, axes: dict[str, Any]) -> dict[str, Any]:
        """Dotted keys and values that a run's place on the axes stands for."""
        plain = {key: value for key, value in axes.items() if key != VARIANT}
        return {**self.variants.get(axes.get(VARIANT, ""), {}), **plain}


@dataclass(frozen=True)
class Planned:
    """One run of a comparison, or a reference."""

    folder: str
    """Name of its folder."""
    kind: str
    """``run``, ``untrained``, ``pixels`` or ``given``."""
    axes: dict[str, Any]
    """Dotted key -> value."""
    config: Config
    """Of the run; ``output`` is its folder."""
    given: str = ""
    """Of kind ``given``: the run folder whose encoder is evaluated."""
    begins_with: tuple[tuple[str, int], ...] = ()
    """Folders of shorter runs, and how many first steps each has in common with this one."""


def label_of(axes: dict[str, Any]) -> str:
    """A folder name: the last part of each key that tells something, and its value."""
    parts = []
    for key, value in axes.items():
        words = [word for word in key.split(".") if word not in ("name", "model")]
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
        parts.append(f"{words[-1] if words else key}={safe}")
    label = ",".join(parts) or "run"
    encoded = label.encode(errors="replace")
    if len(encoded) > 120:  # file systems end at 255 bytes
        begin = encoded[:100].decode(errors="ignore")  # it may end within a character
        label = f"{begin}-{hashlib.sha256(encoded).hexdigest()[:12]}"
    return label


def vary(base: Config, axes: dict[str, Any], output: Path) -> Config:
    """A config with other values of dotted keys and a folder of its own, checked."""
    tree = {**to_dict(base), "output": str(output), "resume": "auto"}
    for key, value in axes.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return load_config(None, tree)


def plan(config: CompareConfig) -> list[Planned]:
    """All runs and references, in order; every run's config is checked.

    The untrained reference stands once for each seed and encoder, raw pixels once.

    Raises:
        UserError: if one of the runs has a config that cannot work, an evaluation cannot be built,
            or a setting names a measure or a group that there is not.
    """
    output = Path(config.output)
    planned: list[Planned] = []
    keys = list(config.all_axes)
    for values in itertools.product(*config.all_axes.values()):
        axes = dict(zip(keys, values, strict=True))
        folder = label_of(axes)
        varied = vary(config.base, config.settings_of(axes), output / folder)
        planned.append(Planned(folder, "run", axes, varied))
    if len({item.folder for item in planned}) < len(planned):
        raise UserError("axes: two runs would share a folder; shorten or rename the values")
    built = {name: build_evaluation(name, given) for name, given in config.evaluations.items()}
    _check_names(config, planned, built)
    if config.evaluations:
        planned += list(_references(config, planned, output))
    planned += list(_given(config, output))
    for item in planned:
        if item.kind != "pixels":
            check_files(built, Path(item.config.output))
    return planned


def _check_names(
    config: CompareConfig, runs: list[Planned], built: Mapping[str, AnyEvaluation]
) -> None:
    """Check the names of measures and groups, and what each group makes of the tuned settings."""
    rule = config.tune_rule
    for setting, wanted in (("primary", config.decides), ("tune.by", rule.by if rule else "")):
        evaluation = wanted.partition(".")[0]
        if evaluation in built:
            check_measure(setting, wanted, built[evaluation].measures())
    groups = {key: next(iter(own.values())) for key, own in groups_of(runs).items()}
    values = {written(value) for key in groups for value in json.loads(key).values()}
    for setting, wanted in (("against", config.against), ("budget_of", config.budget_of)):
        if wanted and wanted not in values:
            raise choice_error(setting, wanted, values)
    many = sum(config.against in map(written, json.loads(key).values()) for key in groups)
    if many > 1:
        reason = f"is the value of {many} groups; where several axes vary, compare all pairs"
        raise setting_error("against", config.against, reason)
    for candidate in rule.candidates if rule else ():
        for item in groups.values():
            vary(item.config, candidate, Path(item.config.output))


def check_measure(setting: str, wanted: str, names: Collection[str]) -> None:
    """Refuse a measure, as knn.accuracy, that is none of those of its evaluation.

    Args:
        setting: what names it.
        wanted: the measure; without a name it is not checked.
        names: of the numbers that the evaluation gives; ``*`` stands for more.
    """
    evaluation, _, name = wanted.partition(".")
    if name and not {name, "*"} & {*names}:
        raise choice_error(setting, wanted, [f"{evaluation}.{each}" for each in names])


def written(value: Any) -> str:
    """A value of an axis as its user writes it."""
    return value if isinstance(value, str) else json.dumps(value)


Groups = dict[str, dict[int, Planned]]
"""Group, its axes as JSON -> seed -> run."""


def groups_of(planned: list[Planned]) -> Groups:
    """The runs by all axes but the seed."""
    found: Groups = {}
    for item in planned:
        if item.kind == "run":
            axes = {key: value for key, value in item.axes.items() if key != "seed"}
            found.setdefault(json.dumps(axes), {})[item.config.seed] = item
    return found


def _given(config: CompareConfig, output: Path) -> Iterator[Planned]:
    """The encoders under ``references``, on the images of the base config.

    Raises:
        UserError: if one is no run folder, two have the same name, or nothing is to be evaluated.
    """
    if config.references and not config.evaluations:
        reason = "are evaluated, and no evaluations are named"
        raise setting_error("references", config.references, reason)
    names = [Path(path).resolve().name for path in config.references]
    if len(set(names)) < len(names):
        raise setting_error("references", config.references, "has two folders of one name")
    for name, path in zip(names, config.references, strict=True):
        checkpoint.read_config(path)
        folder = f"given,{name}"
        own = replace(config.base, output=str(output / folder))
        yield Planned(folder, "given", {}, own, str(Path(path).resolve()))


def _references(config: CompareConfig, runs: list[Planned], output: Path) -> Iterator[Planned]:
    """The untrained encoder for each seed and encoder, raw pixels for each set of images."""
    varied = {key for settings in config.variants.values() for key in settings}
    encoder = ("backbone", "backbone_args", "position_embedding")
    kinds = {
        "untrained": ("seed", "model.backbone", "model.position_embedding", "data."),
        "pixels": ("data.",),
    }
    for kind, parts in kinds.items():
        distinct: dict[str, Planned] = {}
        for run in runs:
            tree = to_dict(run.config)
            identity = [tree["data"]]
            if kind == "untrained":
                identity += [run.config.seed, [tree["model"][key] for key in encoder]]
            distinct.setdefault(json.dumps(identity, sort_keys=True), run)
        for run in distinct.values():
            axes = {
                key: value
                for key, value in run.axes.items()
                if any(name.startswith(parts) for name in (varied if key == VARIANT else [key]))
            }
            folder = kind + ("," + label_of(axes) if axes else "")
            yield Planned(folder, kind, axes, replace(run.config, output=str(output / folder)))


def hold_to_images(
    planned: list[Planned], evaluations: Mapping[str, dict[str, Any]]
) -> list[Planned]:
    """Open each distinct data set once, so that its faults show before any training.

    Returns:
        The plan, with the fingerprint of its images in each config: runs that come later are held
        to it, and their numbers depend on it.

    Raises:
        UserError: if images cannot be used, or are not those that a config asks for.
    """
    seen: dict[str, tuple[str, MeasuredConfig]] = {}
    held = []
    for item in planned:
        key = json.dumps(to_dict(item.config.data), sort_keys=True)
        if key not in seen:
            train = open_source(item.config.data, "train")
            val = open_source(replace(item.config.data, measured=train.measured), "val")
            steps_per_epoch(train, item.config.data)
            for name, settings in evaluations.items():
                build_evaluation(name, settings).check(train, val)
            seen[key] = f"{train.fingerprint()}-{val.fingerprint()}", train.measured
        present, measured = seen[key]
        check_images(item.config.data.fingerprint, present)
        data = replace(item.config.data, fingerprint=present, measured=measured)
        held.append(replace(item, config=replace(item.config, data=data)))
    return held


def with_copies(
    planned: list[Planned], config: CompareConfig
) -> tuple[list[Planned], CompareConfig]:
    """Let all runs load the comparison's copies of plug-ins: a later edit reaches none of them.

    Returns:
        The plan, and the comparison as it is written down, with the copies' places in its folder.

    Raises:
        UserError: if a plug-in was edited since the comparison was begun.
    """
    output, own = Path(config.output), config.base.plugins
    kept = keep_plugins(own, output)
    copies = tuple(beside(plugin, output / "compare.yaml") for plugin in kept)
    held = [
        replace(item, config=replace(item.config, plugins=copies))
        if item.config.plugins == own
        else item
        for item in planned
    ]
    return held, replace(config, base=replace(config.base, plugins=kept))


def read_compare_config(args: list[str], **parser_args: Any) -> CompareConfig:
    """The comparison that command-line arguments describe.

    Raises:
        UserError: for an unknown key or a value that is refused.
    """
    return read_args(CompareConfig, args, **parser_args)
