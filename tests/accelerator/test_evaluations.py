"""Evaluations on an accelerator: they run there, and what is trained does not wait in its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mim import build_model, encode
from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.device import to_device
from mim.evaluate import build_evaluation, evaluate, open_encoder
from mim.training.trainer import Trainer
from tests.accelerator.pretend import NAME, Pretend, Wait, device

ARGS = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=64, flip=False)
CONFIG = Config(data=DATA, model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS))
TRAINED: dict[str, Any] = {"epochs": 1, "fraction": 0.05, "batch_size": 32}
SHORT: dict[str, dict[str, Any]] = {
    "finetune": {**TRAINED, "drop_path": 0.2, "erasing": 0.5, "accumulate": 2, "clip_grad": 1.0},
    "linear_mae": TRAINED,
    "attentive": {**TRAINED, "base_lr": [1e-2, 1e-1]},
    "linear": {"max_iterations": 3, "strengths": [1e-2]},
    "linear_grid": {"epochs": 1},
    "knn": {"k": [5]},
}


@pytest.fixture
def in_steps(noted: Pretend, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Wait]]:
    """What waited in steps of the trainer; some are taken, whoever takes them."""
    found: list[Wait] = []
    taken = []
    plain = Trainer.train_step

    def step(self: Trainer, batch: Any) -> None:
        before = len(noted.waits)
        plain(self, batch)
        found.extend(noted.waits[before:])
        taken.append(batch)

    monkeypatch.setattr(Trainer, "train_step", step)
    yield found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SHORT)
def test_classification(name: str, precision: str, in_steps: list[Wait], noted: Pretend) -> None:
    encoder = open_encoder("untrained", CONFIG)
    numbers = evaluate(
        encoder,
        {name: SHORT[name]},
        device=device(),
        precision=precision,
    )
    assert all(value >= 0 for key, value in numbers[name].items() if "accuracy" in key), numbers
    assert noted.waits  # answers are read
    assert not in_steps, Counter(map(str, in_steps))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_encode(precision: torch.dtype, noted: Pretend) -> None:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = build_model(CONFIG).eval()
    with torch.no_grad():
        expected = encode(model, images)
        model.to(device())
        noted.waits.clear()
        with torch.autocast(NAME, precision, enabled=precision != torch.float32):
            found = encode(model, to_device(images.pin_memory(), device()))
    assert found.device == device() and not noted.waits
    tolerance = 1e-5 if precision == torch.float32 else 3e-2
    assert torch.allclose(found.cpu().float(), expected, atol=tolerance)


DENSE: dict[str, Any] = {
    "image_size": [32, 48],
    "epochs": 1,
    "batch_size": 4,
    "width": 16,
    "drop_path": 0.2,
    "held_out": 0.25,
    "pictures": 1,
}
DENSE_ARGS = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DENSE_CONFIG = Config(
    data=DataConfig(source="photos", image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3),
    model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=DENSE_ARGS),
)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_segmentation(head: str, scenes: Path, tmp_path: Path, in_steps: list[Wait]) -> None:
    given = {**DENSE, "path": str(scenes), "classes": ["dark", "light"], "void": 9, "head": head}
    evaluation = build_evaluation("segment", given)
    encoder = open_encoder("untrained", DENSE_CONFIG)
    numbers = evaluation.run(encoder, device=device(), folder=tmp_path, precision="bf16")
    assert 0 <= numbers["miou"] <= 1
    assert not in_steps, Counter(map(str, in_steps))


def test_detection(squares: Path, tmp_path: Path, in_steps: list[Wait], noted: Pretend) -> None:
    given = {
        **DENSE,
        "path": str(squares),
        "scales": [2, 1],
        "proposals": 10,
        "samples": 4,
        "masks": False,
    }
    evaluation = build_evaluation("detect", given)
    encoder = open_encoder("untrained", DENSE_CONFIG)
    numbers = evaluation.run(encoder, device=device(), folder=tmp_path)
    assert 0 <= numbers["map"] <= 1
    # torchvision's detectors choose boxes by value: they wait, and nothing else does.
    assert {wait.code for wait in in_steps} == {
        "losses: dict[str, Tensor] = self.network(images, targets)",
        "ones, others = self.plain([regions])",
    }
