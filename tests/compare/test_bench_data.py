"""The bench of the loader: what it counts, and that its plain pipeline is the same work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim.compare.cost.loader import plain_loader
from mim.core.config import DataConfig
from mim.data import open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / f"set/train/c{index % 2}/{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "set"


def test_every_figure_is_given_and_the_ratio_is_of_the_same_rounds(
    folder: Path, tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    data = {"data.source": "imagefolder", "data.path": str(folder), "data.batch_size": 4}
    config = tiny({**data, "data.channels": 3})
    out = tmp_path / "bench.json"
    done = mim("bench", "data", "--config", config, "--rounds", 3, "--images", 8, "--json", out)
    assert done.code == 0, done.err
    found = json.loads(out.read_text())
    assert list(found["stages"]) == ["read", "decode", "augment", "collate", "to device"]
    for entry in (*found["stages"].values(), found["loader"], found["plain"]):
        assert len(entry["rounds"]) == 3
        assert entry["images_per_second"] == sorted(entry["rounds"])[1] > 0
    pairs = zip(found["loader"]["rounds"], found["plain"]["rounds"], strict=True)
    assert found["ratios"] == [a / b for a, b in pairs]
    assert found["ratio_to_plain"] == sorted(found["ratios"])[1]
    assert found["images"] == 8
    for name in (*found["stages"], "whole loader", "plain torchvision", "over plain"):
        assert name in done.out


def test_a_cached_set_without_a_folder_has_no_ratio(
    tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    config = tiny({"data.cache": "device"})
    done = mim("bench", "data", "--config", config, "--rounds", 1, "--images", 64)
    assert done.code == 0, done.err
    assert "read and decode" in done.out and "plain" not in done.out
    wrong = mim("bench", "data", "--config", config, "--rounds", 0)
    assert wrong.code == 2 and wrong.line.startswith("mim: error: --rounds: 0 must be")
    wrong = mim("bench", "data", "--config", config, "--plain", config.parent / "nothing")
    assert wrong.code == 2 and "--plain" in wrong.line


def test_the_plain_pipeline_ends_with_the_same_kind_of_batch(folder: Path) -> None:
    data = DataConfig(source="imagefolder", path=str(folder), image_size=16, batch_size=5)
    source = open_source(data, "train")
    batches = [images for images, _ in plain_loader(data, folder / "train", 10, source)]
    assert [batch.shape for batch in batches] == [(5, 3, 16, 16)] * 2
    assert batches[0].dtype == torch.float32
    everything = torch.cat(batches)
    assert abs(everything.mean()) < 1 and 0.1 < everything.std() < 3  # normalised
