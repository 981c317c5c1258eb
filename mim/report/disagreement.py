"""Where encoders disagree: classes and images, by the answers that runs have kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mim.report.collect import Comparison, Group, read_arrays
from mim.report.figures import Picture
from mim.report.statistics import Analysis
from mim.report.tables import Cell, Column, Row, Table, text_columns
from mim.report.tiles import encode_image

_CLASSES = 8


@dataclass(frozen=True)
class Disputed:
    """A test image, and how many seeds of each group answered it right."""

    picture: Picture
    label: str
    answers: tuple[tuple[str, str], ...]
    """(group, "2 of 3")."""


def class_table(comparison: Comparison, analyses: Sequence[Analysis]) -> Table:
    """The classes on which groups differ most; it has rows where two groups kept their answers."""
    shares = _shares(comparison.groups, _primary(analyses))
    labels = next((own[1] for own in shares.values()), np.zeros(0, dtype=np.int64))
    by_class = {
        int(label): [float(right[labels == label].mean()) for _, _, right, _ in shares.values()]
        for label in np.unique(labels if len(shares) > 1 else [])
    }
    names = _disputed_images(comparison).get("classes", ())
    ranked = sorted(by_class, key=lambda label: (-np.ptp(by_class[label]), label))[:_CLASSES]
    rows = []
    for label in ranked:
        count = int((labels == label).sum())
        cells = [Cell(f"{100 * v:.1f}", value=v) for v in by_class[label]]
        rows.append(Row([Cell(_name(names, label)), Cell(str(count), value=count), *cells]))
    many = len(by_class) > _CLASSES
    shown = f"The {len(ranked)} of {len(by_class)} classes" if many else "Classes"
    caption = f"{shown} on which encoders differ most, right answers, mean over seeds; exploratory"
    heads = [Column(f"{label} (%)") for label in shares]
    return Table(caption, [*text_columns("Class"), Column("images"), *heads], rows, "classes")


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
    keys = ("evaluation", "sample_ids", "images", "classes")
    return read_arrays(comparison.folder / "disagreement.npz", "images", keys) or {}
