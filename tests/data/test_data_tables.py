"""Hugging Face tables made here, mixtures by weight, and what mim data says of a set."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mim.core.config import DataConfig, HuggingFaceConfig, MixConfig, SubsetConfig
from mim.core.errors import UserError
from mim.core.settings import load_config, to_yaml
from mim.data import open_source, steps_per_epoch, train_loader


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("MIM_CACHE", place)


def png(value: int, mode: str = "L", size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, value).save(file, "PNG")
    return file.getvalue()


def parquet(path: Path, grays: range, columns: Callable[[int], dict[str, Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([columns(gray) for gray in grays]), path)
    return path


def row(gray: int) -> dict[str, Any]:
    return {"image": {"bytes": png(gray), "path": f"{gray}.png"}, "label": gray % 3}


def tables(path: object, **settings: object) -> DataConfig:
    given = {"image_size": 4, "channels": 1, "batch_size": 5, "augment": "none", **settings}
    return DataConfig(source="huggingface", path=str(path), **given)  # type: ignore[arg-type]


def test_local_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", range(0, 10), row)
    parquet(tmp_path / "train-1.parquet", range(10, 20), row)
    parquet(tmp_path / "validation-0.parquet", range(30, 34), row)
    given = tables(tmp_path)
    train, val = open_source(given, "train"), open_source(given, "val")
    assert (len(train), len(val), train.classes) == (20, 4, ["0", "1", "2"])
    assert train.labels is not None and train.labels.tolist() == [n % 3 for n in range(20)]
    assert len({*train.sample_ids.tolist(), *val.sample_ids.tolist()}) == 24
    whole = list(train_loader(train, given, 1, start_step=0, total_steps=8))
    for batch in whole:  # image, label and id belong together
        grays = batch.images[:, 0, 0, 0].long()
        assert batch.labels is not None and batch.labels.tolist() == (grays % 3).tolist()
        assert torch.equal(batch.sample_ids, train.sample_ids[grays])
    assert sorted(torch.cat([b.images[:, 0, 0, 0] for b in whole[:4]]).tolist()) == list(range(20))
    late = tables(tmp_path, workers=1)
    for a, b in zip(
        whole[6:], train_loader(train, late, 1, start_step=6, total_steps=8), strict=True
    ):
        assert torch.equal(a.images, b.images)


def test_columns_of_other_names_and_words_for_labels(tmp_path: Path) -> None:
    words = ("hen", "cat")
    parquet(tmp_path / "a.parquet", range(10), lambda g: {"scan": png(g), "kind": words[g % 2]})
    named = tables(tmp_path, huggingface=HuggingFaceConfig(image="scan", label="kind"))
    train = open_source(named, "train")  # a tenth is held out
    assert (len(train), train.classes) == (9, ["cat", "hen"])
    assert train.labels is not None
    for position in range(9):
        gray = int(np.asarray(train.image(position))[0, 0])
        assert train.classes[train.labels[position]] == words[gray % 2]
    with pytest.raises(UserError, match=r"data\.huggingface\.image: None is not among .*scan"):
        open_source(tables(tmp_path), "train")
    wrong = tables(tmp_path, huggingface=HuggingFaceConfig(image="scan", label="kinds"))
    with pytest.raises(UserError, match=r"data\.huggingface\.label: 'kinds' .*did you mean 'kind'"):
        open_source(wrong, "train")


def test_a_damaged_row_and_one_without_image(tmp_path: Path) -> None:
    def damaged(gray: int) -> dict[str, Any]:
        content = {3: b"", 4: None}.get(gray, png(gray))
        return {"image": {"bytes": content, "path": None}, "label": 0}

    parquet(tmp_path / "train.parquet", range(20), damaged)
    parquet(tmp_path / "val.parquet", range(2), damaged)
    given = tables(tmp_path, max_unreadable=0.1)
    train = open_source(given, "train")
    grays = [
        b.images[:, 0, 0, 0].tolist()
        for b in train_loader(train, given, 1, start_step=0, total_steps=4)
    ]
    assert not {3, 4} & {gray for batch in grays for gray in batch}
    assert train.ledger is not None and len(train.ledger) == 2


def test_what_is_no_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"^data\.path: .*names no \.parquet files"):
        open_source(tables(tmp_path), "train")
    with pytest.raises(UserError, match=r"^data\.path: 'no-such/set' cannot be loaded") as caught:
        open_source(tables("no-such/set"), "train")
    assert "\n" not in str(caught.value)


# ---- mixtures


def folder(root: Path, grays: range, classes: tuple[str, ...]) -> str:
    for gray in grays:
        for split in ("train", "val"):
            path = root / split / classes[gray % len(classes)] / f"{gray}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(gray))
    return str(root)


@pytest.fixture
def mixture(tmp_path: Path) -> DataConfig:
    """30 images of classes a, b (weight 1) and 10 of classes b, c (weight 1)."""
    one = folder(tmp_path / "one", range(0, 30), ("a", "b"))
    two = folder(tmp_path / "two", range(100, 110), ("b", "c"))
    parts = (MixConfig("imagefolder", one), MixConfig("imagefolder", two))
    return DataConfig(
        source="mixed", mix=parts, image_size=4, channels=1, batch_size=4, augment="none"
    )


def epochs(given: DataConfig, count: int, **options: Any) -> list[list[int]]:
    source = open_source(given, "train")
    per_epoch = steps_per_epoch(source, given)
    loader = train_loader(source, given, 5, start_step=0, total_steps=count * per_epoch, **options)
    seen: list[list[int]] = [[] for _ in range(count)]
    for batch in loader:
        seen[batch.epoch] += batch.images[:, 0, 0, 0].tolist()
    return seen


def test_a_mixture_draws_by_weight_without_repeats(mixture: DataConfig) -> None:
    seen = epochs(mixture, 3)
    for grays in seen:
        assert len(set(grays)) == len(grays) == 20  # the smaller set once
        assert {gray for gray in grays if gray >= 100} == set(range(100, 110))
    first = Counter(gray for grays in seen for gray in grays if gray < 100)
    assert first == dict.fromkeys(range(30), 1)  # the larger one once in three epochs
    assert seen[0] != seen[1]
    halves = [epochs(mixture, 3, rank=rank, world=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(g) for g in seen]


def test_weights_labels_and_val_of_a_mixture(mixture: DataConfig) -> None:
    from dataclasses import replace

    parts = (mixture.mix[0], replace(mixture.mix[1], weight=0.25))  # 4 to 1: 30 and 7
    source = open_source(replace(mixture, mix=parts), "train")
    assert source.epoch_size == 37
    assert source.classes == ["a", "b", "c"]
    assert source.labels is not None
    for position in range(len(source)):
        gray = int(np.asarray(source.image(position))[0, 0])
        expected = "ab"[gray % 2] if gray < 100 else "bc"[gray % 2]
        assert source.classes[source.labels[position]] == expected
    assert len(open_source(mixture, "val")) == 40
    subset = replace(mixture, subset=SubsetConfig(per_class=2), batch_size=1)
    assert len(open_source(subset, "train")) == 8  # of each class of each source
    again = load_config(None, {"data.source": "mixed", "data.mix": [{"source": "digits"}]})
    assert again.data.mix == (MixConfig("digits"),)
    assert yaml.safe_load(to_yaml(again))["data"]["mix"][0]["weight"] == 1.0


def test_embedded_sets_keep_their_ids_apart() -> None:
    parts = (MixConfig("digits"), MixConfig("digits"))
    given = DataConfig(source="mixed", mix=parts, image_size=8, channels=1)
    assert len(open_source(given, "train").sample_ids.unique()) == 2 * 1617


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "mixed"}, r"data\.mix: \[\] is needed"),
        ({"mix": (MixConfig("digits"),)}, r"data\.mix: \['digits'\] needs data\.source=mixed"),
    ],
)
def test_refused_mixtures(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(DataConfig(**settings), "train")


# ---- mim data


def test_stats_are_those_of_the_pixels(tmp_path: Path, mim: Callable[..., Any]) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 5), dtype=np.uint8)
    for number, image in enumerate(bands):
        split = "train" if number < 10 else "val"
        (tmp_path / split).mkdir(exist_ok=True)
        np.save(tmp_path / split / f"{number:02}.npy", image)
    settings = ["--data.source", "flat", "--data.path", tmp_path, "--data.channels", "5"]
    settings += ["--data.image_size", "4", "--data.batch_size", "3"]
    out = tmp_path / "stats.yaml"
    outcome = mim("data", "stats", *settings, "--output", out)
    assert outcome.code == 0, outcome.err
    found = yaml.safe_load(out.read_text())["data"]
    assert yaml.safe_load(outcome.out)["data"] == found
    pixels = bands[:10].reshape(-1, 5) / 255
    assert np.allclose(found["mean"], pixels.mean(0), atol=1e-4)
    assert np.allclose(found["std"], pixels.std(0), atol=1e-4)
    given = load_config(
        out,
        {
            "data.source": "flat",
            "data.path": str(tmp_path),
            "data.channels": 5,
            "data.image_size": 4,
            "model.backbone_args": {"patch_size": 2},
        },
    )
    assert open_source(given.data, "train").mean == tuple(found["mean"])


def test_inspect_counts_and_draws(
    tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    root = Path(folder(tmp_path / "set", range(8), ("a", "b")))
    (root / "train/b/notes.czi").write_bytes(b"")
    (root / "train/a/rgb.png").write_bytes(png(0, "RGB", (9, 8)))
    (root / "train/b/empty.png").write_bytes(b"")
    config = tiny({"data.source": "imagefolder", "data.path": str(root), "data.batch_size": 2})
    picture, numbers = tmp_path / "sheet.png", tmp_path / "numbers.json"
    outcome = mim("data", "inspect", "--config", config, "--output", picture, "--json", numbers)
    assert outcome.code == 0, outcome.err
    found = json.loads(numbers.read_text())["train"]
    assert found["per_class"] == {"a": 5, "b": 5} and found["images"] == 10
    assert found["modes"] == {"L": 8, "RGB": 1}
    assert found["sides"] == {"width": [6, 6, 9], "height": [4, 4, 8]}
    assert found["unreadable"] == {"train/b/empty.png": "the file is empty"}
    assert "train/b/empty.png: the file is empty" in outcome.out
    assert "files that are not read: 1 .czi" in outcome.out
    assert found["values"]["L"]["levels"] >= 1
    with Image.open(picture) as sheet:  # 8 images; whole, and crop and mask of two epochs
        assert sheet.size == (5 * 100 - 4, 8 * 100 - 4 + 32)
        assert (np.asarray(sheet)[:32] < 128).any()  # the title, and those of the columns
        pixels = np.asarray(sheet)[32:]
    # The third column is the second with gray over a share of it.
    crop, masked = pixels[:96, 100:196], pixels[:96, 200:296]
    assert 0 < (crop != masked).any(axis=2).mean() <= 0.75
    assert mim("data", "inspekt").code == 2


def test_a_copy_of_a_hub_set_has_its_files_deeper(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", range(10), row)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(2), row)
    given = tables(tmp_path)
    assert (len(open_source(given, "train")), len(open_source(given, "val"))) == (10, 2)
