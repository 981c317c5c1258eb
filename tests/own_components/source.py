"""Images and labels of an .npz."""

from dataclasses import dataclass

import numpy as np

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.core.fields import Settings
from mim.data.sources.base import SOURCES, InMemory, Split


@dataclass(frozen=True)
class ArraysSettings(Settings):
    """Settings of the source arrays."""

    images: str = "images"
    """Name of the array of images, (n, height, width) uint8."""


@SOURCES.register("arrays", ArraysSettings)
class Arrays(InMemory):
    """A share is held out, since the file has no val part."""

    has_val = False

    def __init__(self, settings: ArraysSettings, config: DataConfig, split: Split) -> None:
        with np.load(config.path or "", allow_pickle=False) as file:
            if settings.images not in file:
                raise UserError(f"data.arrays.images: {settings.images!r} is not in {config.path}")
            images, labels = file[settings.images], file["labels"].astype(np.int64)
        super().__init__("arrays", images, labels, [str(c) for c in range(labels.max() + 1)])
