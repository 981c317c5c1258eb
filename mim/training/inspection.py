"""Shows what a config would train on: numbers of a data set, and a sheet of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mim.core.config import Config, DataConfig
from mim.core.files import write_atomic
from mim.core.rng import image_keys
from mim.data import (
    ImageSource,
    Split,
    UnreadableImage,
    eval_loader,
    normalize,
    open_source,
    train_transform,
)
from mim.data.sources.base import spread_indices
from mim.model import build_model
from mim.training.pictures import masked_pixels, sheet

_EPOCHS = 2  # on the sheet
_ALL_BUT = 1 - 1e-9  # tolerates any number of unreadable images


@dataclass
class Inspection:
    """What was found in one split."""

    split: Split
    images: int
    looked_at: int
    """Number of images that were decoded."""
    per_class: dict[str, int]
    """Images of each class; empty without labels."""
    modes: dict[str, int] = field(default_factory=dict)
    """PIL's modes, or the channels of arrays -> images."""
    sides: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """width and height -> the smallest, the median, the largest, in pixels."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    fingerprint: str = ""
    """Digest of names and labels."""

    def lines(self) -> list[str]:
        """Returns the findings in words."""
        found = [f"{self.split}: {self.images:,} images, {len(self.per_class)} classes"]
        if self.per_class:
            counts = sorted(self.per_class.values())
            few = min(self.per_class, key=lambda name: self.per_class[name])
            many = max(self.per_class, key=lambda name: self.per_class[name])
            found.append(
                f"  a class: {counts[0]} ({few}) to {counts[-1]} ({many}), "
                f"median {counts[len(counts) // 2]}"
            )
        for side, (low, middle, high) in self.sides.items():
            found.append(f"  {side}: {low} to {high}, median {middle}")
        modes = ", ".join(f"{mode} {count:,}" for mode, count in self.modes.items())
        found.append(f"  modes: {modes} (of {self.looked_at:,} looked at)")
        found.append(f"  unreadable: {len(self.unreadable)}")
        found += [f"    {name}: {reason}" for name, reason in self.unreadable.items()]
        return found


def _lenient(config: DataConfig) -> DataConfig:
    """Fills in what may not be known yet: statistics, and the fraction of unreadable images."""
    return replace(
        config,
        max_unreadable=_ALL_BUT,
        mean=config.mean or (0.0,) * config.channels,
        std=config.std or (1.0,) * config.channels,
    )


def _spread(source: ImageSource, images: int | None) -> list[int]:
    return spread_indices(len(source), len(source) if images is None else images)


def inspect_split(config: DataConfig, split: Split, images: int | None = None) -> Inspection:
    """Decodes the images of a split, or ``images`` of them spread over it, and counts their kinds.

    Raises:
        UserError: if there are none.
    """
    source = open_source(_lenient(config), split)
    chosen = _spread(source, images)
    per_class = {}
    if source.labels is not None:
        counts = torch.bincount(source.labels, minlength=len(source.classes)).tolist()
        names = source.classes or [str(label) for label in range(len(counts))]
        per_class = dict(zip(names, counts, strict=True))
    found = Inspection(split, len(source), len(chosen), per_class, fingerprint=source.fingerprint())
    modes: Counter[str] = Counter()
    sizes = []
    for index in chosen:
        try:
            image = source.image(index)
        except UnreadableImage as error:
            found.unreadable[error.name] = error.reason
            continue
        if isinstance(image, np.ndarray):
            modes["RGB" if image.shape[2] == 3 else f"{image.shape[2]} channels"] += 1
            sizes.append((image.shape[1], image.shape[0]))
        else:
            modes[image.mode] += 1
            sizes.append(image.size)
    found.modes = dict(modes.most_common())
    for axis, side in enumerate(("width", "height")):
        values = sorted(size[axis] for size in sizes)
        if values:
            found.sides[side] = (values[0], values[len(values) // 2], values[-1])
    return found


def statistics(
    config: DataConfig, images: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes mean and standard deviation of each channel of training images, scaled to [0, 1].

    Images are as evaluations see them: scaled to ``data.image_size``, the centre, not augmented.
    Sums are integers, so that neither order nor batches change a digit.

    Args:
        config: names the images.
        images: read this many, spread over the set; None reads all.

    Raises:
        UserError: if more images than ``data.max_unreadable`` cannot be read.
    """
    known = replace(_lenient(config.as_square()), max_unreadable=config.max_unreadable)
    source = open_source(known, "train")
    total = torch.zeros(2, config.channels, dtype=torch.int64)
    count = 0
    for batch in eval_loader(
        source, known, indices=None if images is None else _spread(source, images)
    ):
        pixels = batch.images.long()  # (B, C, H, W)
        total += torch.stack([pixels.sum((0, 2, 3)), pixels.square().sum((0, 2, 3))])
        count += pixels[:, 0].numel()
    first, second = (total.double() / count).unbind()
    std = (second - first.square()).clamp(min=0).sqrt() / 255
    return tuple((first / 255).tolist()), tuple(std.tolist())


@torch.no_grad()
def sample_sheet(config: Config, count: int = 8) -> Image.Image:
    """Draws training images as they are, and as two epochs see them, without and with masks."""
    data = config.data.as_square()
    source = open_source(replace(data, max_unreadable=_ALL_BUT), "train")
    chosen = spread_indices(len(source), count)
    (batch,) = eval_loader(source, data, indices=chosen, batch_size=len(chosen))
    ids = batch.sample_ids
    indices = {sample: index for index, sample in enumerate(source.sample_ids.tolist())}
    pictures = [source.image(indices[sample]) for sample in ids.tolist()]
    model = build_model(config).eval()
    columns = [batch.images.permute(0, 2, 3, 1).numpy()]
    for epoch in range(_EPOCHS):
        keys = image_keys(config.seed, epoch, ids, purpose="augment")
        images = normalize(train_transform(pictures, keys, data), source.mean, source.std)
        keys = image_keys(config.seed, epoch, ids, purpose="mask")
        mask = model.draw_mask(images, keys, epoch=epoch, sample_ids=ids)
        columns += masked_pixels(model, images, mask, source)
    return sheet(columns)


def inspect(
    config: Config,
    *,
    images: int | None = None,
    output: Path | None = None,
    pictured: int = 8,
    splits: Sequence[Split] = ("train", "val"),
) -> dict[Split, Inspection]:
    """Inspects the splits that a config would train on.

    Args:
        config: of a run.
        images: decode this many of each split; None decodes all.
        output: PNG file for :func:`sample_sheet`; None draws none.
        pictured: images of the sheet.
        splits: to inspect.

    Raises:
        UserError: if a split has no images.
    """
    found = {split: inspect_split(config.data, split, images) for split in splits}
    if output is not None:
        drawn = sample_sheet(config, pictured)
        write_atomic(output, lambda temporary: drawn.save(temporary, format="PNG"))
    return found
