"""Whole evaluations: features once a pooling, result.json merged, mistakes told at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import mim.evaluate
from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.errors import UserError
from mim.data import ImageSource, Subset, open_source
from mim.evaluate import EVALUATIONS, Encoder, Linear, evaluate, evaluate_run, open_encoder
from mim.model.backbones import build_backbone

ARGS = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=64)
MODEL = ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=dict(ARGS))
CONFIG = Config(data=DATA, model=MODEL)
QUICK = {"few_shot": [5], "draws": 2}


@pytest.fixture
def encoder() -> Encoder:
    return open_encoder("untrained", CONFIG)


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(pooling, images) of every extraction."""
    calls = []
    real = mim.evaluate.extract_features

    def spy(encoder: Encoder, source: ImageSource, pool: str, *args: Any) -> Any:
        calls.append((pool, len(source)))
        return real(encoder, source, pool, *args)

    monkeypatch.setattr(mim.evaluate, "extract_features", spy)
    return calls


@pytest.fixture
def linear_twin() -> Iterator[str]:
    EVALUATIONS.register("twin")(Linear)
    yield "twin"
    del EVALUATIONS._entries["twin"]


def test_features_are_computed_once_for_each_pooling(
    encoder: Encoder, extracted: list[tuple[str, int]], linear_twin: str
) -> None:
    settings = {
        "linear": {**QUICK, "pool": "cls"},
        "knn": {**QUICK, "pool": "mean"},
        linear_twin: {**QUICK, "pool": "mean"},
    }
    numbers = evaluate(encoder, settings)
    assert list(numbers) == ["linear", "knn", "twin"]
    sizes = [len(open_source(DATA, split)) for split in ("train", "val")]
    assert sorted(extracted) == sorted((pool, n) for pool in ("cls", "mean") for n in sizes)
    # The same probe on other tokens; sharing features across poolings would make them equal.
    assert numbers["linear"] != numbers["twin"]
    alone = evaluate(encoder, {"linear": settings["linear"]})
    assert alone["linear"] == numbers["linear"]


def test_numbers_are_flat_and_mean_something(encoder: Encoder) -> None:
    numbers = evaluate(encoder, {"knn": QUICK, "linear": QUICK})
    for name in ("knn", "linear"):
        assert all(type(v) in (int, float) for v in numbers[name].values())
        assert 0.2 < numbers[name]["accuracy_5_per_class"] < numbers[name]["accuracy"] <= 1
    pixels = evaluate(open_encoder("pixels", CONFIG), {"knn": QUICK, "linear": QUICK})
    assert pixels["knn"]["accuracy"] > 0.95
    assert pixels["linear"]["accuracy"] > 0.9


def test_pixels_have_no_pooling(extracted: list[tuple[str, int]]) -> None:
    settings = {"knn": {**QUICK, "pool": "cls"}, "linear": QUICK}
    evaluate(open_encoder("pixels", CONFIG), settings)
    assert len(extracted) == 2


def test_given_sources_are_used(encoder: Encoder) -> None:
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    swapped = evaluate(encoder, {"knn": QUICK}, train=val, val=train)
    assert swapped != evaluate(encoder, {"knn": QUICK})
    assert evaluate(encoder, {"knn": QUICK}) == evaluate(
        encoder, {"knn": QUICK}, train=train, val=val
    )


def test_mistakes_are_told_before_any_feature(
    encoder: Encoder, extracted: list[tuple[str, int]]
) -> None:
    train = open_source(DATA, "train")
    unlabelled = open_source(DATA, "val")
    unlabelled.labels = None
    with pytest.raises(
        UserError, match=r"data\.source 'digits' has no labels; evaluation linear needs them"
    ):
        evaluate(encoder, {"linear": QUICK}, val=unlabelled)
    with pytest.raises(UserError, match=r"few_shot: \(999,\) asks for 999 images a class, but"):
        evaluate(encoder, {"knn": {"few_shot": [999]}})
    with pytest.raises(UserError, match="has no images"):
        evaluate(encoder, {"knn": QUICK}, val=Subset(train, torch.tensor([], dtype=torch.int64)))
    with pytest.raises(UserError, match="'nearest' is not one of"):
        evaluate(encoder, {"knn": QUICK, "nearest": {}})
    with pytest.raises(UserError, match=r"evaluations.knn: 'n' is not one of draws, few_shot, k"):
        evaluate(encoder, {"knn": {"n": 3}})
    no_class_token = ModelConfig(
        backbone=MODEL.backbone, backbone_args={**ARGS, "class_token": False, "global_pool": "avg"}
    )
    bare = Encoder("x", "untrained", DATA, build_backbone(no_class_token, (8, 8), 1, 0))
    with pytest.raises(UserError, match="needs a class token"):
        evaluate(bare, {"knn": QUICK, "linear": {"pool": "both"}})
    assert extracted == []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    settings = {
        "data": {"source": "digits", "image_size": 8, "channels": 1, "batch_size": 64},
        "model": {"backbone": MODEL.backbone, "backbone_args": ARGS},
        "seed": 0,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    vit = build_backbone(MODEL, (8, 8), 1, 7)
    save_file(vit.state_dict(), tmp_path / "encoder.safetensors")
    return tmp_path


def test_run_gets_its_numbers_merged(run: Path) -> None:
    before = {"loss": 0.5, "evaluations": {"other": {"accuracy": 0.1}, "knn": {"old": 1.0}}}
    (run / "result.json").write_text(json.dumps(before))
    numbers = evaluate_run(run, ["knn"], {"knn": QUICK})
    result = json.loads((run / "result.json").read_text())
    assert result["loss"] == 0.5
    assert result["evaluations"] == {"other": {"accuracy": 0.1}, "knn": numbers["knn"]}
    settings = EVALUATIONS.get("knn").Settings(few_shot=(5,), draws=2)
    assert result["evaluation_settings"]["knn"] == json.loads(json.dumps(asdict(settings)))
    evaluate_run(run, ["linear"], {"linear": QUICK})
    assert json.loads((run / "result.json").read_text())["evaluations"].keys() == {
        "other",
        "knn",
        "linear",
    }
    assert sorted(p.name for p in run.iterdir()) == [
        "config.yaml",
        "encoder.safetensors",
        "predictions.npz",
        "result.json",
    ]


def test_run_without_a_result_and_equal_to_evaluate(run: Path) -> None:
    numbers = evaluate_run(run, ["knn"], {"knn": QUICK})
    assert numbers == evaluate(open_encoder(run), {"knn": QUICK})
    assert json.loads((run / "result.json").read_text())["evaluations"] == numbers


def test_broken_result_is_kept(run: Path, extracted: list[tuple[str, int]]) -> None:
    (run / "result.json").write_text('{"loss": 0.')
    with pytest.raises(UserError, match=r"result.json cannot be read"):
        evaluate_run(run, ["knn"])
    assert (run / "result.json").read_text() == '{"loss": 0.'
    assert extracted == []


def test_settings_of_what_does_not_run(run: Path) -> None:
    with pytest.raises(UserError, match=r"evaluations.linear: has settings, but only knn run"):
        evaluate_run(run, ["knn"], {"linear": {}})
    with pytest.raises(UserError, match="'liner' is not one of"):
        evaluate_run(run, ["knn"], {"liner": {}})
    assert not (run / "result.json").exists()
