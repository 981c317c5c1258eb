"""What the tests of weights in and out share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # layouts_by_hand

SMALL = {
    "model.backbone_args.num_heads": 3,
    "model.decoder.transformer.heads": 4,
    "model.decoder.transformer.width": 16,
    "model.decoder.transformer.depth": 2,
}
"""What no weights of width 24 tell, and a small decoder where a file has none."""


@pytest.fixture
def small() -> dict[str, object]:
    return dict(SMALL)


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """Writes a torch file."""

    def write(content: object, name: str = "weights.pth") -> Path:
        path = tmp_path / name
        torch.save(content, path)
        return path

    return write


@pytest.fixture
def images() -> Tensor:
    """(3, 3, 16, 16) float64."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
