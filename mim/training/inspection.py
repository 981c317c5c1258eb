"""What a config would train on: numbers of a data set, and a sheet of its images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
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
from mim.model import build_model
from mim.training.pictures import masked_pixels, sheet, spread_indices

_EPOCHS = 2  # of the sheet: an image is cut and masked anew in each
_ALL_BUT = 1 - 1e-9  # inspecting goes on whatever is unreadable


@dataclass
class Inspection:
    """What was found in one split."""

    split: Split
    images: int
    """How many there are."""
    looked_at: int
    """How many of them were decoded."""
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
        """For people."""
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
    """The config without what may not be known yet: statistics, and the share of damage."""
    return replace(
        config,
        max_unreadable=_ALL_BUT,
        mean=config.mean or (0.0,) * config.channels,
        std=config.std or (1.0,) * config.channels,
    )


def _spread(source: ImageSource, images: int | None) -> list[int]:
    return spread_indices(len(source), len(source) if images is None else images)


def inspect_split(config: DataConfig, split: Split, images: int | None = None) -> Inspection:
    """Decodes the images of a split and counts what they are.

    Args:
        config: says which images.
        split: "train" or "val".
        images: decode so many, spread over the set; by default all.

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
    for place, side in enumerate(("width", "height")):
        values = sorted(size[place] for size in sizes)
        if values:
            found.sides[side] = (values[0], values[len(values) // 2], values[-1])
    return found


def statistics(
    config: DataConfig, images: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of the training images, on the scale 0 to 1.

    Images are as evaluations see them: scaled to ``data.image_size``, the centre, not augmented.
    Sums are whole numbers, so that neither order nor batches change a digit.

    Args:
        config: says which images.
        images: read so many, spread over the set; by default all.

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
def sample_sheet(config: Config, images: int = 8) -> Image.Image:
    """Training images as they are, and as two epochs see them, without and with their mask.

    Args:
        config: of a run; its seed draws the crops and masks.
        images: how many, spread over the training images.
    """
    data = config.data.as_square()
    source = open_source(replace(data, max_unreadable=_ALL_BUT), "train")
    chosen = spread_indices(len(source), images)
    (whole,) = eval_loader(source, data, indices=chosen, batch_size=len(chosen))
    places = {int(sample): place for place, sample in enumerate(source.sample_ids.tolist())}
    pictures = [source.image(places[int(sample)]) for sample in whole.sample_ids.tolist()]
    model = build_model(config).eval()
    columns = [_pixels(whole.images)]
    for epoch in range(_EPOCHS):
        keys = image_keys(config.seed, epoch, whole.sample_ids, purpose="augment")
        cut = train_transform(pictures, keys, data)
        columns.append(_pixels(cut))
        keys = image_keys(config.seed, epoch, whole.sample_ids, purpose="mask")
        seen = normalize(cut, source.mean, source.std)
        mask = model.draw_mask(seen, keys, epoch=epoch, sample_ids=whole.sample_ids)
        columns.append(masked_pixels(model, seen, mask, source)[1])
    return sheet(columns)


def _pixels(images: torch.Tensor) -> NDArray[np.uint8]:
    return images.permute(0, 2, 3, 1).numpy()


def inspect(
    config: Config,
    *,
    images: int | None = None,
    output: Path | None = None,
    pictured: int = 8,
    splits: Sequence[Split] = ("train", "val"),
) -> dict[Split, Inspection]:
    """What a config would train on.

    Args:
        config: of a run.
        images: decode so many of each split, by default all.
        output: PNG file for :func:`sample_sheet`; None draws none.
        pictured: images of the sheet.
        splits: which.

    Returns:
        Split -> :class:`Inspection`.

    Raises:
        UserError: if a split has no images.
    """
    found = {split: inspect_split(config.data, split, images) for split in splits}
    if output is not None:
        drawn = sample_sheet(config, pictured)
        write_atomic(output, lambda temporary: drawn.save(temporary, format="PNG"))
    return found
