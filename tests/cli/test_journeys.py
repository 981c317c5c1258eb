"""What a laboratory does with images that are not photographs, from the command line alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 16


def blobs(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """(count, SIZE, SIZE) from 0 to 1: bright round things on a dark ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    centre = rng.uniform(2, SIZE - 2, (count, 3, 2, 1, 1))
    width = rng.uniform(1, 3, (count, 3, 1, 1))
    square = (y - centre[:, :, 0]) ** 2 + (x - centre[:, :, 1]) ** 2
    return np.exp(-square / (2 * width**2)).max(axis=1)


def test_from_sixteen_bit_tiffs_without_labels_to_embeddings_and_neighbours(
    tmp_path: Path, tiny: Callable[..., Path], mim: Callable[..., Any]
) -> None:
    from mim import MIMFeatures

    root, run = tmp_path / "cells", tmp_path / "run"
    root.mkdir()
    for number, image in enumerate(blobs(60)):
        Image.fromarray((image * 4000).astype(np.uint16)).save(root / f"{number:02}.tif")
    config = tiny({"data.source": "auto", "data.batch_size": 16, "data.image_size": SIZE})
    words = ("--config", config, "--data.path", root)
    looked = mim("data", "inspect", str(root), "--config", config, "--output", tmp_path / "s.png")
    assert "mim pretrain would start" in looked.out and "uint16 x 1" in looked.out
    assert mim("pretrain", *words, "--output", run).code == 0
    assert mim("evaluate", "knn", run).code == 2  # and says what needs no labels
    found = mim("evaluate", "label_free", run)
    assert found.code == 0, found.err
    numbers = json.loads((run / "result.json").read_text())["evaluations"]["label_free"]
    assert 1 <= numbers["effective_rank"] <= 16 and 0 <= numbers["alignment"] <= 4
    assert -4 <= numbers["uniformity"] <= 0 and 0 < numbers["attention_distance"] < 2 * SIZE
    with Image.open(run / "neighbours.png") as page:
        assert page.width > page.height * 0.8 > 0
    files = sorted(root.iterdir())
    features = MIMFeatures(run, device="cpu").fit_transform(files)
    assert features.shape == (60, 16) and np.isfinite(features).all()
    assert features.std(0).min() > 0
    picture = mim("visualize", "reconstruct", run, "--images", "2", "--output", tmp_path / "r.png")
    assert picture.code == 0, picture.err
