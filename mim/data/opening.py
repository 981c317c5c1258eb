"""From a config to the images of a split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mim.core.config import DataConfig
from mim.core.errors import blaming, setting_error
from mim.core.progress import note_once
from mim.data.detection import detect
from mim.data.images.transforms import LUMINANCE
from mim.data.labels import check_ids, check_labels
from mim.data.measuring import measure
from mim.data.sources.base import SOURCES, ImageSource, Split, Subset, holdout
from mim.data.storage.cache import cached
from mim.data.subset import choose
from mim.data.unreadable import Fault, Ledger


def open_source(config: DataConfig, split: Split, folder: Path | None = None) -> ImageSource:
    """The images of a split, "train" or "val".

    What ``auto`` leaves to be found is found by looking at the training images, and stands in
    ``measured``. A set without a val split gives ``data.val_fraction`` of its images to "val" by
    :func:`holdout`. ``mean`` and ``std`` are those of the config, or else measured or the set's
    own, in ``data.channels`` channels. With ``data.val_from_train`` both splits are parts of the
    training images. Unreadable images are recorded in ``folder``, the run
    folder, if there is one.

    Raises:
        UserError: for an unknown source, a path that it does not read, a missing or empty folder,
            an empty class, more unreadable images than ``data.max_unreadable``, a failed download,
            channels that the images cannot have, or a cache that has no room.
    """
    config, source, faults = _measured(config, split)
    with blaming("data.source", config.source):
        check_ids(source.sample_ids)
        check_labels(source.labels, source.classes, len(source))
    source.ledger = Ledger(split, len(source), config.max_unreadable, folder)
    source.ledger.add(faults)
    source.mean, source.std = _statistics(source, config)
    source.measured, source.show = config.measured, config.show
    source.deep = config.range != "high_byte" and source.has_deep()
    if config.cache == "none":
        return source
    return cached(source, config)


def _measured(config: DataConfig, split: Split) -> tuple[DataConfig, ImageSource, list[Fault]]:
    """The config with all that ``auto`` stands for, the images of a split, and unreadable ones."""
    if config.source == "auto":
        name, words = config.measured.source, ""
        if name is None:
            name, words = detect(config.path)
            if split == "train":
                note_once(f"data.source=auto: {config.path} holds {words} ({name})")
        config = replace(config, source=name, measured=replace(config.measured, source=name))
    source = _opened(config, split)
    faults = source.check()  # it also sees how many bits the images have

    def train(changed: DataConfig) -> ImageSource:
        same = split == "train" and changed.measured.range == config.measured.range
        return source if same else _opened(changed, "train")

    measured = measure(source, config, train)
    if measured.range != config.measured.range:
        config = replace(config, measured=measured)
        if split == "train" and measured.range is not None:
            low, high = measured.range
            where = config.path or config.source
            note_once(f"data.range=auto: {low:g} to {high:g} become 0 to 1 in {where}")
        source = _opened(config, split)
    return replace(config, measured=measured), source, faults


def _opened(config: DataConfig, split: Split) -> ImageSource:
    """The images of a split, those that ``data.subset`` leaves."""
    name = config.source
    family = f"{name.partition('/')[0]}/NAME"  # torchvision/CIFAR10 is one of torchvision/NAME
    kind = family if name not in SOURCES and family in SOURCES else name
    maker = SOURCES.get(kind)
    # A run with a fingerprint was trained on these images, whatever its path says.
    reads = getattr(maker, "reads_path", True)
    if config.path is not None and not reads and config.fingerprint is None:
        reason = (
            f"is not read by data.source={name}, which has its images in a package; set "
            "data.source to imagefolder or flat"
        )
        raise setting_error("data.path", config.path, reason)
    settings = SOURCES.chosen(config, kind)
    asked = split
    from_train = config.val_from_train is not None and name != "mixed"  # there, each source's
    if from_train:
        split = "train"
    source = maker(config, split) if settings is None else maker(settings, config, split)
    if not source.has_val:
        if len(source) < 2:
            reason = f"has {len(source)} images for data.source={name}, too few to hold some out"
            raise setting_error("data.path", config.path, reason)
        source = Subset(source, holdout(source.sample_ids, config.val_fraction, split))
    if not len(source):
        raise setting_error("data.source", config.source, f"has no images in its {split} split")
    if config.subset.chooses and source.name != "mixed":  # there, each of its sources chooses
        source = choose(source, config, split)
        if not len(source):
            raise setting_error("data.subset", config.subset, f"leaves no {split} images")
    if from_train and config.val_from_train is not None:
        if len(source) < 2:
            raise setting_error("data.val_from_train", config.val_from_train, "needs 2 images")
        source = Subset(source, holdout(source.sample_ids, config.val_from_train, asked))
    return source


def _statistics(
    source: ImageSource, config: DataConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for the channels of the config."""

    def fit(values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) == config.channels:
            return values
        if config.channels not in (1, 3) or len(values) not in (1, 3):
            reason = (
                f"is not what the statistics of {source.name} are for: set data.mean and data.std "
                "(mim data stats computes them)"
            )
            raise setting_error("data.channels", config.channels, reason)
        if len(values) == 1:
            return values * config.channels
        return (sum(share * value for share, value in zip(LUMINANCE, values, strict=True)),)

    found = config.measured
    mean = found.mean if config.mean is None else config.mean
    std = found.std if config.std is None else config.std
    return fit(source.mean) if mean is None else mean, fit(source.std) if std is None else std
