"""The test images on which the groups of a comparison disagree most, kept as thumbnails.

Two encoders of the same accuracy may fail on different images; which ones says more about a regime
than the third digit of a mean. ``disagreement.npz`` in the comparison's folder holds
``evaluation``, ``sample_ids`` (n,), ``images`` (n, H, W, C) uint8 and the names of the classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mim.core.config import DataConfig
from mim.core.files import write_arrays
from mim.data import eval_loader, open_source
from mim.evaluate.predictions import read_predictions

FILE = "disagreement.npz"
_IMAGES = 12
_SIDE = 96


def write_disagreement(
    output: Path, groups: Mapping[str, Sequence[Path]], evaluation: str, data: DataConfig
) -> bool:
    """Find the images and keep them; return whether there were any.

    Args:
        output: the comparison's folder.
        groups: label -> run folders of its seeds; those without answers are left out.
        evaluation: whose answers count, the primary one.
        data: where the test images come from.
    """
    found = {
        label: [read_predictions(run).get(evaluation, {}) for run in runs]
        for label, runs in groups.items()
    }
    kept = {label: [a for a in arrays if "accuracy" in a] for label, arrays in found.items()}
    kept = {label: arrays for label, arrays in kept.items() if arrays}
    every = [arrays for own in kept.values() for arrays in own]
    if len(kept) < 2 or any(
        not np.array_equal(every[0]["sample_ids"], arrays["sample_ids"]) for arrays in every
    ):
        return False
    shares = np.stack([np.mean([a["accuracy"] for a in own], axis=0) for own in kept.values()])
    chosen = most_disputed(shares, every[0]["sample_ids"])
    source = open_source(data, "val")
    ids = every[0]["sample_ids"][chosen]
    places = [int((source.sample_ids == int(i)).nonzero()[0, 0]) for i in ids]
    if not places:
        return False
    images = torch.cat([b.images for b in eval_loader(source, data.as_square(), indices=places)])
    content = {
        "evaluation": np.array(evaluation),
        "sample_ids": ids,
        "images": thumbnails(images),
        "classes": np.array(source.classes, dtype=str),
    }
    write_arrays(output / FILE, content)
    return True


def most_disputed(shares: NDArray[np.float64], sample_ids: NDArray[np.int64]) -> list[int]:
    """Positions of the images on which groups differ most, ties by id; none where all agree.

    Args:
        shares: (G, I), of the seeds of each group that were right.
        sample_ids: (I,).
    """
    spread = np.ptp(shares, axis=0)
    order = np.lexsort((sample_ids, -shares.var(axis=0), -spread))
    return [int(place) for place in order[:_IMAGES] if spread[place] > 0]


def thumbnails(images: torch.Tensor) -> NDArray[np.uint8]:
    """(n, C, H, W) of any range to (n, H, W, 1 or 3) uint8, 96 pixels a side at the most."""
    pixels = images.float()
    pixels = pixels if pixels.shape[1] in (1, 3) else pixels[:, :1]
    if images.dtype != torch.uint8:
        low, high = 0.0, 1.0
        if pixels.min() < 0 or pixels.max() > 1:  # no pixels as a screen has them: stretch
            low, high = (float(np.percentile(pixels.numpy(), q)) for q in (1, 99))
        pixels = (pixels - low) / max(high - low, 1e-12) * 255
    factor = _SIDE / max(pixels.shape[2:])
    if factor < 1:
        pixels = torch.nn.functional.interpolate(pixels, scale_factor=factor, mode="area")
    whole = pixels.round().clamp(0, 255).to(torch.uint8)
    return np.asarray(whole.permute(0, 2, 3, 1).numpy())
