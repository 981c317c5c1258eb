"""A made-up comparison folder, as ``mim compare`` leaves it behind."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LINEAR = {"drop": 0.931, "zero": 0.935, "token": 0.902}
COST = {"drop": 0.35, "zero": 0.8, "token": 1.0}


def _config(axes: dict[str, Any], seed: int, output: str = "") -> dict[str, Any]:
    config: dict[str, Any] = {
        "seed": seed,
        "output": output,
        "data": {"source": "mnist5k", "image_size": 28, "batch_size": 64},
        "mask": {"name": "random", "ratio": 0.75},
        "model": {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"patch_size": 4},
            "regime": {"name": "drop"},
            "target": {"name": "normalized_pixels"},
        },
        "train": {"epochs": 20},
    }
    for key, value in axes.items():
        block = config
        *parts, last = key.split(".")
        for part in parts:
            block = block[part]
        block[last] = value
    return config


def _images(regime: str, ratio: float, channels: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    n, side, patch = 6, 28, 4
    y, x = np.mgrid[:side, :side] / side
    waves = [
        np.sin(9 * x * generator.random() + 9 * y * generator.random()) for _ in range(n * channels)
    ]
    original = np.stack(waves).reshape(n, channels, side, side).transpose(0, 2, 3, 1)
    original = (original * 120 + 128).clip(0, 255)
    rows = side // patch
    order = generator.random((n, rows * rows)).argsort(1).argsort(1)
    is_masked = (order < round(rows * rows * ratio)).reshape(n, rows, rows)
    hidden = is_masked.repeat(patch, 1).repeat(patch, 2)[..., None]
    noise = np.random.default_rng(zlib.crc32(regime.encode())).normal(0, 18, original.shape)
    prediction = (original + noise).clip(0, 255)
    arrays = {
        "original": original,
        "masked": np.where(hidden, 128, original),
        "prediction": prediction,
        "composite": np.where(hidden, prediction, original),
    }
    return {key: value.astype(np.uint8) for key, value in arrays.items()} | {"is_masked": is_masked}


@pytest.fixture
def fake_comparison(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a comparison folder.

    Its options: ``axes``; ``failed``, run names that fail; ``labelled``; ``references``;
    ``channels``; ``name``; ``command``; ``linear``, a function of (axes, seed) to the accuracy;
    ``error``, the reason of failures; ``metrics``, whether curves and pictures are there.
    """

    def write(
        axes: dict[str, list[Any]] | None = None,
        failed: tuple[str, ...] = (),
        labelled: bool = True,
        references: bool = True,
        channels: int = 1,
        name: str = "Three regimes on small images",
        command: str = "mim compare --config configs/compare/demo.yaml",
        linear: Callable[[dict[str, Any], int], float] | None = None,
        error: str = "loss is NaN at step 40, learning rate 0.0003",
        metrics: bool = True,
        folder: Path = tmp_path / "comparison",
    ) -> Path:
        axes = axes or {"model.regime.name": ["drop", "zero", "token"], "seed": [0, 1, 2]}
        names = []

        def save(run: str, content: dict[str, Any]) -> Path:
            names.append(run)
            path = folder / run
            path.mkdir(parents=True)
            result = {"format": 1, "name": run, "status": "finished"} | content
            (path / "result.json").write_text(json.dumps(result))
            return path

        for values in product(*axes.values()):
            own = dict(zip(axes, values, strict=True))
            seed = own.get("seed", 0)
            regime = own.get("model.regime.name", "drop")
            ratio = own.get("mask.ratio", 0.75)
            short = ",".join(f"{key.split('.')[-2:][0]}={value}" for key, value in own.items())
            run = short.replace("/", "_") or "run"
            shift = float(np.random.default_rng([seed, 1]).normal(0, 0.004))
            wobble = float(
                np.random.default_rng([seed, zlib.crc32(regime.encode())]).normal(0, 0.003)
            )
            base = LINEAR.get(regime, 0.9) + shift + wobble
            accuracy = linear(own, seed) if linear else base
            cost = COST.get(regime, 1.0)
            common = {"kind": "run", "axes": own, "seed": seed, "config": _config(own, seed, run)}
            if run in failed:
                save(run, common | {"status": "failed", "error": error})
                continue
            evaluations = {
                "linear": {
                    "accuracy": accuracy,
                    "accuracy_10_per_class": accuracy - 0.18,
                    "accuracy_10_per_class_std": 0.021,
                },
                "knn": {"accuracy": accuracy - 0.03},
            }
            path = save(
                run,
                common
                | {
                    "steps": 1400,
                    "epochs": 20.0,
                    "train_loss": 0.43 + 0.1 * cost + wobble,
                    "val_loss": 0.44 + 0.1 * cost + wobble,
                    "encoder_tokens": 13.0 if regime == "drop" else 50.0,
                    "flops_forward": int(6.4e7 * cost),
                    "flops_backward": int(1.28e8 * cost),
                    "images_per_second": 2100.0 / cost,
                    "peak_memory_bytes": None,
                    "wall_seconds": 61.3 * cost + seed,
                    "environment": {"device": "cpu", "torch": "2.15.0", "cpu": "Some CPU"},
                    "data": {
                        "source": "mnist5k",
                        "train_images": 4500,
                        "val_images": 500,
                        "fingerprint": "9f2c41d0",
                    },
                    "evaluations": evaluations if labelled else {},
                },
            )
            if metrics:
                lines: list[dict[str, float]] = []
                for step in range(10, 1401, 10):
                    loss = 0.43 + 0.1 * cost + 0.6 * np.exp(-step / 250) + wobble
                    line = {"step": step, "epoch": step / 70, "loss": float(loss), "lr": 1e-3}
                    lines.append(line)
                    if step % 140 == 0:
                        lines.append({"step": step, "epoch": step / 70, "val_loss": loss + 0.01})
                text = "\n".join(json.dumps(line) for line in lines) + "\n"
                (path / "metrics.jsonl").write_text(text)
                np.savez(path / "reconstructions.npz", **_images(regime, ratio, channels))
        if references:
            for seed in axes.get("seed", [0]):
                low = 0.76 + 0.004 * seed
                numbers = {"linear": {"accuracy": low}, "knn": {"accuracy": 0.7 + 0.003 * seed}}
                numbers["linear"]["accuracy_10_per_class"] = low - 0.2
                content = {"kind": "untrained", "seed": seed, "config": _config({}, seed)}
                save(f"untrained,seed={seed}", content | {"evaluations": numbers})
            numbers = {"linear": {"accuracy": 0.872}, "knn": {"accuracy": 0.906}}
            numbers["linear"]["accuracy_10_per_class"] = 0.68
            content = {"kind": "pixels", "seed": 0, "config": _config({}, 0)}
            save("pixels", content | {"evaluations": numbers})
        content = {
            "format": 1,
            "name": name,
            "axes": axes,
            "command": command,
            "base": _config({}, 0, "runs"),
            "runs": names,
        }
        (folder / "comparison.json").write_text(json.dumps(content))
        return folder

    return write
