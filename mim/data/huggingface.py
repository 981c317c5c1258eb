"""Hugging Face data sets: parquet files on disk, or a name on the hub (the extra ``hf``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mim.config import DataConfig
from mim.data.decode import UnreadableImage, decode, decoding
from mim.data.folder import VAL_NAMES
from mim.data.places import divide, is_local
from mim.data.sources import IMAGENET, SOURCES, ImageSource, Split, needs_package
from mim.data.transforms import Picture
from mim.errors import UserError, choice_error, setting_error
from mim.keys import name_to_int

_IMAGES = ("image", "img", "pixel_values", "jpg", "png")
_LABELS = ("label", "labels", "fine_label", "class", "cls")
_VAL_SPLITS = ("validation", *VAL_NAMES)


@SOURCES.register("huggingface")
class HuggingFace(ImageSource):
    """A data set that the package ``datasets`` reads, by row, from its memory-mapped tables.

    ``data.path`` names parquet files (a file, a folder, a pattern or URLs, as for shards) or a data
    set on the hub. Files whose names begin with val, valid or test, or ``data.val_path``, are val;
    of the hub, the split validation, else val, valid or test; with none, a share is held out. The
    id of an image is that of its split and row.
    """

    mean, std = IMAGENET

    def __init__(self, config: DataConfig, split: Split) -> None:
        self.name = "huggingface"
        self._settings = config.huggingface
        self._max_pixels, self._decoder = config.max_pixels, config.decode
        if config.path is None:
            raise setting_error("data.path", None, "is needed by data.source=huggingface")
        parts = _load(config)
        self.has_val = "val" in parts
        part = "val" if split == "val" and self.has_val else "train"
        self.dataset = parts[part]
        self._part = part
        image = self._column("image", _IMAGES, self.dataset.column_names)
        if image is None:
            reason = f"is not among the columns {', '.join(self.dataset.column_names)}"
            raise setting_error("data.huggingface.image", self._settings.image, reason)
        label = self._column("label", _LABELS, self.dataset.column_names)
        self._read_labels(parts, part, label)
        self.dataset = _undecoded(self.dataset.select_columns([image]), image)
        self._image = image
        ids = [name_to_int(f"{part}/{row}") for row in range(len(self.dataset))]
        self.sample_ids = torch.tensor(ids, dtype=torch.int64)

    def _column(self, kind: str, usual: tuple[str, ...], columns: list[str]) -> str | None:
        """The column that the settings name, else the first usual one."""
        given = getattr(self._settings, kind)
        if given is None:
            return next((name for name in usual if name in columns), None)
        if given not in columns:
            raise choice_error(f"data.huggingface.{kind}", given, columns)
        return given

    def _read_labels(self, parts: dict[str, Any], part: str, column: str | None) -> None:
        self.labels, self.classes = None, []
        if column is None:
            return
        values = _values(parts[part], column)
        names = getattr(parts["train"].features[column], "names", None)
        if values.dtype.kind in "iu" and (not len(values) or values.min() >= 0):
            count = int(_values(parts["train"], column).max(initial=-1)) + 1
            self.classes = list(names) if names else [str(label) for label in range(count)]
            self.labels = torch.from_numpy(values.astype(np.int64))
            return
        if values.dtype.kind in "iu":  # -1 stands for an unknown label, as in test splits
            return
        known = sorted(set(_values(parts["train"], column).tolist()))
        place = {name: label for label, name in enumerate(known)}
        unknown = sorted(set(values.tolist()) - set(known))
        if unknown:
            reason = f"has the class {unknown[0]!r} in val but not in train"
            raise setting_error("data.huggingface.label", column, reason)
        self.classes = [str(name) for name in known]
        self.labels = torch.tensor([place[value] for value in values.tolist()], dtype=torch.int64)

    def describe(self, index: int) -> str:
        return f"{self._part}/{index}"

    def image(self, index: int) -> Picture:
        name = self.describe(index)
        with decoding(name):
            value = self.dataset[index][self._image]
            data = _bytes(value)
        if data is None:
            raise UnreadableImage(name, "the row holds no image")
        return decode(data, name, self._max_pixels, self._decoder)


def _bytes(value: Any) -> bytes | None:
    """What a row holds: bytes, bytes beside a path, or a path alone."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        path = value.get("path")
        return None if path is None else Path(path).read_bytes()
    return value if isinstance(value, bytes) else None


def _undecoded(dataset: Any, column: str) -> Any:
    """The table with files in the place of images: they are decoded by this package's rules."""
    import datasets

    if isinstance(dataset.features[column], datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _values(dataset: Any, column: str) -> Any:
    """(n,) of a column, without decoding anything."""
    return np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])


def _load(config: DataConfig) -> dict[str, Any]:
    """The tables of train, and of val where there is one.

    Raises:
        UserError: if the package is missing, or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise needs_package("huggingface", "mim[hf]") from error
    assert config.path is not None
    settings = config.huggingface
    try:
        if is_local(config.path, ".parquet"):
            train, val = divide(config, ".parquet")
            files = {"train": [str(path) for path in train]}
            if val:
                files["val"] = [str(path) for path in val]
            return dict(datasets.load_dataset("parquet", data_files=files))
        loaded = datasets.load_dataset(config.path, settings.name, revision=settings.revision)
    except UserError:
        raise
    except Exception as error:  # datasets and the hub raise many kinds
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise setting_error("data.path", config.path, f"cannot be loaded: {reason}") from error
    if "train" not in loaded:
        reason = f"has no split train, but {', '.join(loaded)}"
        raise setting_error("data.path", config.path, reason)
    val_name = next((name for name in _VAL_SPLITS if name in loaded), None)
    parts = {"train": loaded["train"]}
    if val_name is not None:
        parts["val"] = loaded[val_name]
    return parts
