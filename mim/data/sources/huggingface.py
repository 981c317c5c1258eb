"""Hugging Face data sets: parquet files on disk, or a name on the hub (the extra ``hf``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from mim.core.config import DataConfig
from mim.core.errors import UserError, blaming, setting_error
from mim.data.places.places import Place, divide, is_local, open_urls
from mim.data.places.splits import find_splits
from mim.data.sources.base import SOURCES, ImageSource, Split, needs_package, required_path
from mim.data.sources.row_groups import RowGroups, check_tables
from mim.data.sources.tables import HuggingFaceSettings, TableSource, image_column, label_column

_SCHEME = re.compile(r"hf://datasets/(?P<name>[^/@]+(/[^/@]+)?)(@(?P<revision>[^/]+))?/?")


@SOURCES.register("huggingface", HuggingFaceSettings)
def huggingface(settings: HuggingFaceSettings, config: DataConfig, split: Split) -> ImageSource:
    """A data set of parquet files, or one that the package ``datasets`` reads.

    ``data.path`` names parquet files (a file, a folder, a pattern or URLs, as for shards) or a data
    set on the hub, USER/NAME or hf://datasets/USER/NAME. Files whose names say val or test, or
    ``data.val_path``, are val; of a data set on the hub, the split of that name. Without them some
    images are held out. The id of an image comes from its split and row.

    With ``data.streaming`` parquet files are read where they are, a row group at a time; without,
    the package makes memory-mapped tables of them first.

    Raises:
        UserError: if the package is missing, or the data set cannot be read.
    """
    path = required_path(config)
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise needs_package("huggingface", "datasets") from error
    if not config.streaming:
        return HuggingFace(settings, config, split)
    if is_local(path, ".parquet"):
        train, val = divide(config, ".parquet")
        return RowGroups(settings, config, split, train, val)
    return RowGroups(settings, config, split, *_hub_files(settings, config))


class HuggingFace(TableSource):
    """Rows that the package ``datasets`` reads from memory-mapped tables."""

    def __init__(self, settings: HuggingFaceSettings, config: DataConfig, split: Split) -> None:
        import datasets

        parts = _load(settings, config)
        self.has_val = "val" in parts
        part = "val" if split == "val" and self.has_val else "train"
        dataset = parts[part]
        super().__init__(config, part, len(dataset))
        if not is_local(required_path(config), ".parquet"):
            self._folder = Path(datasets.config.HF_CACHE_HOME).resolve()
        self._image = image_column(settings, dataset.column_names)
        label = label_column(settings, dataset.column_names)
        if label is not None:
            names = getattr(parts["train"].features[label], "names", None)
            self._label(label, _values(dataset, label), _values(parts["train"], label), names)
        self.dataset = dataset.select_columns([self._image])
        if isinstance(dataset.features[self._image], datasets.Image):
            # Images are decoded by this package's rules, not by those of datasets.
            self.dataset = self.dataset.cast_column(self._image, datasets.Image(decode=False))

    def stamp(self, index: int) -> str:
        return f"{self.dataset._fingerprint}/{index}"

    def _value(self, index: int) -> Any:
        return self.dataset[index][self._image]


def _values(dataset: Any, column: str) -> Any:
    """(n,) of a column, without decoding anything."""
    return np.asarray(dataset.select_columns([column])[:][column], dtype=object)


def _hub_name(settings: HuggingFaceSettings, config: DataConfig) -> tuple[str, str | None]:
    """Name and revision of a data set on the hub."""
    path = required_path(config)
    match = _SCHEME.fullmatch(path)
    if match is None:
        return path, settings.revision
    return match["name"], settings.revision or match["revision"]


def _unloadable(config: DataConfig, error: Exception) -> UserError:
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    return setting_error("data.path", config.path, f"cannot be loaded: {reason}")


def _splits(config: DataConfig, names: Any) -> tuple[str, str | None]:
    """The names of the splits of train, and of val if there is one.

    Raises:
        UserError: if there is no split train.
    """
    with blaming("data.path", config.path):
        train, val = find_splits(names)
        if train is None:
            raise UserError(f"has no split train, but {', '.join(names)}")
    return train, val


def _load(settings: HuggingFaceSettings, config: DataConfig) -> dict[str, Any]:
    """The tables of train, and of val where there is one."""
    import datasets

    name, revision = _hub_name(settings, config)
    try:
        if is_local(required_path(config), ".parquet"):
            train, val = divide(config, ".parquet")
            check_tables([*train, *val])
            files = {"train": [str(path) for path in train]}
            if val:
                files["val"] = [str(path) for path in val]
            return dict(datasets.load_dataset("parquet", data_files=files))
        loaded = datasets.load_dataset(name, settings.name, revision=revision)
    except UserError:
        raise
    except Exception as error:  # datasets and the hub raise many kinds
        raise _unloadable(config, error) from error
    loaded = {str(name): table for name, table in loaded.items()}
    train_name, val_name = _splits(config, loaded)
    parts = {"train": loaded[train_name]}
    if val_name is not None:
        parts["val"] = loaded[val_name]
    return parts


def _hub_files(
    settings: HuggingFaceSettings, config: DataConfig
) -> tuple[list[Place], list[Place], Any]:
    """The parquet files of a data set on the hub, of train and of val, and its features."""
    import datasets
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import build_hf_headers

    name, revision = _hub_name(settings, config)
    try:
        builder = datasets.load_dataset_builder(name, settings.name, revision=revision)
        files = builder.config.data_files or {}
        hub = HfFileSystem()
        urls = {str(part): [hub.url(str(place)) for place in files[part]] for part in files}
    except Exception as error:  # datasets and the hub raise many kinds
        raise _unloadable(config, error) from error
    if any(not url.endswith(".parquet") for places in urls.values() for url in places):
        reason = (
            "is not made of parquet files, which alone can be streamed; for most sets the hub has "
            "such a copy: data.huggingface.revision=refs/convert/parquet"
        )
        raise setting_error("data.path", config.path, reason)
    train_name, val_name = _splits(config, urls)
    headers = tuple(build_hf_headers().items())  # with the user's token: some sets are gated
    train = open_urls(urls[train_name], headers)
    val = [] if val_name is None else open_urls(urls[val_name], headers)
    return train, val, builder.info.features
