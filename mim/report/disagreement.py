"""Where encoders disagree: classes, images and their looks, by the answers that runs have kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from mim.compare.statistics import LEVEL, Difference, difference, holm, p_value
from mim.report.collect import Comparison, Group, read_arrays
from mim.report.figures import Picture
from mim.report.statistics import Analysis
from mim.report.tables import Cell, Column, Row, Table, text_columns
from mim.report.tiles import encode_image

_CLASSES = 8
_PAIRS = 15
"""Pairs of groups of which classes are compared."""


@dataclass(frozen=True)
class Disputed:
    """A test image, and how many seeds of each group answered it right."""

    picture: Picture
    label: str
    answers: tuple[tuple[str, str], ...]
    """(group, "2 of 3")."""


def class_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """The classes on which two groups differ most; it has rows where two kept their answers.

    The difference of each class is paired by seed, and Holm's correction is over all classes and
    pairs of groups, since the largest ones are shown.
    """
    evaluation = _primary(analyses)
    shares = _shares(comparison.groups, evaluation)
    labels = next((own[1] for own in shares.values()), np.zeros(0, dtype=np.int64))
    groups = [group for group in comparison.groups if group.label in shares]
    known = [int(label) for label in np.unique(labels if len(groups) > 1 else [])]
    values = {label: _class_values(groups, evaluation, labels == label) for label in known}
    pairs = list(combinations([group.label for group in groups], 2))[:_PAIRS]
    found = [
        (label, pair, result)
        for label in known
        for pair in pairs
        if (result := difference(values[label][pair[0]], values[label][pair[1]])) is not None
    ]
    adjusted = holm([p_value(result) for *_, result in found])
    most: dict[int, tuple[tuple[str, str], Difference, float]] = {}
    for (label, pair, result), p in zip(found, adjusted, strict=True):
        if label not in most or abs(result.mean) > abs(most[label][1].mean):
            most[label] = (pair, result, p)
    names = _disputed_images(comparison).get("classes", ())
    ranked = sorted(most, key=lambda label: (-abs(most[label][1].mean), label))[:_CLASSES]
    rows = []
    for label in ranked:
        count = int((labels == label).sum())
        means = [float(np.mean(list(own.values()))) for own in values[label].values()]
        cells = [Cell(_name(names, label)), Cell(str(count), value=count)]
        cells += [Cell(f"{100 * mean:.1f}", value=mean) for mean in means]
        rows.append(Row([*cells, _largest(*most[label])]))
    many = len(known) > _CLASSES
    shown = f"The {len(ranked)} of {len(known)} classes" if many else "Classes"
    caption = (
        f"{shown} on which encoders differ most: right answers, mean over seeds, and the largest "
        "difference with its own 95% interval; exploratory, bold where Holm's correction over all "
        "classes and pairs leaves it shown"
    )
    heads = [Column(f"{group.label} (%)") for group in groups]
    columns = [*text_columns("Class"), Column("images"), *heads]
    return Table(caption, [*columns, *text_columns("Largest difference")], rows, "classes")


def image_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """How far pairs of groups differ with what an image looks like, by rank correlation.

    A correlation speaks of these runs and of other images; Holm's correction is over all of them.
    """
    kept, evaluation = _disputed_images(comparison), _primary(analyses)
    shares = _shares(comparison.groups, evaluation)
    measured = kept.get("statistics", np.zeros((1, 0)))  # (m, 4)
    varied = np.ptp(measured, axis=0) > 1e-9  # the colour of grey images does not
    names = [str(name) for name in np.compress(varied, kept.get("statistic", ()))]
    columns = [*text_columns("Difference"), *map(Column, names)]
    caption = (
        "Rank correlation over test images of the difference in right answers (mean over seeds) "
        "with what an image looks like; exploratory, bold where Holm's correction over all of them "
        "leaves it shown. Detail is the step between neighbouring pixels over the contrast"
    )
    looks = dict(zip(kept.get("measured_ids", ()), measured[:, varied], strict=False))
    pairs = list(combinations(shares, 2))[:_PAIRS] if names else []
    found = []  # of each pair, with each statistic
    for first, second in pairs:
        ids, _, right, _ = shares[first]
        places = [place for place, sample_id in enumerate(ids) if sample_id in looks]
        gap = (right - shares[second][2])[places]
        statistics = np.array([looks[sample_id] for sample_id in ids[places]]).T  # (4 or fewer, m)
        found.append([_rank_correlation(gap, values) for values in statistics])
    adjusted = iter(holm([p for pair in found for _, p in pair]))
    rows = []
    for (first, second), pair in zip(pairs, found, strict=True):
        cells = [
            Cell(f"{rho:+.2f}".replace("-", "\u2212"), strong=next(adjusted) < LEVEL, value=rho)
            for rho, _ in pair
        ]
        rows.append(Row([Cell(f"{first} \u2212 {second}"), *cells]))
    return Table(caption, columns, rows, "images")


def _rank_correlation(first: NDArray[Any], second: NDArray[Any]) -> tuple[float, float]:
    """Spearman's, and its p-value; none where either is the same for all images."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0, 1.0
    found = spearmanr(first, second)
    return float(found.statistic), float(found.pvalue)


def _class_values(
    groups: Sequence[Group], evaluation: str, chosen: NDArray[np.bool_]
) -> dict[str, dict[int, float]]:
    """Group -> seed -> share of the chosen images that were answered right."""
    return {
        group.label: {
            run.seed: float(run.answers[evaluation]["accuracy"][chosen].mean())
            for run in group.finished
            if "accuracy" in run.answers.get(evaluation, {})
        }
        for group in groups
    }


def _largest(pair: tuple[str, str], found: Difference, p: float) -> Cell:
    text = f"{pair[0]} \u2212 {pair[1]}: {100 * found.mean:+.1f}".replace("-", "\u2212")
    note = ""
    if found.low is not None and found.high is not None:
        note = f"{100 * found.low:.1f} to {100 * found.high:.1f}".replace("-", "\u2212")
    return Cell(text, note, strong=p < LEVEL, value=abs(found.mean))


def _name(classes: Sequence[str] | NDArray[Any], label: int) -> str:
    return str(classes[label]) if label < len(classes) else f"class {label}"


def disagreement(comparison: Comparison, analyses: Sequence[Analysis]) -> list[Disputed]:
    """The images that the comparison has kept, the most disputed first."""
    kept, evaluation = _disputed_images(comparison), _primary(analyses)
    shares = _shares(comparison.groups, evaluation)
    if not kept or str(kept["evaluation"]) != evaluation or len(shares) < 2:
        return []
    found = []
    for sample_id, image in zip(kept["sample_ids"], kept["images"], strict=True):
        answers, name = [], ""
        for label, (ids, labels, right, seeds) in shares.items():
            (places,) = np.nonzero(ids == sample_id)
            if not len(places):
                break
            answers.append((label, f"{round(float(right[places[0]]) * seeds)} of {seeds}"))
            if len(labels):
                name = _name(kept["classes"], int(labels[places[0]]))
        else:
            said = ", ".join(f"{group} {count}" for group, count in answers)
            picture = encode_image(image, f"Test image {sample_id}, {name}: right by {said} seeds")
            found.append(Disputed(picture, name, tuple(answers)))
    return found


def _primary(analyses: Sequence[Analysis]) -> str:
    return next((each.measure.key.partition(".")[0] for each in analyses if each.primary), "")


Shares = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], int]
"""Ids and labels (I,), the share of the seeds that were right (I,), and how many seeds."""


def _shares(groups: Sequence[Group], evaluation: str) -> dict[str, Shares]:
    """Of the groups whose runs answered the same images as the first one's."""
    found: dict[str, Shares] = {}
    first: NDArray[Any] | None = None
    for group in groups:
        kept = [run.answers.get(evaluation, {}) for run in group.finished]
        kept = [arrays for arrays in kept if "accuracy" in arrays]
        if not kept:
            continue
        first = kept[0]["sample_ids"] if first is None else first
        if all(np.array_equal(arrays["sample_ids"], first) for arrays in kept):
            labels = kept[0].get("labels", np.zeros(0, dtype=np.int64))
            right = np.mean([arrays["accuracy"] for arrays in kept], axis=0)
            found[group.label] = (first, labels, right, len(kept))
    return found


def _disputed_images(comparison: Comparison) -> dict[str, NDArray[Any]]:
    return read_arrays(comparison.folder / "disagreement.npz", "images") or {}
