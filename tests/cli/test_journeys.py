"""What a laboratory does with images that are not photographs, from the command line alone."""

from __future__ import annotations

import csv
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


def bands(root: Path, count: int = 40) -> Path:
    """Float arrays of four channels in two classes, which only the fourth, below 0, tells apart."""
    rng = np.random.default_rng(0)
    for number in range(count):
        label = ("flat", "striped")[number % 2]
        image = np.repeat(blobs(1, number)[0][..., None], 4, axis=2) * 3
        stripes = np.sin(np.arange(SIZE) * (0.5 if label == "flat" else 2))
        image[..., 3] = rng.uniform(0.8, 1.2) * (stripes[:, None] - 2)
        (root / label).mkdir(parents=True, exist_ok=True)
        np.save(root / label / f"{number:02}.npy", image.astype(np.float32))
    return root


def test_four_channels_of_floats_under_three_regimes(
    tmp_path: Path, mim: Callable[..., Any]
) -> None:
    root, output = bands(tmp_path / "bands"), tmp_path / "regimes"
    looked = mim("data", "inspect", root, "--output", tmp_path / "s.png")
    assert "mim pretrain would start" in looked.out and "float32 x 4" in looked.out, looked.out
    small = '{"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}'
    words = ("compare", root, "--output", output, "--base.model.backbone_args", small)
    words += ("--base.train.max_steps", 4, "--base.train.epochs", 2, "--evaluations")
    axes = '{"model.regime.name": ["drop", "zero", "token"], "seed": [0, 1]}'
    compared = mim(*words, '{"knn": {"few_shot": []}}', "--axes", axes)
    assert compared.code == 0, compared.err
    assert "data.channels: 4 (those of the images)" in compared.err
    rows = list(csv.DictReader((output / "results.csv").open()))
    trained = [row for row in rows if row["model.regime.name"] in ("drop", "zero", "token")]
    assert len({(row["model.regime.name"], row["seed"]) for row in trained}) == 6
    report = (output / "report.html").read_text()
    assert all(f">{regime}<" in report for regime in ("drop", "zero", "token"))

    run = next(path.parent for path in sorted(output.glob("*/encoder.safetensors")))
    found = mim("evaluate", "linear", run, "--set", "few_shot=[]")
    assert found.code == 0, found.err
    numbers = json.loads((run / "result.json").read_text())["evaluations"]
    assert numbers["linear"]["accuracy"] == 1, "the fourth channel is read"
    short = ("--set", "epochs=1", "layer_decay=1", "mixup=0", "cutmix=0")
    tuned = mim("evaluate", "finetune", run, *short)
    assert tuned.code == 0, tuned.err
    predicted = mim("predict", run, root, "--output", tmp_path / "classes.csv")
    assert predicted.code == 0, predicted.err
    assert len(list(csv.DictReader((tmp_path / "classes.csv").open()))) == 40
    picture = mim("visualize", "reconstruct", run, "--images", "2", "--output", tmp_path / "r.png")
    assert picture.code == 0, picture.err
