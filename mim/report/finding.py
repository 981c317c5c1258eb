"""What the numbers say, in sentences that claim no more than the intervals do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mim.report.collect import LOSSES, REFERENCES, Comparison, Group, same_task
from mim.report.statistics import Paired, paired_difference, summarize
from mim.report.tables import (
    Measure,
    evaluation_measures,
    loss_measures,
    margin,
)

_NAMED = 4
"""How many groups a sentence names; the rest is counted and stands in the tables."""
_BRIEF = 2
"""With more groups than this the paragraph sums up how they stand to the references."""
_PER_MEASURE = 3
"""How many measures the one paragraph names."""
_AGAINST = {"untrained": "its untrained self", "pixels": "raw pixels"}


@dataclass(frozen=True)
class Finding:
    """One measure and what can be said about it."""

    title: str
    text: str
    basis: str = ""
    """On how many seeds it rests, and what stands in parentheses."""


def finding(comparison: Comparison) -> Finding:
    """The finding in one paragraph: the first evaluation in full, the others in short, the cost."""
    groups = [group for group in comparison.groups if group.finished]
    measures = evaluation_measures(comparison)
    if not groups or not measures:
        return findings(comparison)[0]
    writer = _Writer(measures[0])
    parts = [writer.lead(groups)]
    if len(groups) > _BRIEF:
        parts.append(writer.against_in_short(comparison, groups))
    else:
        parts += [writer.against(comparison, groups, kind) for kind in REFERENCES]
    others = [_Writer(measure) for measure in measures[1:]]
    if len(groups) > 1:
        parts += [_elsewhere(others, groups), _cost_in_short(groups)]
    basis = _basis([paired for each in (writer, *others) for paired in each.used])
    return Finding(measures[0].plain, " ".join(part for part in parts if part), basis)


def findings(comparison: Comparison) -> list[Finding]:
    """The findings measure by measure, the first evaluation's first; losses and cost last."""
    groups = [group for group in comparison.groups if group.finished]
    if not groups:
        return [Finding("No result", "No run of this comparison has finished.")]
    found = []
    for measure in evaluation_measures(comparison):
        writer = _Writer(measure)
        parts = [writer.lead(groups)]
        parts += [writer.against(comparison, groups, kind) for kind in REFERENCES]
        text = " ".join(part for part in parts if part)
        found.append(Finding(measure.plain, text, writer.basis))
    if not found:
        text = "No evaluation was run, so what the encoders are worth is not known."
        found.append(Finding("Evaluation", text))
    if len(groups) > 1:
        found.append(_loss(comparison, groups))
        cost = _cost(groups)
        if cost:
            found.append(Finding("Cost", cost))
    # What the parentheses hold is said once, until it changes.
    bases = ["", *(finding.basis for finding in found)]
    return [
        replace(finding, basis="") if finding.basis == before else finding
        for before, finding in zip(bases, found, strict=False)
    ]


def _loss(comparison: Comparison, groups: list[Group]) -> Finding:
    measure = next(m for m in loss_measures(comparison) if m.key == LOSSES[1])
    if not same_task(groups):
        text = "The losses of these groups are not comparable: their targets, masks or data differ."
        return Finding("Loss", text)
    writer = _Writer(measure)
    text = writer.lead(groups) or "It was not measured."
    return Finding("Held-out loss", text, writer.basis)


class _Writer:
    """Sentences about one measure; remembers the differences it used, for the basis."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.sign = 1 if measure.higher else -1
        self.used: list[Paired] = []

    @property
    def basis(self) -> str:
        """How many seeds the differences rest on, once for all of them."""
        return _basis(self.used)

    def ahead(self, groups: list[Group]) -> tuple[str, list[str]]:
        """The group with the best mean, and those it is shown to be ahead of."""
        measure, sign = self.measure, self.sign
        means = {
            group.label: summary.mean
            for group in groups
            if (summary := summarize(group.values(measure.key).values()))
        }
        ranked = sorted(
            (group for group in groups if group.label in means),
            key=lambda group: -sign * means[group.label],
        )
        shown = []
        for other in ranked[1:]:
            paired = paired_difference(ranked[0].values(measure.key), other.values(measure.key))
            if paired is not None and paired.shown and paired.mean * sign > 0:
                shown.append(f"{other.label} ({self._amount(paired)})")
        return (ranked[0].label if len(ranked) > 1 else ""), shown

    def lead(self, groups: list[Group]) -> str:
        """Who is ahead, and of whom that is shown."""
        measure, sign = self.measure, self.sign
        summaries = {group.label: summarize(group.values(measure.key).values()) for group in groups}
        means = {label: summary.mean for label, summary in summaries.items() if summary}
        ranked = sorted(
            (group for group in groups if group.label in means),
            key=lambda group: -sign * means[group.label],
        )
        if not ranked:
            return ""
        best = ranked[0]
        unit = "\u00a0%" if measure.unit == "%" else f" {measure.unit}".rstrip()
        value = f"{measure.summary(summaries[best.label])}{unit}"
        if len(ranked) == 1:
            n = len(best.values(measure.key))
            return f"{best.label} reaches {value} (n = {n})."
        ahead: list[str] = []
        open_: list[str] = []
        for other in ranked[1:]:
            paired = paired_difference(best.values(measure.key), other.values(measure.key))
            entry = f"{other.label} ({self._amount(paired)})"
            won = paired is not None and paired.shown and paired.mean * sign > 0
            (ahead if won else open_).append(entry)
        extreme = "highest" if measure.higher else "lowest"
        if not open_:
            return f"{best.label} is ahead with {value}: ahead of {_list(ahead)}."
        if not ahead:
            return (
                f"No difference shown between {best.label}, whose mean is the {extreme} ({value}), "
                f"and {_list(open_)}."
            )
        return (
            f"{best.label} has the {extreme} mean ({value}) and is ahead of {_list(ahead)}; "
            f"no difference shown from {_list(open_)}."
        )

    def against(self, comparison: Comparison, groups: list[Group], kind: str) -> str:
        """Whether each encoder beats a reference."""
        measure, sign = self.measure, self.sign
        sorted_: dict[str, list[str]] = {"beats": [], "open": [], "below": []}
        for group in groups:
            paired = margin(comparison, group, kind, measure)
            if paired is None:
                continue
            which = "open" if not paired.shown else "beats" if paired.mean * sign > 0 else "below"
            sorted_[which].append(f"{group.label} ({self._amount(paired)})")
        beats, open_, below = sorted_["beats"], sorted_["open"], sorted_["below"]
        name = _AGAINST[kind]
        if not (beats or open_ or below):
            return f"There is no value of {REFERENCES[kind]} to compare with."
        if beats and not open_ and not below:
            subject = "Each pre-trained encoder beats" if len(beats) > 1 else "It beats"
            return f"{subject} {name}: {_list(beats)}."
        parts = []
        if beats:
            parts.append(f"shown to beat {name}: {_list(beats)}")
        if below:
            parts.append(f"shown to fall short of {name}: {_list(below)}")
        if open_:
            parts.append(f"no difference shown from {name}: {_list(open_)}")
        text = "; ".join(parts)
        return f"{text[0].upper()}{text[1:]}."

    def against_in_short(self, comparison: Comparison, groups: list[Group]) -> str:
        """How many encoders beat each reference, and by how much: the range of the means."""
        all_beat, parts = [], []
        for kind, name in _AGAINST.items():
            margins = [margin(comparison, group, kind, self.measure) for group in groups]
            known = [paired for paired in margins if paired is not None]
            if not known:
                parts.append(f"there is no value of {REFERENCES[kind]} to compare with")
                continue
            self.used += known
            beats = sum(paired.shown and paired.mean * self.sign > 0 for paired in known)
            below = sum(paired.shown and paired.mean * self.sign < 0 for paired in known)
            if beats == len(known):
                means = [
                    self.measure.number(paired.mean, sign=True)
                    for paired in sorted(known, key=lambda paired: paired.mean)
                ]
                amount = f"{means[0]} to {means[-1]}{self._unit}, each interval leaves out 0"
                all_beat.append(f"{name} ({amount})")
                continue
            text = f"{beats} of {len(known)} are shown to beat {name}"
            text += f", {below} to fall short of it" if below else ""
            left = len(known) - beats - below
            parts.append(f"{text}; no difference shown for {left}" if left else text)
        if all_beat:
            parts.insert(0, f"each of the {len(groups)} encoders beats {_list(all_beat)}")
        return " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)

    @property
    def _unit(self) -> str:
        """Of a difference: " points" of per cents."""
        return " points" if self.measure.unit == "%" else f" {self.measure.unit}".rstrip()

    def _amount(self, paired: Paired | None) -> str:
        """ "+1.2 points, 0.4 to 2.0"."""
        if paired is None:
            return "no seed in common"
        self.used.append(paired)
        amount = f"{self.measure.number(paired.mean, sign=True)}{self._unit}"
        if paired.low is None:
            return f"{amount}, n = {paired.n}"
        return f"{amount}, {self.measure.interval(paired)}"


def _basis(used: list[Paired]) -> str:
    """On how many seeds the differences rest, and what stands in parentheses."""
    counts = sorted({paired.n for paired in used})
    if not counts:
        return ""
    several = f" to {counts[-1]}" if len(counts) > 1 else ""
    n = f"n\u00a0=\u00a0{counts[0]}{several}"
    if counts[-1] == 1:
        return "n = 1: one seed gives no interval, so no difference can be shown."
    return f"In parentheses: mean difference, 95% interval; {n}."


def _elsewhere(writers: list[_Writer], groups: list[Group]) -> str:
    """What the other evaluations say of who is ahead."""
    found, open_ = [], []
    for writer in writers:
        best, ahead = writer.ahead(groups)
        name = _lower(writer.measure.plain)
        if ahead:
            found.append(f"by {name}, {best} is ahead of {_list(ahead, most=_BRIEF)}")
        elif best:
            open_.append(name)
    more = len(found) - _PER_MEASURE
    if more > 0:
        found = [*found[:_PER_MEASURE], f"{more} more measures show a difference"]
    if open_:
        found.append(f"no difference shown from the best mean by {_list(open_, ' or ')}")
    text = "; ".join(found)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _lower(text: str) -> str:
    """A title inside a sentence; "k-NN" and "mAP" stay."""
    first = text.split(" ", maxsplit=1)[0]
    return text[0].lower() + text[1:] if first.istitle() else text


def _cost_in_short(groups: list[Group]) -> str:
    """How far the dearest is from the cheapest."""
    parts = []
    for key, name in _COSTS:
        means = _means(groups, key)
        if len(means) < 2 or min(means.values()) <= 0:
            continue
        cheapest, dearest = (end(means, key=lambda label: means[label]) for end in (min, max))
        times = f"{means[dearest] / means[cheapest]:.2f}"
        said = f"{dearest} takes {times} times as much as {cheapest}"
        parts.append(f"{name}: {'all alike' if times == '1.00' else said}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


_COSTS = (("train_flops", "training FLOPs"), ("wall_seconds", "wall time"))


def _means(groups: list[Group], key: str) -> dict[str, float]:
    summaries = {group.label: summarize(group.values(key).values()) for group in groups}
    return {label: summary.mean for label, summary in summaries.items() if summary}


def _cost(groups: list[Group]) -> str:
    """What the groups cost, in multiples of the cheapest."""
    parts = []
    for key, name in _COSTS:
        means = _means(groups, key)
        if len(means) < 2 or min(means.values()) <= 0:
            continue
        cheapest = min(means, key=lambda label: means[label])
        times = {label: f"{mean / means[cheapest]:.2f}" for label, mean in means.items()}
        alike = [label for label in means if times[label] == "1.00"]
        others = [f"{label} {times[label]} times" for label in means if label not in alike]
        verb = "takes" if len(alike) == 1 else "take"
        rest = f"; {_list(others)} as much" if others else ""
        parts.append(f"{_list(alike)} {verb} the least {name}{rest}.")
    return " ".join(parts)


def _list(entries: list[str], last: str = " and ", most: int = _NAMED) -> str:
    """ "a, b and c"; beyond so many the rest is counted."""
    if len(entries) > most:
        entries = [*entries[: most - 1], f"{len(entries) - most + 1} more"]
    if len(entries) < 2:
        return "".join(entries)
    return f"{', '.join(entries[:-1])}{last}{entries[-1]}"
