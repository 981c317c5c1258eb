"""The test images on which the groups of a comparison disagree most, kept as thumbnails.

Two encoders of the same accuracy may fail on different images; which ones says more about a regime
than the third digit of a mean. ``disagreement.npz`` in the comparison's folder holds
``evaluation``, ``sample_ids`` (n,), ``images`` (n, H, W, C) uint8 and the names of the classes; of
more images, ``measured_ids`` (m,) and their ``statistics`` (m, 4), whose names are ``statistic``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mim.core.config import DataConfig
from mim.core.files import write_arrays
from mim.data import eval_loader, open_source
from mim.evaluate.predictions import read_predictions

FILE = "disagreement.npz"
STATISTICS = ("brightness", "contrast", "colour", "detail")
_IMAGES = 12
_MEASURED = 2000
"""Test images whose statistics are taken, at the most: each has to be decoded once more."""
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
    answered = every[0]["sample_ids"]
    chosen = most_disputed(shares, answered)
    if not chosen:
        return False
    source, square = open_source(data, "val"), data.as_square()
    place_of = {sample_id: place for place, sample_id in enumerate(source.sample_ids.tolist())}

    def batches(positions: Sequence[int]) -> Iterator[torch.Tensor]:
        places = [place_of[int(answered[position])] for position in positions]
        return (batch.images for batch in eval_loader(source, square, indices=places))

    few = np.unique(np.linspace(0, len(answered) - 1, _MEASURED).astype(int)).tolist()
    content = {
        "evaluation": np.array(evaluation),
        "sample_ids": answered[chosen],
        "images": thumbnails(torch.cat([*batches(chosen)])),
        "classes": np.array(source.classes, dtype=str),
        "statistic": np.array(STATISTICS),
        "measured_ids": answered[few],
        "statistics": torch.cat([image_statistics(images) for images in batches(few)]).numpy(),
    }
    write_arrays(output / FILE, content)
    return True


def most_disputed(shares: NDArray[np.float64], sample_ids: NDArray[np.int64]) -> list[int]:
    """Positions of the images on which groups differ most, ties by id; none where all agree.

    What differs by rounding errors alone is tied.

    Args:
        shares: (G, I), of the seeds of each group that were right.
        sample_ids: (I,).
    """
    spread, variance = np.ptp(shares, axis=0).round(9), shares.var(axis=0).round(9)
    order = np.lexsort((sample_ids, -variance, -spread))
    return [int(place) for place in order[:_IMAGES] if spread[place] > 0]


def image_statistics(images: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) of any range -> (n, 4): each image by the four of ``STATISTICS``.

    Brightness is the mean of all values, contrast the standard deviation of the gray ones, colour
    the mean spread of a pixel over its channels, and detail the mean step between neighbouring
    pixels over the contrast: large for fine textures, small for smooth shapes of any contrast.
    """
    pixels = images.double()
    gray = pixels.mean(1)  # (n, H, W)
    contrast = gray.std((1, 2), correction=0)
    steps = gray.diff(dim=1).abs().mean((1, 2)) + gray.diff(dim=2).abs().mean((1, 2))
    colour = pixels.std(1, correction=0).mean((1, 2))
    detail = steps / contrast.clamp_min(1e-12)
    return torch.stack([pixels.mean((1, 2, 3)), contrast, colour, detail], dim=1)


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
