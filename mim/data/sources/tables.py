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
from mim.core.errors import blaming, choice_error, setting_error
from mim.core.fields import Count, Settings
from mim.core.rng import name_to_int
from mim.data.images.decode import read_file
from mim.data.labels import label_table
from mim.data.places.fetch import is_url
from mim.data.sources.base import EncodedSource

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
    """With data.streaming: about how many rows, of row groups drawn by key, are shuffled together.
    More of them mix a set better that is sorted by class; each loader process holds as many files.
    """


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


class TableSource(EncodedSource):
    """Images in the rows of one part, train or val, of a data set; ids come from part and row."""

    def __init__(self, config: DataConfig, part: str, count: int) -> None:
        super().__init__(config)
        self.name = "huggingface"
        self._part = part
        self._folder = _folder(config)
        ids = (name_to_int(self.describe(row)) for row in range(count))
        self.sample_ids = torch.from_numpy(np.fromiter(ids, np.int64, count))
        self.labels, self.classes = None, []

    def _label(
        self, column: str, values: NDArray[Any], train: NDArray[Any], names: Sequence[str] | None
    ) -> None:
        """Set labels and classes by :func:`label_table`; ``column`` is for messages."""
        with blaming("data.huggingface.label", column):
            self.labels, self.classes = label_table(values, train, names)

    def describe(self, index: int) -> str:
        return f"{self._part}/{index}"

    @abstractmethod
    def _value(self, index: int) -> Any:
        """What the image column holds in a row."""

    def read(self, index: int) -> bytes:
        data = _bytes(self._value(index), self._folder)
        if data is None:
            raise ValueError("the row holds no image")
        return data


def _folder(config: DataConfig) -> Path | None:
    """The folder of tables on disk."""
    if config.path is None or is_url(config.path):
        return None
    path = Path(config.path)
    return next(place for place in (path, *path.parents) if place.is_dir()).resolve()


def _bytes(value: Any, folder: Path | None) -> bytes | None:
    """The file in a row: bytes, with or without a path, or a path alone, which leads to ``folder``.

    Raises:
        ValueError: for a path that leads elsewhere.
    """
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        path = value.get("path")
        if path is None:
            return None
        if folder is None or not (folder / path).resolve().is_relative_to(folder):
            raise ValueError(f"its path {str(path)!r} leads out of the folder of the table")
        return read_file(folder / path)
    return value if isinstance(value, bytes) else None
