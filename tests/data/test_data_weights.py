"""Weights of images: where they come from, whom they reach, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import (
    WEIGHTS,
    Batch,
    BatchLoader,
    ImageSource,
    Subset,
    open_source,
    open_weights,
    train_loader,
)
from mim.data.storage.cache import cached

CONFIG = DataConfig(source="digits", image_size=8, channels=1, batch_size=8)


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return Subset(open_source(CONFIG, "train"), range(40))


def batches(source: ImageSource, config: DataConfig, **process: int) -> BatchLoader:
    weigh = open_weights(source, config)
    return train_loader(source, config, 0, start_step=0, total_steps=7, weigh=weigh, **process)


def saved(path: Path, values: Any) -> DataConfig:
    np.save(path, values)
    return replace(CONFIG, weights=str(path))


def of_id(batch: Batch) -> dict[int, float]:
    assert batch.weight is not None
    return dict(zip(batch.sample_ids.tolist(), batch.weight.tolist(), strict=True))


def test_all_count_alike_by_default(source: ImageSource) -> None:
    assert open_weights(source, CONFIG) is None
    batch = next(iter(batches(source, CONFIG)))
    assert batch.weight is batch.total_weight is batch.total_counted is None


@pytest.mark.parametrize("kind", [float, bool, int])
def test_an_array_is_indexed_by_sample_id(kind: type, source: ImageSource, tmp_path: Path) -> None:
    values = (np.arange(1797) % 3).astype(kind)
    config = saved(tmp_path / "w.npy", values)
    for batch in batches(source, config):
        assert of_id(batch) == {i: float(values[i]) for i in batch.sample_ids.tolist()}
        weights = values[batch.sample_ids.numpy()].astype(float)
        assert batch.total_weight == weights.sum()
        assert batch.total_counted == (weights > 0).sum()


def test_a_table_names_images_by_path_or_id(source: ImageSource, tmp_path: Path) -> None:
    table = tmp_path / "w.csv"
    rows = [f"{i},{i / 10}\n" for i in source.sample_ids.tolist()]
    table.write_text("".join(["image,weight\n", *rows]))
    weigh = open_weights(source, replace(CONFIG, weights=str(table)))
    assert weigh is not None
    assert torch.equal(weigh(source, torch.arange(40), 3), source.sample_ids.double() / 10)

    for name in ("a/0.png", "a/1.png", "b/x, y.png"):
        path = tmp_path / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7)).save(path)
    folder = tmp_path / "images"
    config = DataConfig(source="imagefolder", path=str(folder), weights=str(table))
    table.write_text(
        'why,weight,image\n,2,"train/b/x, y.png"\nblurred,0,train/a/1.png\n,1,train/a/0.png\n'
    )
    images = open_source(replace(config, val_fraction=0.01), "train")
    weigh = open_weights(images, config)
    assert weigh is not None
    weights = weigh(images, torch.arange(len(images)), 0).tolist()
    expected = {"train/a/0.png": 1, "train/a/1.png": 0, "train/b/x, y.png": 2}
    assert len(images) == 2  # one is held out
    assert weights == [expected[images.describe(i)] for i in range(len(images))]


def test_a_column_of_the_source(source: ImageSource) -> None:
    inner = Subset(source, range(40))
    inner.weights = torch.arange(40.0)
    outer = Subset(inner, [3, 0, 5])
    weigh = open_weights(outer, CONFIG)
    assert weigh is not None
    assert weigh(outer, torch.tensor([2, 0]), 0).tolist() == [5, 3]


def test_a_cache_keeps_the_column_of_its_source(source: ImageSource) -> None:
    inner = Subset(source, range(40))
    inner.weights = torch.arange(40.0)
    config = replace(CONFIG, cache="memory")
    weigh = open_weights(cached(inner, config), config)
    assert weigh is not None
    assert weigh(inner, torch.tensor([2, 0]), 0).tolist() == [2, 0]


def test_a_function_sees_images_and_epoch(
    source: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mine(source: ImageSource, indices: Tensor, epoch: int) -> Tensor:
        return source.sample_ids[indices] % 2 == epoch % 2

    monkeypatch.setitem(WEIGHTS._entries, "mine", mine)
    for batch in batches(source, replace(CONFIG, weights="mine")):  # 5 steps an epoch
        expected = {i: float(i % 2 == batch.epoch % 2) for i in batch.sample_ids.tolist()}
        assert of_id(batch) == expected


def test_shares_of_processes_know_the_whole(source: ImageSource, tmp_path: Path) -> None:
    config = saved(tmp_path / "w.npy", np.arange(1797) % 4)
    whole = list(batches(source, config))
    parts = [list(batches(source, config, rank=rank, world=2)) for rank in (0, 1)]
    for one, *two in zip(whole, *parts, strict=True):
        shares = [part.weight for part in two if part.weight is not None]
        assert one.weight is not None
        assert torch.equal(torch.cat(shares), one.weight)
        for part in two:
            assert part.total_weight == one.total_weight == float(one.weight.sum())
            assert part.total_counted == one.total_counted


def test_a_batch_without_a_counted_image_is_refused(source: ImageSource, tmp_path: Path) -> None:
    values = np.zeros(1797)
    values[int(source.sample_ids[0])] = 1
    with pytest.raises(UserError, match=r"data.weights: leaves out all 8 images of step \d"):
        list(batches(source, saved(tmp_path / "w.npy", values)))


def bad(path: Path, values: Any) -> str:
    if isinstance(values, str):
        path = path.with_suffix(".csv")
        path.write_text(values)
    else:
        np.save(path, values)
    return str(path)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros(1797), "leaves out every training image"),
        (np.full(1797, -1.0), "a weight of -1.0; it must be finite and at least 0"),
        (np.full(1797, np.nan), "a weight of nan"),
        (np.ones((1797, 2)), r"has shape \(1797, 2\); weights are \(images,\)"),
        (np.ones(2), "has no weight for .* of 40 images, the first of them image"),
        (np.array(["a"]), "cannot be read"),
        ("image\n1\n", "needs the columns image and weight"),
        ("image,weight\n1,x\n", "line 2: could not convert"),
        ("image,weight\n1,1\n2,1\n1,2\n", "twice, in line 4"),
        ("image,weight\n", "holds no weights"),
        ("image,weight\n1\n", "line 2"),
    ],
)
def test_bad_files_are_refused(
    values: Any, reason: str, source: ImageSource, tmp_path: Path
) -> None:
    config = replace(CONFIG, weights=bad(tmp_path / "w.npy", values))
    with pytest.raises(UserError, match=reason) as caught:
        open_weights(source, config)
    assert str(caught.value).startswith("data.weights: ")


def test_bad_names_are_refused(source: ImageSource, tmp_path: Path) -> None:
    for name, reason in (
        ("hlaf", "is no .csv or .npy file, nor a registered function"),
        (str(tmp_path / "w.npy"), "is no file"),
    ):
        with pytest.raises(UserError, match=reason):
            open_weights(source, replace(CONFIG, weights=name))
