"""From a config to the images of a split."""

from __future__ import annotations

from pathlib import Path

from mim.core.config import DataConfig
from mim.core.errors import UserError, setting_error
from mim.data.labels import check_labels
from mim.data.sources.base import SOURCES, ImageSource, Split, Subset, holdout
from mim.data.storage.cache import cached
from mim.data.subset import choose
from mim.data.unreadable import Ledger

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, PIL's own


def open_source(config: DataConfig, split: Split, folder: Path | None = None) -> ImageSource:
    """The images of a split, "train" or "val".

    A set without a val split gives ``data.val_fraction`` of its images to "val" by :func:`holdout`.
    With ``data.val_from_train`` both splits are parts of the training images.
    ``mean`` and ``std`` are those of the config, or else the set's own, in ``data.channels``
    channels. Unreadable images are recorded in ``folder``, the run folder, if there is one.

    Raises:
        UserError: for an unknown source, a path that it does not read, a missing or empty folder,
            an empty class, more unreadable images than ``data.max_unreadable``, a failed download,
            channels that the images cannot have, or a cache that has no room.
    """
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
            reason = f"has {len(source)} images, too few to hold some out"
            raise setting_error("data.source", config.source, reason)
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
    try:
        check_labels(source.labels, source.classes, len(source))
    except UserError as error:
        raise setting_error("data.source", config.source, str(error)) from error
    source.ledger = Ledger(asked, len(source), config.max_unreadable, folder)
    source.ledger.add(source.check())
    source.mean, source.std = _statistics(source, config)
    if config.cache == "none":
        return source
    return cached(source, config)


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
        return (sum(share * value for share, value in zip(_LUMINANCE, values, strict=True)),)

    mean = fit(source.mean) if config.mean is None else config.mean
    std = fit(source.std) if config.std is None else config.std
    return mean, std
