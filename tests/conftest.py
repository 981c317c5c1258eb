"""What several tests share: one thread, a tiny config, and the command line in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported, and for child processes: tests are small, threads only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # exact equality is promised for the CPU

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "data": {"source": "digits", "image_size": 8, "channels": 1, "batch_size": 64},
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "decoder": {"transformer": {"width": 16, "depth": 1, "heads": 2}},
    },
    "optim": {"base_lr": 4.0e-3, "warmup_epochs": 0.1},
    "train": {"epochs": 2, "max_steps": 6, "log_every": 2, "validate_every": 0},
    "log": {"tensorboard": False},
}
"""1,617 training images of 8x8 pixels, 25 steps an epoch, 16 patches, some milliseconds a step."""


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with dotted keys set."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(base)))
    for key, value in changes.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


@pytest.fixture
def tiny_tree() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A config of some steps as a mapping, with dotted keys set."""
    return lambda changes: merged(TINY, changes)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of some steps: ``tiny({"mask.ratio": 0.5}) -> config.yaml``."""

    def write(changes: Mapping[str, Any] | None = None, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(TINY, changes or {})))
        return path

    return write


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line left."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr; fails where there are more, or none."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def mim(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls the command line in this process: ``mim("pretrain", "--seed", 1)``."""
    from mim.cli import main

    def call(*args: object) -> Outcome:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return Outcome(code, *capfd.readouterr())

    return call


SIZES = [(8, 12), (12, 8), (10, 10), (6, 16), (16, 6), (12, 12)]


@pytest.fixture
def own_sizes(tmp_path: Path) -> dict[str, Any]:
    """A folder of 48 images of six sizes in two classes; the changes of a config that reads it."""
    generator = np.random.default_rng(0)
    for label, name in enumerate("ab"):
        for number in range(24):
            path = tmp_path / "images" / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = SIZES[number % 6]
            pixels = generator.normal(90 + 60 * label, 30, (height, width)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return {
        "data.source": "imagefolder",
        "data.path": str(tmp_path / "images"),
        "data.aspect": "keep",
        "data.max_patches": 24,
        "data.batch_size": 8,
        "mask.ratio": [0.4, 0.7],
        "model.backbone": "naflexvit_base_patch16_gap",
        "model.backbone_args": {
            "patch_size": 2,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "reg_tokens": 1,
        },
        "train.log_every": 1,
    }
