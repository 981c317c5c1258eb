"""What the numbers say, in sentences that claim no more than the intervals do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mim.report.collect import LOSSES, REFERENCES, Comparison, Group
from mim.report.measures import Measure, p_text, summarize
from mim.report.statistics import Analysis, Verdict, against_references

_NAMED = 4
"""How many groups a sentence names; the rest is counted and stands in the tables."""
_PER_MEASURE = 3
"""How many secondary measures are named."""
_AGAINST = {"untrained": "its untrained self", "pixels": "raw pixels"}
_COSTS = (("train_flops", "training FLOPs"), ("wall_seconds", "wall time"))


@dataclass(frozen=True)
class Finding:
    """What a comparison found."""

    sentence: str
    """The answer of the primary measure."""
    basis: str = ""
    """What the answer rests on: images, seeds, kind of interval."""
    more: tuple[str, ...] = ()
    """References, secondary measures, cost: a sentence each."""

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(part for part in (self.sentence, self.basis, *self.more) if part)


def finding(comparison: Comparison, analyses: Sequence[Analysis]) -> Finding:
    """The answer in one sentence, what it rests on, and what else was found."""
    groups = [group for group in comparison.groups if group.finished]
    primary = next((each for each in analyses if each.primary), None)
    if not groups:
        return Finding("No run of this comparison has finished.")
    if primary is None:
        text = "No evaluation was run, so what the encoders are worth is not known."
        return Finding(text, more=_present(_cost(groups)))
    if primary.mixed:
        return Finding(primary.mixed)
    more = (
        *(_against(comparison, primary, kind) for kind in REFERENCES),
        _elsewhere([a for a in analyses if not a.primary and a.measure.key not in LOSSES]),
        _cost(groups),
    )
    return Finding(_lead(groups, primary), _basis(comparison, primary), _present(*more))


def _present(*texts: str) -> tuple[str, ...]:
    return tuple(text for text in texts if text)


def _lead(groups: list[Group], analysis: Analysis) -> str:
    """Who is ahead, as good, or not told apart."""
    measure = analysis.measure
    name = measure.spoken
    if not analysis.best:
        measured = [group for group in groups if group.values(measure.key)]
        values = [f"{group.label} {_value(group, measure)}" for group in measured[:_NAMED]]
        return f"By {name}: {_list(values)}; there is nothing to compare with."
    best = analysis.best[0].first
    sign = analysis.sign
    sides = {
        "better than": _of(analysis, "difference", sign),
        "worse than": _of(analysis, "difference", -sign),
        f"as good as, within {_amount(measure, analysis.margin)},": _of(analysis, "equal"),
    }
    claims = [f"{how} {_list(entries)}" for how, entries in sides.items() if entries]
    undecided = [v for v in analysis.best if v.kind == "undecided"]
    untested = [v for v in analysis.best if v.kind == "untested"]
    subject = f"By {name}, {best.label} ({_value(best, measure)})"
    parts = [f"{subject} is {_list(claims)}"] if claims else []
    if undecided:
        listed = _list([_entry(v, analysis) for v in undecided])
        said = f"whether it differs from {listed} is undecided"
        if not claims:
            value = _value(best, measure)
            said = f"By {name} it is undecided whether {best.label} ({value}) differs from {listed}"
        parts.append(f"{said}: {_outlook(analysis, undecided)}")
    if untested:
        listed = _list([_entry(v, analysis) for v in untested])
        n = min(v.found.n for v in untested)
        seeds = "1 seed gives" if n == 1 else f"{n} seeds give"
        seeds = f"{n} seeds that differ by one and the same amount give" if n > 2 else seeds
        extreme = "highest" if measure.higher else "lowest"
        tied = any(measure.number(v.found.mean) == measure.number(0) for v in untested)
        has = "shares" if tied else "has"
        before = "" if parts else f"{subject} {has} the {extreme} mean; "
        parts.append(f"{before}{seeds} no interval, so no difference can be shown from {listed}")
    return f"{'; '.join(parts)}."


def _of(analysis: Analysis, kind: str, sign: int = 0) -> list[str]:
    return [
        _entry(verdict, analysis)
        for verdict in analysis.best
        if verdict.kind == kind and (not sign or verdict.found.mean * sign > 0)
    ]


def _entry(verdict: Verdict, analysis: Analysis) -> str:
    """ "drop (+1.2 points, 0.4 to 2.0)"; of one that is as good the p-value of that."""
    found, measure = verdict.found, analysis.measure
    text = f"{measure.number(found.mean, sign=True)}{measure.points}"
    if verdict.kind == "equal" and verdict.p_equal is not None:
        text += f", {p_text(verdict.p_equal)}"
    elif found.low is not None:
        text += f", {measure.interval(found.low, found.high)}"
    return f"{verdict.second.label} ({text})"


def _outlook(analysis: Analysis, undecided: Sequence[Verdict]) -> str:
    """What the design could have shown, and what would decide all of these."""
    known = [verdict.smallest for verdict in undecided if verdict.smallest is not None]
    if not known:
        return "the differences that this design shows were not worked out"
    amount = _amount(analysis.measure, max(known))
    if analysis.looks:
        return (
            f"after {analysis.looks} looks; with all its seeds this design shows {amount} or more "
            "in 80 % of comparisons"
        )
    n = min(verdict.found.n for verdict in undecided)
    text = f"{n} seeds show {amount} or more in 80 % of comparisons"
    if any(verdict.needed is None for verdict in undecided):
        small = "a difference this small" if len(undecided) == 1 else "all of them"
        return f"{text}, and no number of seeds within reason decides {small}"
    more = max(verdict.needed - verdict.found.n for verdict in undecided if verdict.needed)
    one = ("it", "the difference seen is the true one")
    them, truth = one if len(undecided) == 1 else ("all", "the differences seen are the true ones")
    return f"{text}, and about {more} more would decide {them} if {truth}"


def _basis(comparison: Comparison, analysis: Analysis) -> str:
    """What stands in parentheses, and of which population it speaks."""
    verdict = next((v for v in analysis.best if v.found.error is not None), None)
    if verdict is None:
        return ""
    counts = sorted({v.found.n for v in analysis.best})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    kinds = {"pairs": "all pairs at once (Tukey)", "reference": "all at once (Dunnett)"}
    held = kinds.get(analysis.family.kind, "all at once (Bonferroni)")
    if len(comparison.groups) == 2:
        held = "this one comparison"
    text = f"In parentheses: mean difference and its 95% interval over n\u00a0=\u00a0{n} seeds"
    text += f", for {held}"
    if analysis.looks:
        text += f" and for all {analysis.looks} looks"
    if any(v.kind == "equal" and v.p_equal is not None for v in analysis.best):
        text += "; of what is as good, the p-value of the two one-sided tests that show it"
    text += "; it speaks of these test images"
    if analysis.images and verdict.found.wide is not None:
        wide = analysis.measure.interval(*verdict.found.wide)
        names = f"{verdict.first.label} \u2212 {verdict.second.label}"
        text += f" ({analysis.images:,}). For new images the interval of {names} is {wide}"
    return f"{text}."


def _against(comparison: Comparison, analysis: Analysis, kind: str) -> str:
    """Whether pre-training is worth anything: how many encoders beat a reference."""
    found = [pair for pair in against_references(comparison, analysis, kind) if pair[1]]
    known = [(group, result) for group, result in found if result is not None]
    if not known:
        return f"There is no value of {REFERENCES[kind]} to compare with."
    measure, name = analysis.measure, _AGAINST[kind]
    beats = [r for _, r in known if r.shown and r.mean * analysis.sign > 0]
    below = [r for _, r in known if r.shown and r.mean * analysis.sign < 0]
    if len(beats) == len(known):
        ends = sorted(beats, key=lambda r: r.mean)
        means = [measure.number(r.mean, sign=True) for r in (ends[0], ends[-1])]
        span = means[0] if means[0] == means[1] else f"{means[0]} to {means[1]}"
        subject = "Each encoder" if len(known) > 1 else "It"
        return f"{subject} beats {name} ({span}{measure.points})."
    name = name.replace("its untrained self", "their untrained selves")
    text = f"{len(beats)} of {len(known)} encoders are shown to beat {name}"
    text += f", {len(below)} to fall short of it" if below else ""
    left = len(known) - len(beats) - len(below)
    return f"{text}; no difference shown for {left}." if left else f"{text}."


def _elsewhere(others: Sequence[Analysis]) -> str:
    """What the secondary measures say of who is ahead."""
    found, open_ = [], []
    for analysis in others:
        ahead = _of(analysis, "difference", analysis.sign)
        name = analysis.measure.spoken
        if ahead:
            best = analysis.best[0].first.label
            found.append(f"by {name}, {best} is better than {_list(ahead, most=2)}")
        elif analysis.best:
            open_.append(name)
    more = len(found) - _PER_MEASURE
    if more > 0:
        found = [*found[:_PER_MEASURE], f"{more} more measures show a difference"]
    if open_:
        found.append(f"no difference shown from the best mean by {_list(open_, ' or ')}")
    return f"Secondary measures (Holm): {'; '.join(found)}." if found else ""


def _cost(groups: list[Group]) -> str:
    """How far the dearest is from the cheapest."""
    parts = []
    for key, name in _COSTS:
        summaries = {group.label: summarize(group.values(key).values()) for group in groups}
        means = {label: summary.mean for label, summary in summaries.items() if summary}
        if len(means) < 2 or min(means.values()) <= 0:
            continue
        cheapest, dearest = (end(means, key=lambda label: means[label]) for end in (min, max))
        times = f"{means[dearest] / means[cheapest]:.2f}"
        said = f"{dearest} takes {times} times as much as {cheapest}"
        parts.append(f"{name}: {'all alike' if times == '1.00' else said}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _value(group: Group, measure: Measure) -> str:
    unit = "\u00a0%" if measure.unit == "%" else f" {measure.unit}".rstrip()
    return f"{measure.summary(summarize(group.values(measure.key).values()))}{unit}"


def _amount(measure: Measure, size: float) -> str:
    """ "1 point", "2.3 points"."""
    number = measure.number(size).removesuffix(".0")
    return (
        f"{number} point" if measure.unit == "%" and number == "1" else f"{number}{measure.points}"
    )


def _list(entries: list[str], last: str = " and ", most: int = _NAMED) -> str:
    """ "a, b and c"; of more than ``most`` the first is named, the rest counted."""
    if len(entries) > most:
        entries = [entries[0], f"{len(entries) - 1} others"]
    if len(entries) < 2:
        return "".join(entries)
    return f"{', '.join(entries[:-1])}{last}{entries[-1]}"
