"""Labels of every source go through one table: right counts, or one line that says why not."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import ImageSource, Split, open_source
from mim.data.labels import label_table

MISSING = None


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, "PNG")
    return file.getvalue()


def write(source: str, root: Path, train: list[Any], val: list[Any]) -> DataConfig:
    root.mkdir(exist_ok=True)
    for split, labels in (("train", train), ("val", val)):
        if source in ("cls", "json"):
            with tarfile.open(root / f"{split}.tar", "w") as tar:
                for number, label in enumerate(labels):
                    told = json.dumps({"label": label} if source == "json" else label).encode()
                    for name, content in (
                        (f"{split}{number}.png", png(number)),
                        (f"{split}{number}.{source}", told),
                    ):
                        info = tarfile.TarInfo(name)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        else:
            pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            pytest.importorskip("datasets")
            rows = {"image": [png(n) for n in range(len(labels))], "label": labels}
            pq.write_table(pa.table(rows), root / f"{split}.parquet")
    kind = "shards" if source in ("cls", "json") else "huggingface"
    return DataConfig(source=kind, path=str(root), channels=1, streaming=source == "streamed")


def opened(config: DataConfig) -> dict[Split, ImageSource]:
    return {split: open_source(config, split) for split in ("train", "val")}


SOURCES = ["cls", "json", "table", "streamed"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([0, 1, 0], [2, 0], "the class '2' in val but not in train"),
        ([0, 1, -100], [0], "-100"),
        ([0, 1, 0], [-100, 1], "-100"),
        ([0, 10**12, 1], [0], "1000000000000"),
        ([[0], [1], [0]], [[0]], "label"),
        ([0, MISSING, 1], [0], "lacks|without"),
        ([0, 1, 1], [0, MISSING], "lacks|without"),
        ([0.5, 1.0, 0.0], [0.0], "0.5"),
        ([0.0, math.nan, 1.0], [0.0], "lacks|holds no label"),
        ([0.0, math.inf, 1.0], [0.0], "inf|holds no label"),
    ],
)
def test_labels_that_are_none(
    tmp_path: Path, source: str, train: list[Any], val: list[Any], message: str
) -> None:
    if source == "cls" and any(isinstance(label, list) for label in train):
        message = "holds no label"
    if source == "cls" and (MISSING in [*train, *val] or math.nan in train):
        message = "holds no label"
    with pytest.raises(UserError, match=message) as raised:
        opened(write(source, tmp_path / "set", train, val))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("source", SOURCES)
def test_labels_that_are_right(tmp_path: Path, source: str) -> None:
    found = opened(write(source, tmp_path / "set", [2, 0, 2, 1], [1, 0]))
    assert torch.bincount(found["train"].labels).tolist() == [1, 1, 2]
    assert found["val"].labels.tolist() in ([1, 0], [0, 1])
    assert found["val"].classes == found["train"].classes == ["0", "1", "2"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_split_without_labels(tmp_path: Path, source: str) -> None:
    found = opened(write(source, tmp_path / "set", [1, 0, 1], [-1, -1]))
    assert found["val"].labels is None and len(found["train"].classes) == 2
    if source != "cls":
        config = write(source, tmp_path / "nulls", [MISSING, MISSING], [MISSING])
        assert opened(config)["train"].labels is None


@pytest.mark.parametrize("values", [np.uint64, np.int8, np.float32, object])
def test_numbers_of_any_kind(values: Any) -> None:
    labels, classes = label_table(np.array([1, 0, 2]).astype(values), np.arange(3).astype(values))
    assert labels.tolist() == [1, 0, 2] and classes == ["0", "1", "2"]


def test_words_and_names() -> None:
    labels, classes = label_table(["a\u0308"], ["b", "\u00e4", "b"])
    assert labels.tolist() == [1] and classes == ["b", "\u00e4"]
    assert label_table([True], [True, False])[1] == ["False", "True"]
    labels, classes = label_table([1], [0], names=["x", "y", "z"])  # a class without train images
    assert labels.tolist() == [1] and classes == ["x", "y", "z"]
    with pytest.raises(UserError, match="names 2 classes, and there are labels up to 2"):
        label_table([1], [2], names=["x", "y"])
    with pytest.raises(UserError, match="numbers for labels in one split, and words"):
        label_table([1], ["a"])
    with pytest.raises(UserError, match="labels count the classes"):
        label_table([10**30], [0])


def test_ids_of_a_source_of_ones_own_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from mim.data.sources.embedded import Digits

    begin = Digits.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self.sample_ids = self.sample_ids % 500

    monkeypatch.setattr(Digits, "__init__", wrong)
    with pytest.raises(UserError, match=r"data.source: 'digits' gives the id 0 to two images"):
        opened(DataConfig(source="digits", channels=1))


def test_a_source_of_ones_own_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from mim.data.sources.embedded import Digits

    begin = Digits.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        self.labels[7] = 10

    monkeypatch.setattr(Digits, "__init__", wrong)
    with pytest.raises(UserError, match=r"data.source: 'digits' has labels from 0 to 10, and 10"):
        opened(DataConfig(source="digits", channels=1))


@pytest.mark.parametrize(
    "text", [b"1.5", b"cat", b"", b"\xff\xfe\x00", b"9" * 5000, b"99999999999999999999"]
)
def test_notes_that_hold_no_label(tmp_path: Path, text: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("0.png", png(0)),
            ("0.cls", text),
            ("1.png", png(1)),
            ("1.cls", b"0"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"0\.cls holds no label"):
        opened(DataConfig(source="shards", path=str(tmp_path / "a.tar"), channels=1))


def test_class_files_with_marks_and_line_ends_of_others(tmp_path: Path) -> None:
    config = write("cls", tmp_path / "set", [0, 1, 1], [0])
    (tmp_path / "set/classes.txt").write_bytes("\ufeffBa\u0308r\r\ncat\r\n".encode())
    assert opened(config)["train"].classes == ["B\u00e4r", "cat"]
