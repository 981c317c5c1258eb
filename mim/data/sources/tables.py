"""Rows of tables as images: which columns, what the labels say, what an image column holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mim.core.config import DataConfig
from mim.core.errors import choice_error, setting_error
from mim.core.fields import Count, Settings
from mim.core.keys import name_to_int
from mim.data.images.decode import UnreadableImage, decode, decoding
from mim.data.images.transforms import Picture
from mim.data.sources.base import IMAGENET, ImageSource

_IMAGES = ("image", "img", "pixel_values", "jpg", "png")
_LABELS = ("label", "labels", "fine_label", "class", "cls")


@dataclass(frozen=True)
class HuggingFaceSettings(Settings):
    """Settings of the source huggingface."""

    name: str | None = None
    """Which configuration of a data set on the hub."""
    revision: str | None = None
    """Its commit, branch or tag."""
    image: str | None = None
    """The column of images; by default image, img, jpg or what is there of that kind."""
    label: str | None = None
    """The column of labels; by default label, labels or fine_label, if there is one."""
    pool: Count = 1024
    """With data.streaming: about so many rows, of row groups drawn by key, are shuffled together.
    More mix a set better that is sorted by class; each loader process holds so many files."""


def image_column(settings: HuggingFaceSettings, columns: Sequence[str]) -> str:
    """The column of images: the one that the settings name, else the first usual one.

    Raises:
        UserError: if there is none.
    """
    found = _column("image", settings.image, _IMAGES, columns)
    if found is None:
        reason = f"is not among the columns {', '.join(columns)}"
        raise setting_error("data.huggingface.image", settings.image, reason)
    return found


def label_column(settings: HuggingFaceSettings, columns: Sequence[str]) -> str | None:
    """The column of labels, likewise, or None where there is none."""
    return _column("label", settings.label, _LABELS, columns)


def _column(
    kind: str, given: str | None, usual: tuple[str, ...], columns: Sequence[str]
) -> str | None:
    if given is None:
        return next((name for name in usual if name in columns), None)
    if given not in columns:
        raise choice_error(f"data.huggingface.{kind}", given, columns)
    return given


class TableSource(ImageSource):
    """Images in the rows of one part, train or val, of a data set.

    The id of an image is that of its part and row.
    """

    mean, std = IMAGENET

    def __init__(self, config: DataConfig, part: str, count: int) -> None:
        self.name = "huggingface"
        self._max_pixels, self._decoder = config.max_pixels, config.decode
        self._part = part
        ids = (name_to_int(self.describe(row)) for row in range(count))
        self.sample_ids = torch.from_numpy(np.fromiter(ids, np.int64, count))
        self.labels, self.classes = None, []

    def _label(
        self,
        column: str,
        values: NDArray[Any],
        train: NDArray[Any],
        names: Sequence[str] | None,
    ) -> None:
        """Sets labels and classes.

        Args:
            column: for messages.
            values: (n,) of this part: numbers, or words that name the classes.
            train: (m,) of train, whose classes count.
            names: of the classes, where the table tells them.

        Raises:
            UserError: for a class that train has not.
        """
        if values.dtype.kind in "iu":
            if len(values) and values.min() < 0:  # -1 is an unknown label, as in test splits
                return
            count = int(train.max(initial=-1)) + 1
            self.classes = list(names) if names else [str(label) for label in range(count)]
            self.labels = torch.from_numpy(values.astype(np.int64))
            return
        known = sorted(set(train.tolist()))
        place = {name: label for label, name in enumerate(known)}
        unknown = sorted(set(values.tolist()) - set(known))
        if unknown:
            reason = f"has the class {unknown[0]!r} in val but not in train"
            raise setting_error("data.huggingface.label", column, reason)
        self.classes = [str(name) for name in known]
        self.labels = torch.tensor([place[value] for value in values.tolist()], dtype=torch.int64)

    def describe(self, index: int) -> str:
        return f"{self._part}/{index}"

    @abstractmethod
    def _value(self, index: int) -> Any:
        """What the image column holds in a row."""

    def encoded(self, index: int) -> bytes:
        """The bytes of an image's file."""
        name = self.describe(index)
        with decoding(name):
            data = _bytes(self._value(index))
        if data is None:
            raise UnreadableImage(name, "the row holds no image")
        return data

    def image(self, index: int) -> Picture:
        data = self.encoded(index)
        return decode(data, self.describe(index), self._max_pixels, self._decoder)


def _bytes(value: Any) -> bytes | None:
    """What a row holds: bytes, bytes beside a path, or a path alone."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        path = value.get("path")
        return None if path is None else Path(path).read_bytes()
    return value if isinstance(value, bytes) else None
