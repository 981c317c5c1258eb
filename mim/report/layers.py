"""What an analysis of layers found: each layer's numbers, and how alike the encoders are."""

from __future__ import annotations

import re
import zipfile
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mim.core.errors import UserError
from mim.report.collect import Comparison, Group, Run
from mim.report.measures import MISSING, summarize
from mim.report.tables import Cell, Column, Row, Table

_LAYER = re.compile(r"analysis\.layer_(\d+)_(\w+)")
# Name -> (heading, printed number over stored number, decimals).
_MEASURES = {
    "accuracy": ("linear probe (%)", 100.0, 1),
    "attention_distance": ("attention distance (pixels)", 1.0, 1),
    "effective_rank": ("effective rank", 1.0, 1),
}


def _groups(comparison: Comparison) -> list[Group]:
    return [group for group in (*comparison.groups, *comparison.references) if group.finished]


def layers_table(comparison: Comparison) -> Table | None:
    """Every layer of every encoder, the mean over seeds; None without an analysis."""
    found = {int(m[1]) for key in comparison.evaluation_keys if (m := _LAYER.fullmatch(key))}
    if not found:
        return None
    rows = []
    for group in _groups(comparison):
        for name, (label, scale, decimals) in _MEASURES.items():
            cells = []
            for layer in sorted(found):
                summary = summarize(group.values(f"analysis.layer_{layer}_{name}").values())
                shown = MISSING if summary is None else f"{scale * summary.mean:.{decimals}f}"
                cells.append(Cell(shown))
            if any(cell.text != MISSING for cell in cells):
                kind = "run" if group.kind == "run" else group.kind
                rows.append(Row((Cell(group.label), Cell(label), *cells), kind))
    heads = [Column(str(layer), "Layer") for layer in sorted(found)]
    first = (Column("Encoder", numeric=False), Column("Measure", numeric=False))
    caption = "What each layer holds, the mean over seeds"
    return Table(caption, (*first, *heads), tuple(rows), "layers")


def alignment_table(comparison: Comparison) -> Table | None:
    """Linear CKA of the last layers of any two encoders on the same held-out images.

    Encoders of the same seed are compared, the mean over seeds; the diagonal compares the seeds of
    one group. None without kept features, or where only one encoder has them.
    """
    groups = [group for group in _groups(comparison) if any(map(_path_exists, group.finished))]
    kept = {g.label: {r.seed: _load(r) for r in g.finished if _path_exists(r)} for g in groups}
    if sum(len(runs) for runs in kept.values()) < 2:
        return None
    rows = []
    for group in groups:
        cells = [Cell(group.label)]
        for other in groups:
            mine, theirs = kept[group.label], kept[other.label]
            if group is other:
                pairs = [(mine[a], mine[b]) for a, b in combinations(mine, 2)]
            else:
                pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
            values = [linear_cka(*pair) for pair in pairs if _same_images(*pair)]
            cells.append(Cell(f"{sum(values) / len(values):.2f}" if values else MISSING))
        rows.append(Row(tuple(cells), group.kind))
    heads = [Column(group.label) for group in groups]
    caption = (
        "Linear CKA of the last layers on the same images, between encoders of the same seed; on "
        "the diagonal between seeds"
    )
    return Table(caption, (Column("Encoder", numeric=False), *heads), tuple(rows), "alignment")


Kept = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Features (n, D) of the last layer, and the ids of the images."""


def linear_cka(first: Kept, second: Kept) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019), from 0 to 1."""
    x, y = (f.astype(np.float64) - f.mean(0, dtype=np.float64) for f, _ in (first, second))
    own = np.square(x.T @ x).sum() * np.square(y.T @ y).sum()
    return float(np.square(y.T @ x).sum() / np.sqrt(own)) if own > 0 else 0.0


def _same_images(first: Kept, second: Kept) -> bool:
    return np.array_equal(first[1], second[1])


def _path_exists(run: Run) -> bool:
    return (run.folder / "analysis" / "features.npz").is_file()


def _load(run: Run) -> Kept:
    path = run.folder / "analysis" / "features.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["features"][-1], file["sample_ids"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read as features ({error})") from error
