"""Images with masks and with boxes for the dense tasks, and an encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.settings import to_yaml
from mim.evaluate import Encoder, open_encoder
from mim.training.checkpoint import save_encoder


@pytest.fixture
def config() -> Config:
    args = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
    data = DataConfig(source="photos", image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Config(data=data, model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=args))


@pytest.fixture
def encoder(config: Config) -> Encoder:
    return open_encoder("untrained", config)


@pytest.fixture
def new_run(config: Config, encoder: Encoder, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a run folder with an encoder, as pre-training leaves it."""

    def make(name: str) -> Path:
        run = tmp_path / name
        run.mkdir()
        assert encoder.vit is not None
        (run / "config.yaml").write_text(to_yaml(replace(config, output=str(run))))
        save_encoder(run / "encoder.safetensors", encoder.vit.state_dict(), {})
        return run

    return make


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gray noise with a bright rectangle each: 12 of train, 4 of val; the first line is void."""
    root = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((32, 48), np.uint8)
            top, left = generator.integers(0, 16, 2)
            labels[top : top + 16, left : left + 24] = 1
            pixels = labels * 150 + generator.integers(0, 60, labels.shape).astype(np.uint8)
            labels[0] = 9
            rgb = np.repeat(pixels[..., None], 3, axis=2)
            Image.fromarray(rgb).save(root / f"images/{part}/{number}.png")
            Image.fromarray(labels).save(root / f"masks/{part}/{number}.png")
    return root


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red or a green rectangle on gray noise, with its outline."""
    root = tmp_path_factory.mktemp("squares")
    (root / "annotations").mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 6)):
        (root / part).mkdir()
        names = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": names}
        for number in range(count):
            pixels = generator.integers(80, 120, (32, 48, 3)).astype(np.uint8)
            left, top = generator.integers(0, 28), generator.integers(0, 14)
            pixels[top : top + 16, left : left + 18] = 0
            pixels[top : top + 16, left : left + 18, number % 2] = 255
            Image.fromarray(pixels).save(root / f"{part}/{number}.png")
            image = {"id": number, "file_name": f"{number}.png", "height": 32, "width": 48}
            content["images"].append(image)
            right, bottom = int(left) + 18, int(top) + 16
            corners = [int(left), int(top), right, int(top), right, bottom, int(left), bottom]
            content["annotations"].append(
                {
                    "image_id": number,
                    "category_id": 1 + number % 2,
                    "bbox": [int(left), int(top), 18, 16],
                    "segmentation": [corners],
                }
            )
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(content))
    return root
