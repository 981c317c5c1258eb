"""Images with masks and with boxes, for the dense tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


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
