"""Settings that follow from images and machine, and runs that are extended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mim as package
from mim.core.errors import UserError
from mim.training.choices import choose, source_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 40 images, 70 x 64 pixels."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 255, (70, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


def test_choices_follow_from_the_images(folder: Path) -> None:
    found = {choice.key: choice.value for choice in choose(folder, {"train.device": "cpu"})}
    assert found["data.source"] == "imagefolder"
    assert found["data.image_size"] == 64 and found["model.backbone_args.patch_size"] == 8
    assert found["train.epochs"] == 800, "few images are seen often"
    assert found["data.batch_size"] == 16, "72 training images, a quarter, a power of 2"
    assert found["model.decoder.transformer.width"] == 192
    rate = found["optim.base_lr"] * found["data.batch_size"] / 256
    assert rate == pytest.approx(1.5e-4 * 16 * (16 / 4096) ** 0.5, rel=0.02)


def test_the_channels_are_those_of_the_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", rng.normal(size=(5, 40, 40)).astype(np.float32))
    for tree in ({}, {"data.channels": 5}):
        found = {choice.key: choice.value for choice in choose(tmp_path, tree)}
        assert found["data.image_size"] == 32 and found.get("data.channels", 5) == 5
        assert ("data.channels" in found) != ("data.channels" in tree)


def test_one_class_of_several_is_seen(folder: Path) -> None:
    source, said = source_of(folder / "a")
    assert source == "flat" and said.endswith(f"if it is one class beside b, give {folder}")
    (folder / "a").rename(folder.parent / "alone")
    assert "beside" not in source_of(folder.parent / "alone")[1]


def test_what_is_given_is_not_chosen(folder: Path) -> None:
    tree = {"data.image_size": 32, "model.decoder": {}, "train.epochs": 3, "train.device": "cpu"}
    found = {choice.key: choice.value for choice in choose(folder, tree)}
    assert not {"data.image_size", "train.epochs"} & set(found)
    assert not any(key.startswith("model.decoder") for key in found)
    assert found["model.backbone_args.patch_size"] == 4 and found["optim.warmup_epochs"] == 1.0


def test_little_memory_means_a_smaller_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2**26)
    found = {choice.key: choice for choice in choose(folder, {"train.device": "cpu"})}
    assert found["data.batch_size"].value < 16 and "memory" in found["data.batch_size"].why


@pytest.mark.parametrize(
    ("files", "source"),
    [
        (["1.png", "2.png"], "flat"),
        (["a/1.png", "b/1.png"], "imagefolder"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png"], "imagefolder"),
        (["train/1.png", "val/1.png"], "flat"),
        (["a/1.png", "b/1.png", "3.png"], "flat"),
        (["train-00.tar"], "shards"),
        (["train-00.parquet"], "huggingface"),
        (["manifest.json", "train.npy"], "packed"),
    ],
)
def test_a_source_is_seen_from_its_files(tmp_path: Path, files: list[str], source: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert source_of(tmp_path)[0] == source


def test_a_folder_that_is_not_there_is_one_line(mim: Callable[..., Any], tmp_path: Path) -> None:
    outcome = mim("pretrain", tmp_path / "nothing", "--output", tmp_path / "run")
    assert outcome.code == 2 and "does not exist" in outcome.line


SMALL = {
    "model.backbone": "vit_tiny_patch16_224",
    "model.backbone_args.embed_dim": 32,
    "model.backbone_args.depth": 1,
    "model.backbone_args.num_heads": 2,
    "model.backbone_args.patch_size": 8,
    "train.epochs": 1,
    "log.tensorboard": False,
}


def test_a_resumed_run_keeps_its_choices_and_may_be_extended(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    first = package.pretrain(run, folder, settings=SMALL)
    assert first["epochs"] == 1 and "extended" not in first
    batch = first["config"]["data"]["batch_size"]
    # On another machine, with hardly any memory.
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2**26)
    longer = {**SMALL, "train.epochs": 2, "resume": "auto"}
    second = package.pretrain(run, folder, settings=longer)
    assert second["config"]["data"]["batch_size"] == batch
    assert second["epochs"] == 2 and second["steps"] == 2 * first["steps"]
    assert second["extended"] == [{"epochs": 1, "step": first["steps"]}]
    assert json.loads((run / "result.json").read_text())["extended"] == second["extended"]
    with pytest.raises(UserError, match=r"train\.epochs was 2 and is 1"):
        package.pretrain(run, folder, settings={**SMALL, "resume": "auto"})


def test_runs_of_comparisons_are_not_extended(folder: Path, tmp_path: Path) -> None:
    from mim.training.pretrain import pretrain

    package.pretrain(tmp_path / "run", folder, settings=SMALL)
    config = package.load_config(
        tmp_path / "run" / "config.yaml",
        {"output": str(tmp_path / "run"), "resume": "auto", "train.epochs": 2},
    )
    with pytest.raises(UserError, match=r"train\.epochs was 1 and is 2"):
        pretrain(config)
