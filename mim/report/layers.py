"""What an analysis of layers found: each layer's numbers, and how alike the encoders are."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from mim.report.collect import Comparison, Group, Run, read_arrays
from mim.report.measures import MISSING, summarize
from mim.report.tables import Cell, Column, Row, Table, text_columns

_LAYER = re.compile(r"analysis\.layer_(\d+)_(\w+)")
# Name -> (heading, printed number over stored number, decimals).
_MEASURES = {
    "accuracy": ("linear probe (%)", 100.0, 1),
    "attention_distance": ("attention distance (pixels)", 1.0, 1),
    "effective_rank": ("effective rank", 1.0, 1),
}


def _groups(comparison: Comparison) -> list[Group]:
    return [group for group in (*comparison.groups, *comparison.references) if group.finished]


def layers_table(comparison: Comparison) -> Table:
    """Every layer of every encoder, the mean over seeds."""
    layers = sorted(
        {int(m[1]) for key in comparison.evaluation_keys if (m := _LAYER.fullmatch(key))}
    )
    rows = []
    for group in _groups(comparison):
        for name, (label, scale, decimals) in _MEASURES.items():
            cells = []
            for layer in layers:
                summary = summarize(group.values(f"analysis.layer_{layer}_{name}").values())
                shown = MISSING if summary is None else f"{scale * summary.mean:.{decimals}f}"
                cells.append(Cell(shown))
            if any(cell.text != MISSING for cell in cells):
                rows.append(Row([Cell(group.label), Cell(label), *cells], group.kind))
    columns = [*text_columns("Encoder", "Measure"), *(Column(str(n), "Layer") for n in layers)]
    return Table("What each layer holds, the mean over seeds", columns, rows, "layers")


def alignment_table(comparison: Comparison) -> Table:
    """Linear CKA of the last layers of any two encoders on the same held-out images.

    Encoders of the same seed are compared, the mean over seeds; the diagonal compares the seeds of
    one group. It has rows where more than one encoder has kept its features.
    """
    features = [
        (group, own)
        for group in _groups(comparison)
        if (own := {run.seed: kept for run in group.finished if (kept := _features(run))})
    ]
    if sum(len(runs) for _, runs in features) < 2:
        features = []
    rows = []
    for group, mine in features:
        cells = [Cell(group.label)]
        for other, theirs in features:
            if group is other:
                pairs = [(mine[a], mine[b]) for a, b in combinations(mine, 2)]
            else:
                pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
            values = [linear_cka(a, b) for a, b in pairs if np.array_equal(a[1], b[1])]
            cells.append(Cell(f"{sum(values) / len(values):.2f}" if values else MISSING))
        rows.append(Row(cells, group.kind))
    caption = (
        "Linear CKA of the last layers on the same images, between encoders of the same seed; on "
        "the diagonal between seeds"
    )
    columns = [*text_columns("Encoder"), *(Column(group.label) for group, _ in features)]
    return Table(caption, columns, rows, "alignment")


Features = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Features (n, D) of the last layer, and the ids of the images."""


def linear_cka(first: Features, second: Features) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019), from 0 to 1."""
    x, y = (f.astype(np.float64) - f.mean(0, dtype=np.float64) for f, _ in (first, second))
    own = np.square(x.T @ x).sum() * np.square(y.T @ y).sum()
    return float(np.square(y.T @ x).sum() / np.sqrt(own)) if own > 0 else 0.0


def _features(run: Run) -> Features | None:
    path = run.folder / "analysis" / "features.npz"
    arrays = read_arrays(path, "features", ("features", "sample_ids"))
    return None if arrays is None else (arrays["features"][-1], arrays["sample_ids"])
