"""The doctor of a data set: what it holds, what is wrong with it, and whether a run would start.

It never stops at the first fault. A sheet shows images, their crops and masks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mim.core.config import Config, DataConfig
from mim.core.errors import UserError
from mim.core.files import write_atomic
from mim.core.rng import image_keys
from mim.data import (
    Picture,
    Split,
    Subset,
    UnreadableImage,
    eval_loader,
    normalize,
    open_source,
    open_weights,
    prepare,
    steps_per_epoch,
    train_transform,
)
from mim.data.detection import detect
from mim.data.images.transforms import size_of
from mim.data.measuring import statistics as measured_statistics
from mim.data.sources.base import spread_indices
from mim.data.unreadable import Fault, Ledger
from mim.model import build_model
from mim.training.pictures import masked_pixels, sheet, shown_pixels

_EPOCHS = 2  # on the sheet
_ALL_BUT = 1 - 1e-9  # tolerates any number of unreadable images
_FEW_LEVELS = 32
_CUT_OFF = 0.05  # share of the values that a range may cut off in silence
_SHOWN = 10  # of a long list
_TITLE = 16  # pixels


@dataclass
class Values:
    """The values of the images of one mode."""

    low: float = float("inf")
    high: float = float("-inf")
    levels: int = 0
    """The most different values in one image, as it is read."""
    cut_off: float = 0.0
    """The largest share of an image's values that lies outside the range."""


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
    """PIL's modes, or the type and channels of values -> images."""
    sides: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """width and height -> the smallest, the median, the largest, in pixels."""
    values: dict[str, Values] = field(default_factory=dict)
    """Mode -> its values."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    misfits: dict[str, str] = field(default_factory=dict)
    """Name -> why an image that can be read cannot be used."""
    channels: set[int] = field(default_factory=set)
    """Of the images that cannot be used."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Ending -> files that are not read."""
    fingerprint: str = ""
    """Digest of names and labels."""

    def lines(self) -> list[str]:
        """Returns the findings in words."""
        classes = f"{len(self.per_class)} classes" if self.per_class else "no labels"
        found = [f"{self.split}: {self.images:,} images, {classes}"]
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
        found.append(f"  modes: {modes or 'none'} (of {self.looked_at:,} looked at)")
        for mode, values in self.values.items():
            found += [f"  values of {mode}: {values.low:g} to {values.high:g}"]
            found += _warnings(mode, values)
        if self.left_out:
            kinds = (f"{n:,} {ending or 'without ending'}" for ending, n in self.left_out.items())
            found.append(f"  files that are not read: {', '.join(kinds)}")
        found.append(f"  unreadable: {len(self.unreadable)}")
        found += [f"    {line}" for line in _listed(self.unreadable)]
        if self.misfits:
            found.append(f"  of no use: {len(self.misfits)}")
            found += [f"    {line}" for line in _listed(self.misfits)]
        return found


def _warnings(mode: str, values: Values) -> Iterator[str]:
    if 1 < values.levels < _FEW_LEVELS and mode not in ("1", "P", "PA"):
        yield (
            f"    warning: no image has more than {values.levels} different values as it is read; "
            "is data.range what it should be?"
        )
    if values.cut_off > _CUT_OFF:
        yield f"    warning: data.range cuts off {values.cut_off:.0%} of the values of an image"


def _listed(found: dict[str, str]) -> list[str]:
    lines = [f"{name}: {reason}" for name, reason in list(found.items())[:_SHOWN]]
    return lines + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])


@dataclass
class Findings:
    """What was found in a data set."""

    seen: str
    """What data.source=auto sees; empty for another source."""
    splits: dict[Split, Inspection]
    problems: list[str]
    """What is wrong with all of it, such as empty classes."""
    duplicates: list[list[str]]
    """Names of images with the same content."""
    refusal: str
    """Why a run would not start or not end; empty if it would."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings of ``data`` without which it would not, by which it would."""
    command: str = ""
    """What would start it; the caller knows."""

    def lines(self) -> list[str]:
        """Returns the findings in words; the last line says whether a run would start."""
        found = [self.seen] if self.seen else []
        found += [line for part in self.splits.values() for line in part.lines()]
        found += [f"problem: {problem}" for problem in self.problems]
        if self.duplicates:
            count = sum(len(names) - 1 for names in self.duplicates)
            found.append(f"duplicates: {count:,}, by their content")
            found += [f"  {' = '.join(names[:4])}" for names in self.duplicates[:_SHOWN]]
            both = sum(len({n.partition(":")[0] for n in names}) > 1 for names in self.duplicates)
            if both:
                found.append(f"  warning: {both:,} of them are in train and in val")
        if self.refusal:
            return [*found, f"mim pretrain would not run: {self.refusal}"]
        changed = "".join(f" --data.{name} {value}" for name, value in self.changes.items())
        return [*found, f"mim pretrain would start: {self.command}{changed}"]


def _lenient(config: DataConfig) -> DataConfig:
    """Fills in what may not be known yet: statistics, and the fraction of unreadable images."""
    return replace(
        config,
        max_unreadable=_ALL_BUT,
        mean=config.mean or (0.0,) * config.channels,
        std=config.std or (1.0,) * config.channels,
    )


def inspect_split(
    config: DataConfig,
    split: Split,
    images: int | None = None,
    digests: dict[str, list[str]] | None = None,
) -> Inspection:
    """Decodes the images of a split, or ``images`` of them spread over it, and counts their kinds.

    Args:
        config: names the images.
        split: train or val.
        images: how many; None takes all.
        digests: content -> names, to which those of this split are added.

    Raises:
        UserError: if there are none.
    """
    source = open_source(_lenient(config), split)
    chosen = spread_indices(len(source), len(source) if images is None else images)
    per_class = {}
    if source.labels is not None:
        counts = torch.bincount(source.labels, minlength=len(source.classes)).tolist()
        names = source.classes or [str(label) for label in range(len(counts))]
        per_class = dict(zip(names, counts, strict=True))
    found = Inspection(split, len(source), len(chosen), per_class, fingerprint=source.fingerprint())
    found.left_out = dict(source.left_out)
    modes: Counter[str] = Counter()
    sizes = []
    for index in chosen:
        try:
            image, raw = source.image(index), source.raw(index)
            content = source.encoded(index)
        except UnreadableImage as error:
            found.unreadable[error.name] = error.reason
            continue
        values = np.asarray(image) if raw is None else raw.values
        mode = _mode(image, values)
        modes[mode] += 1
        sizes.append(size_of(image))
        try:
            image = prepare(image, config.channels)
        except UserError as error:
            found.misfits[source.describe(index)] = str(error)
            found.channels.add(values.shape[2])
        _note_values(found.values.setdefault(mode, Values()), values, np.asarray(image))
        if digests is not None:
            data = values.tobytes() if content is None else content
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            digests.setdefault(digest, []).append(f"{split}: {source.describe(index)}")
    found.modes = dict(modes.most_common())
    for axis, side in ((1, "width"), (0, "height")):
        lengths = sorted(size[axis] for size in sizes)
        if lengths:
            found.sides[side] = (lengths[0], lengths[len(lengths) // 2], lengths[-1])
    return found


def _mode(image: Picture, values: np.ndarray) -> str:
    """PIL's mode, or type and channels of what PIL has no mode for."""
    if isinstance(image, Image.Image):
        return image.mode
    channels = values.shape[2]
    if values.dtype == np.uint8:
        return "RGB" if channels == 3 else f"{channels} channels"
    return f"{values.dtype} x {channels}"


def _note_values(found: Values, stored: np.ndarray, read: np.ndarray) -> None:
    """Adds an image, by its values as they are stored and as they are read."""
    found.low = min(found.low, float(np.nanmin(stored)))
    found.high = max(found.high, float(np.nanmax(stored)))
    found.levels = max(found.levels, len(np.unique(read)))
    if read.dtype == np.float32:
        ends = stored.min(), stored.max()
        outside = ((read == 0) & (stored > ends[0])) | ((read == 1) & (stored < ends[1]))
        found.cut_off = max(found.cut_off, float(outside.mean()))


def statistics(
    config: DataConfig, images: int | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Computes mean and standard deviation of each channel of training images, scaled to [0, 1].

    Images are as evaluations see them: scaled to ``data.image_size``, the centre, not augmented.

    Args:
        config: names the images.
        images: read this many, spread over the set; None reads all.

    Raises:
        UserError: if more images than ``data.max_unreadable`` cannot be read.
    """
    known = replace(_lenient(config), max_unreadable=config.max_unreadable)
    source = open_source(known, "train")
    wanted = len(source) if images is None else images
    return measured_statistics(source, known, spread_indices(len(source), wanted))


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
    columns = [shown_pixels(batch.images, source)]
    for epoch in range(_EPOCHS):
        keys = image_keys(config.seed, epoch, ids, purpose="augment")
        images = normalize(train_transform(pictures, keys, data), source.mean, source.std)
        keys = image_keys(config.seed, epoch, ids, purpose="mask")
        mask = model.draw_mask(images, keys, epoch=epoch, sample_ids=ids)
        columns += masked_pixels(model, images, mask, source)
    titles = ["whole", *(f"{kind} {n + 1}" for n in range(_EPOCHS) for kind in ("epoch", "masked"))]
    where = config.data.path or config.data.source
    return _titled(sheet(columns), titles, f"{where}: {len(source):,} training images")


def _titled(drawn: Image.Image, titles: Sequence[str], head: str) -> Image.Image:
    """Adds a line above a sheet, and a title above each of its columns."""
    whole = Image.new("RGB", (drawn.width, drawn.height + 2 * _TITLE), "white")
    whole.paste(drawn, (0, 2 * _TITLE))
    pen = ImageDraw.Draw(whole)
    fits = max(drawn.width // 6, 8)  # of the letters of PIL's own type
    pen.text((2, 2), head if len(head) <= fits else f"...{head[3 - fits :]}", fill="black")
    for place, title in enumerate(titles):
        pen.text((place * drawn.width // len(titles) + 2, _TITLE + 2), title, fill="black")
    return whole


def refusal_of(config: Config, unreadable: dict[Split, list[Fault]]) -> str:
    """Says why ``mim pretrain`` would not start; empty if it would.

    Args:
        config: of the run.
        unreadable: images that turned out to be so when they were decoded.
    """
    try:
        train = open_source(config.data, "train")
        val = open_source(replace(config.data, measured=train.measured), "val")
        for source, faults in zip((train, val), unreadable.values(), strict=False):
            ledger = Ledger("train", len(source), config.data.max_unreadable)
            ledger.split = "train" if source is train else "val"
            ledger.add(faults)
        open_weights(train, config.data)
        steps_per_epoch(train, config.data)
        model = build_model(config)
        few = Subset(train, range(min(len(train), 2)))
        for batch in eval_loader(few, config.data, patch_size=model.patch_size):
            normalize(batch.images, train.mean, train.std)
    except UserError as error:
        return str(error)
    return ""


def inspect(
    config: Config,
    *,
    images: int | None = None,
    output: Path | None = None,
    pictured: int = 8,
    splits: Sequence[Split] = ("train", "val"),
) -> Findings:
    """Inspects the splits that a config would train on, whatever is wrong with them.

    Args:
        config: of a run.
        images: decode this many of each split; None decodes all.
        output: PNG file for :func:`sample_sheet`; None draws none.
        pictured: images of the sheet.
        splits: to inspect.
    """
    data, seen, problems = config.data, "", []
    if data.source == "auto":
        try:
            source, words = detect(data.path)
            seen = f"{data.path}: {words} (data.source={source})"
            data = replace(data, source=source, measured=replace(data.measured, source=source))
        except UserError as error:
            problems.append(str(error))
    digests: dict[str, list[str]] = {}
    found: dict[Split, Inspection] = {}
    for split in splits:
        flat = {"imagefolder": "flat", "shards": "flat_shards"}.get(data.source)
        # There are images, whatever is wrong with their classes.
        for tried in (data, replace(data, source=flat)) if flat else (data,):
            try:
                found[split] = inspect_split(tried, split, images, digests)
                break
            except UserError as error:
                problems.append(str(error))
    faults: dict[Split, list[Fault]] = {
        split: [Fault(*item) for item in part.unreadable.items()] for split, part in found.items()
    }
    refusal = refusal_of(config, faults)
    misfits = [reason for part in found.values() for reason in part.misfits.values()]
    problems = [problem for problem in dict.fromkeys(problems) if problem != refusal]
    if output is not None and not refusal and not misfits:
        drawn = sample_sheet(config, pictured)
        write_atomic(output, lambda temporary: drawn.save(temporary, format="PNG"))
    changes = _changes(config.data, found)
    if (refusal or misfits) and changes:
        changed = replace(config, data=replace(config.data, **changes))
        again = inspect(changed, images=images, output=output, pictured=pictured, splits=splits)
        if not again.refusal:
            return replace(again, changes=changes)
        problems.append(again.refusal)
    twice = [names for names in digests.values() if len(names) > 1]
    refusal = refusal or (misfits[0] if misfits else "")
    return Findings(seen, found, problems, twice, refusal)


def _changes(data: DataConfig, found: dict[Split, Inspection]) -> dict[str, Any]:
    """Settings that do not fit the images, and values that do."""
    changes: dict[str, Any] = {}
    channels = set[int]().union(*(part.channels for part in found.values()))
    if len(channels) == 1:
        changes["channels"] = channels.pop()
    images = found["train"].images if "train" in found else 0
    if 0 < images < data.batch_size:
        changes["batch_size"] = 1 << max(images // 2, 1).bit_length() - 1
    return changes
