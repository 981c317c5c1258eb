"""What a comparison decides, measure by measure: differences, verdicts, what could be shown.

The arithmetic is in :mod:`mim.compare.statistics`; here it is applied to the groups of a folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mim.compare.sequential import Progress, SeedRule, family_of, follow, nominal_level
from mim.compare.statistics import (
    LEVEL,
    Design,
    Difference,
    Family,
    Source,
    Spread,
    difference,
    holm,
    item_source,
    p_value,
    pooled_spread,
)
from mim.core.errors import choice_error, setting_error
from mim.report.collect import LOSSES, REFERENCES, Comparison, Group, same_task, show_value
from mim.report.measures import Measure, evaluation_measures, loss_measures

MOST_PAIRED = 16
"""Values of an axis of which every two are set against each other."""
STANDING_ALONE = Family("separate")
_MOST_FORECAST = 40
"""Pairs of which it is worked out what would decide them."""
Kind = Literal["difference", "equal", "undecided", "untested"]


@dataclass(frozen=True)
class Verdict:
    """What is known of two groups by one measure."""

    first: Group
    second: Group
    found: Difference
    kind: Kind
    smallest: float | None = None
    """The smallest true difference that this design shows with 80 % power."""
    needed: int | None = None
    """Seeds that would decide it, were the truth what was seen; None where beyond reckoning."""
    p_equal: float | None = None
    """P-value of the two one-sided tests, adjusted for their number; None where seeds were added
    until decided, since an interval within the margin shows equality then."""

    @property
    def key(self) -> tuple[str, str]:
        """The labels of both groups."""
        return self.first.label, self.second.label

    def __neg__(self) -> Verdict:
        """The same of second and first."""
        return replace(self, first=self.second, second=self.first, found=-self.found)


@dataclass(frozen=True)
class Analysis:
    """One measure of a comparison.

    Attributes:
        measure: how it is printed.
        primary: whether it decides; the others are secondary.
        verdicts: of the pairs that differ in one axis, or with the group of ``against``.
        best: of the group with the best mean, or that of ``against``, with each other one.
        margin: two groups nearer than this are as good as each other, in stored units.
        family: what the intervals hold for at once.
        spread: the residual of all groups; None where there is none.
        looks: how many were taken; 0 where the seeds were fixed.
        mixed: why the rows cannot be compared; empty where they can.
        images: test images behind the intervals for new ones; 0 without.
    """

    measure: Measure
    primary: bool
    verdicts: tuple[Verdict, ...] = ()
    best: tuple[Verdict, ...] = ()
    margin: float = 0.0
    family: Family = STANDING_ALONE
    spread: Spread | None = None
    looks: int = 0
    mixed: str = ""
    images: int = 0

    @property
    def pooled(self) -> bool | None:
        """Whether one spread stands for all groups; None where there is none."""
        return None if self.spread is None else self.spread.pooled

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.measure.higher else -1


def pairs(comparison: Comparison) -> list[tuple[str, Group, Group]]:
    """(axis, first, second) for every two groups that differ in exactly one axis.

    Of more than ``MOST_PAIRED`` groups that differ in the same axis alone, each is set against the
    first one only, so that there are not many more pairs than groups.
    """
    keys = list(dict.fromkeys(key for group in comparison.groups for key in group.axes))
    order = {axis: place for place, axis in enumerate(comparison.axes)}
    found = []
    for key in keys:
        rest = [other for other in keys if other != key]
        alike: dict[str, list[tuple[int, Group]]] = {}
        for place, group in enumerate(comparison.groups):
            same = json.dumps([group.axes.get(other) for other in rest], sort_keys=True)
            alike.setdefault(same, []).append((place, group))
        for members in alike.values():
            starts = members if len(members) <= MOST_PAIRED else members[:1]
            each = ((a, b) for place, a in enumerate(starts) for b in members[place + 1 :])
            for (one, second), (other, first) in each:
                if first.axes.get(key) != second.axes.get(key):
                    found.append((order.get(key, len(order)), one, other, key, first, second))
    found.sort(key=lambda pair: pair[:3])
    return [(key, first, second) for *_, key, first, second in found]


def analyse(comparison: Comparison) -> list[Analysis]:
    """Every quality that was measured, the one that decides first; then the losses.

    The verdicts of the secondary measures carry Holm's correction over all their pairs.

    Raises:
        UserError: if the comparison names a primary measure, or a group, that there is not.
    """
    measures = evaluation_measures(comparison)
    primary = _primary(comparison, measures)
    ordered = sorted(measures, key=lambda measure: measure is not primary)
    if any(same_task(pair) for _, *pair in pairs(comparison)) or len(comparison.groups) < 2:
        ordered += loss_measures(comparison)
    found = [_analyse(comparison, measure, measure is primary) for measure in ordered]
    p_values = [
        p_value(verdict.found) for each in found if not each.primary for verdict in each.verdicts
    ]
    adjusted, level = iter(holm(p_values)), LEVEL / max(len(p_values), 1)
    return [each if each.primary else _corrected(each, adjusted, level) for each in found]


def _primary(comparison: Comparison, measures: Sequence[Measure]) -> Measure | None:
    if not measures:
        return None
    wanted = comparison.rules.get("primary")
    # What training measured by the way, the online probe, stands before what was asked for.
    asked = next(iter(comparison.rules.get("evaluations", {})), None)
    for measure in measures:
        if (wanted or asked) in (measure.key, measure.key.partition(".")[0]):
            return measure
    if wanted:
        raise choice_error("primary", wanted, [measure.key for measure in measures])
    return measures[0]


def _corrected(analysis: Analysis, adjusted: Iterable[float], level: float) -> Analysis:
    """Verdicts by adjusted p-values; what could be shown is that of Holm's first step."""
    known = {}
    for place, (verdict, p) in enumerate(zip(analysis.verdicts, adjusted, strict=False)):
        kind: Kind = "undecided" if verdict.kind == "difference" else verdict.kind
        judged = replace(verdict, kind="difference" if p < LEVEL else kind)
        if judged.kind == "undecided" and place < _MOST_FORECAST:
            judged = _forecast(judged, STANDING_ALONE, level, analysis.margin)
        known[verdict.key] = judged
    best = _facing(known, [verdict.key for verdict in analysis.best])
    return replace(analysis, verdicts=tuple(known.values()), best=best)


def _facing(
    known: Mapping[tuple[str, str], Verdict], keys: Iterable[tuple[str, str]]
) -> tuple[Verdict, ...]:
    """The verdicts of pairs, each turned to the way its key has it; what is not known is left."""
    return tuple(
        known[key] if key in known else -known[key[::-1]]
        for key in keys
        if key in known or key[::-1] in known
    )


def _forecast(
    verdict: Verdict, family: Family, level: float, margin: float, most: int | None = None
) -> Verdict:
    """With what this design could have shown, and the seeds that would decide.

    Args:
        verdict: undecided.
        family: of the difference.
        level: of the test; that of the last look where seeds are added.
        margin: of the comparison.
        most: seeds where they are added until decided; what more would decide is not reckoned then.
    """
    found = verdict.found
    assert found.error is not None
    design = Design(family, most or found.n, found.error * math.sqrt(found.n / 2), level)
    needed = None if most else design.seeds_to_decide(found.mean, margin)
    return replace(verdict, smallest=design.smallest(), needed=needed)


def _analyse(comparison: Comparison, measure: Measure, primary: bool) -> Analysis:
    margin = float(comparison.rules.get("margin", 1.0)) / 100
    empty = Analysis(measure, primary, margin=margin if measure.unit == "%" else 0.0)
    mixed = mixed_protocols(comparison, measure)
    if mixed:
        return replace(empty, mixed=mixed)
    groups = [group for group in comparison.groups if group.values(measure.key)]
    if len(groups) < 2:
        return empty
    judge = _Judge(comparison, empty, groups)
    wanted = [(first, second) for _, first, second in pairs(comparison)]
    if primary and judge.reference is not None:
        wanted = [(group, judge.reference) for group in groups if group is not judge.reference]
    best, *others = sorted(groups, key=lambda group: -empty.sign * _mean(group, measure))
    leading = [(best, other) for other in others]
    if judge.reference is not None:
        leading = [(second, first) for first, second in wanted]
    asked = {(a.label, b.label): (a, b) for a, b in wanted if a in groups and b in groups}
    ahead = {(a.label, b.label): (a, b) for a, b in leading}
    beside = {key: pair for key, pair in ahead.items() if key[::-1] not in asked}
    # Each pair is judged once: the sentence and the tables say the same of it.
    judged = {verdict.key: verdict for verdict in judge.verdicts([*(asked | beside).values()])}
    return replace(
        empty,
        verdicts=tuple(judged[key] for key in asked if key in judged),
        best=_facing(judged, ahead),
        family=judge.family,
        spread=judge.spread,
        looks=judge.progress.looks if judge.progress else 0,
        images=judge.images,
    )


def _mean(group: Group, measure: Measure) -> float:
    return float(np.mean(list(group.values(measure.key).values())))


def comparable(measure: Measure, first: Group, second: Group) -> bool:
    """Whether a measure means the same in both groups: a loss does under the same task only."""
    return measure.key not in LOSSES or same_task([first, second])


class _Judge:
    """Verdicts of one measure, all of one family where it is the primary one."""

    def __init__(self, comparison: Comparison, analysis: Analysis, groups: list[Group]) -> None:
        self.measure, self.margin = analysis.measure, analysis.margin
        self.primary, self.groups, self.images = analysis.primary, groups, 0
        values = {group.label: group.values(self.measure.key) for group in groups}
        alike = all(comparable(self.measure, groups[0], group) for group in groups[1:])
        self.spread = pooled_spread(values) if alike else None
        self.reference = _reference(comparison, groups) if analysis.primary else None
        self.progress: Progress | None = None
        against = self.reference.label if self.reference else None
        self.family = family_of(list(values), against)
        seeds = comparison.rules.get("seeds")
        self.rule = SeedRule(**seeds) if seeds and analysis.primary else None
        if self.rule is not None:
            self.progress = follow(values, self.rule, self.margin, against)
        if not analysis.primary:  # each stands by itself; Holm's correction follows
            self.family = STANDING_ALONE
        elif self.spread is None or not self.spread.pooled:
            self.family = Family("separate", count=self.family.count)

    def verdicts(self, wanted: Sequence[tuple[Group, Group]]) -> list[Verdict]:
        """Verdicts of pairs; those that have no seed in common are left out."""
        found = [
            (first, second, result)
            for first, second in wanted
            if comparable(self.measure, first, second)
            if (result := self._difference(first, second)) is not None
        ]
        p_equal = holm([result.p_equal(self.margin) for *_, result in found])
        return [
            self._verdict(*pair, p, self.primary and place < _MOST_FORECAST)
            for place, (pair, p) in enumerate(zip(found, p_equal, strict=True))
        ]

    def _difference(self, first: Group, second: Group) -> Difference | None:
        draws, images, count = item_sources(first, second, self.measure.key)
        self.images = max(self.images, count)
        if self.progress is not None:
            for one, other, sign in ((first, second, 1), (second, first, -1)):
                found = self.progress.differences.get((one.label, other.label))
                if found is not None:
                    found = found if images is None else _widened(found, images)
                    return found if sign == 1 else -found
        values = first.values(self.measure.key), second.values(self.measure.key)
        return difference(*values, self.family, self.spread, draws=draws, images=images)

    def _verdict(
        self, first: Group, second: Group, found: Difference, p_equal: float, forecast: bool
    ) -> Verdict:
        if found.error is None:
            return Verdict(first, second, found, "untested")
        equal = found.is_within(self.margin) if self.rule else p_equal < LEVEL
        kind: Kind = "difference" if found.shown else "equal" if equal else "undecided"
        verdict = Verdict(first, second, found, kind, p_equal=None if self.rule else p_equal)
        if kind != "undecided" or not forecast:
            return verdict
        if self.rule is None:
            return _forecast(verdict, self.family, LEVEL, self.margin)
        level = nominal_level(self.rule.most, self.rule, self.family)
        return _forecast(verdict, self.family, level, self.margin, self.rule.most)


def _widened(found: Difference, images: Source) -> Difference:
    """With the interval for new images, at the same level as its own."""
    if not found.error or found.high is None:
        return found
    times = math.sqrt(1 + images.variance / found.error**2)
    reach = (found.high - found.mean) * times
    return replace(found, wide=(found.mean - reach, found.mean + reach))


def _reference(comparison: Comparison, groups: list[Group]) -> Group | None:
    """The group that ``against`` names by its label, or by its value on an axis."""
    wanted = comparison.rules.get("against")
    if not wanted:
        return None
    for group in groups:
        if wanted in (group.label, *map(show_value, group.axes.values())):
            return group
    raise setting_error("against", wanted, f"is none of {', '.join(g.label for g in groups)}")


def item_sources(first: Group, second: Group, key: str) -> tuple[Source | None, Source | None, int]:
    """What few-shot draws and test images add to the error of a difference, and how many images.

    Nothing where a run has kept no answers, or runs were asked about other images.
    """
    mine, theirs = (_answers(group, key) for group in (first, second))
    seeds = sorted(mine.keys() & theirs.keys())
    common = first.values(key).keys() & second.values(key).keys()
    if len(seeds) < 2 or set(seeds) != set(common):
        return None, None, 0
    shapes = {array.shape for part in (mine, theirs) for _, array in part.values()}
    ids = mine[seeds[0]][0]
    same = all(np.array_equal(part[s][0], ids) for part in (mine, theirs) for s in seeds)
    if len(shapes) > 1 or not same:
        return None, None, 0
    each = np.stack([mine[seed][1] - theirs[seed][1] for seed in seeds])  # (S, D, I)
    draws = item_source(each.mean(2)) if each.shape[1] > 1 else None
    return draws, item_source(each.mean(1)), each.shape[2]


Answers = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Ids (I,) and answers (D, I) of one run; D is 1 but for few-shot draws."""


def _answers(group: Group, key: str) -> dict[int, Answers]:
    evaluation, _, name = key.partition(".")
    found = {}
    for run in group.finished:
        kept = run.answers.get(evaluation, {})
        if name in kept:
            found[run.seed] = (kept["sample_ids"], np.atleast_2d(kept[name]).astype(np.float64))
    return found


def against_references(
    comparison: Comparison, analysis: Analysis, kind: str
) -> list[tuple[Group, Difference | None]]:
    """How far each group stands from its reference, paired by seed.

    The intervals hold for all groups at once (Bonferroni). The spread is that of all groups and
    references together, unless they clearly spread unequally. Raw pixels have no seed: their one
    value is taken from each of the group's, whose own spread it then is.
    """
    key = analysis.measure.key
    count = sum(bool(group.values(key)) for group in comparison.groups)
    family = Family("separate", count=max(count, 1))
    beside = [group for group in comparison.references if group.kind == kind != "pixels"]
    table = {group.label: group.values(key) for group in (*comparison.groups, *beside)}
    spread = pooled_spread(table) if beside else None
    found: list[tuple[Group, Difference | None]] = []
    for group in comparison.groups:
        reference = comparison.reference(group, kind)
        if reference is None or analysis.mixed:
            found.append((group, None))
            continue
        values, other = group.values(key), reference.values(key)
        if kind == "pixels" and len(other) == 1:
            other = dict.fromkeys(values, next(iter(other.values())))
        draws, *_ = item_sources(group, reference, key)
        found.append((group, difference(values, other, family, spread, draws=draws)))
    return found


def leader(comparison: Comparison, analysis: Analysis) -> str | None:
    """The group that is shown to be ahead of every other one and of the references."""
    given = [g for g in comparison.references if g.values(analysis.measure.key)]
    # A given encoder has one value and no seed to pair by: nothing is shown against it.
    if not analysis.best or any(group.kind not in REFERENCES for group in given):
        return None
    label = analysis.best[0].first.label
    others = sum(bool(group.values(analysis.measure.key)) for group in comparison.groups) - 1
    ahead = [v.found.mean * analysis.sign > 0 for v in analysis.best]
    shown = [v.kind == "difference" for v in analysis.best] + ahead
    for kind in REFERENCES:
        for group, found in against_references(comparison, analysis, kind):
            if group.label == label and found is not None:
                shown.append(found.shown and found.mean * analysis.sign > 0)
    return label if all(shown) and len(analysis.best) == others else None


def mixed_protocols(comparison: Comparison, measure: Measure) -> str:
    """Why the rows of a column do not measure the same thing; empty where they do.

    Where the images are what the comparison varies, only the settings have to agree.
    """
    evaluation = measure.key.partition(".")[0]
    varies_data = any(key.startswith("data.") for key in comparison.axes)
    seen: dict[str, str] = {}
    for run in comparison.runs:
        protocol = run.protocols.get(evaluation)
        if run.finished and protocol and measure.key in run.measures:
            if isinstance(protocol, dict):
                protocol = protocol.get("settings" if varies_data else "protocol", "")
            seen.setdefault(str(protocol), run.name)
    if len(seen) < 2:
        return ""
    first, second = list(seen.values())[:2]
    return (
        f"{measure.section}: the runs were measured by {len(seen)} protocols (other settings or "
        f"other images, as {first} and {second}), so its columns are not compared. Evaluate them "
        "again with the same settings."
    )
