"""Whole runs on images of several sizes: from a folder to an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim.training.checkpoint import read_result

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
SIZES = [(8, 12), (12, 8), (10, 10), (6, 16), (16, 6), (12, 12)]


@pytest.fixture
def config(own_sizes: dict[str, Any], tiny: Tiny) -> Path:
    return tiny(own_sizes)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_padded_packed_and_accumulated_runs_are_one(config: Path, tmp_path: Path, mim: Mim) -> None:
    runs = {}
    for name, args in (
        ("padded", []),
        ("packed", ["--data.batching", "packed"]),
        ("parts", ["--train.accumulate", 2, "--data.workers", 1]),
    ):
        runs[name] = tmp_path / name
        done = mim("pretrain", "--config", config, "--output", runs[name], *args)
        assert done.code == 0, done.err
    expected = losses(runs["padded"])
    assert len(expected) == 6
    for name in ("packed", "parts"):
        assert losses(runs[name]) == pytest.approx(expected, abs=1e-5)
    results = [read_result(run) for run in runs.values()]
    assert len({round(result["val_loss"], 5) for result in results}) == 1
    # Patches of the first two images, 24 and 24 or fewer, a prefix token; padding is not counted.
    assert results[0]["encoder_tokens"] == results[1]["encoder_tokens"] < 1 + 24
    with np.load(runs["padded"] / "reconstructions.npz") as arrays:
        rows, columns = arrays["is_masked"].shape[1:]
        assert arrays["original"].shape[1:] == (2 * rows, 2 * columns, 1)
        assert arrays["is_masked"].any()


@pytest.mark.parametrize("regime", ["zero", "token"])
def test_every_regime_is_evaluated(regime: str, config: Path, tmp_path: Path, mim: Mim) -> None:
    run = tmp_path / "run"
    done = mim("pretrain", "--config", config, "--output", run, "--model.regime.name", regime)
    assert done.code == 0, done.err
    assert mim("evaluate", "knn", run, "--set", "few_shot=[2]").code == 0
    assert read_result(run)["evaluations"]["knn"]["accuracy"] >= 0.5


def test_a_small_image_is_one_clear_line(config: Path, tmp_path: Path, mim: Mim) -> None:
    args = ["pretrain", "--config", config, "--output", tmp_path / "run"]
    done = mim(*args, "--model.backbone_args.patch_size", 8)
    assert done.code == 2 and "less than a patch of 8 x 8" in done.line
