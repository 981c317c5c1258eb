"""The analysis of layers: its measures by hand, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mim.core.config import Config, DataConfig, ModelConfig
from mim.data import Subset, eval_loader, normalize, open_source
from mim.evaluate import Analysis, AnalysisSettings, effective_rank, linear_cka, open_encoder
from mim.evaluate.probes.analysis import (
    attention_distance,
    layer_distances,
    layer_features,
    patch_distances,
)
from mim.model.backbones import attention_maps, family_of
from mim.report import layers as report
from mim.report.collect import read_comparison
from mim.report.measures import evaluation_measures

ARGS = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=64)
CONFIG = Config(data=DATA, model=ModelConfig(backbone="vit_tiny_patch16_224", backbone_args=ARGS))
SHORT = AnalysisSettings(train_images=100, val_images=50, attention_images=9, compared_images=7)


def test_cka_by_its_properties() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randn(40, 3)
    turned = torch.linalg.qr(torch.randn(5, 5)).Q
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ turned + 2) == pytest.approx(1, abs=1e-5)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    assert linear_cka(x, y) < 0.3
    # As a similarity of Gram matrices (Kornblith et al. 2019, equation 3).
    centre = torch.eye(40) - 1 / 40
    k, m = (centre @ f @ f.T @ centre for f in (x, y))
    by_grams = float((k * m).sum() / (k.norm() * m.norm()))
    assert linear_cka(x, y) == pytest.approx(by_grams, rel=1e-4)
    ids = np.arange(40)
    assert report.linear_cka((x.numpy(), ids), (y.numpy(), ids)) == pytest.approx(
        by_grams, rel=1e-4
    )


def test_effective_rank_counts_directions() -> None:
    line = torch.arange(6.0)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])
    assert effective_rank(line) == pytest.approx(1)
    corners = torch.cat([torch.eye(4), -torch.eye(4)])  # as far in each of four directions
    assert effective_rank(corners) == pytest.approx(4)
    # Two directions whose singular values are 3 to 1.
    uneven = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    by_hand = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert effective_rank(uneven) == pytest.approx(by_hand)


def test_attention_distance_by_hand() -> None:
    encoder = open_encoder("untrained", CONFIG)
    assert encoder.vit is not None
    distances = patch_distances(family_of(encoder.vit))  # 2 x 2 patches of 4 x 4 pixels
    assert distances[0].tolist() == pytest.approx([0, 4, 4, 4 * 2**0.5])
    attention = torch.zeros(1, 2, 5, 5)
    attention[:, 0] = torch.eye(5)  # the first head reads each its own place,
    attention[:, 1] = 0.2  # the second all alike; the class token in front has no place
    found = attention_distance(attention, distances, prefix=1)
    assert found[0].tolist() == pytest.approx([0, (4 + 4 + 4 * 2**0.5) / 4])


def test_layers_of_real_images() -> None:
    encoder, val = open_encoder("untrained", CONFIG), open_source(DATA, "val")
    few = Subset(val, torch.arange(9))
    found = layer_features(encoder, few, "mean", batch_size=4)
    vit: Any = encoder.vit
    (batch,) = eval_loader(few, DATA)
    images = normalize(batch.images, val.mean, val.std)
    with torch.no_grad():
        x = vit._pos_embed(vit.patch_embed(images))
        for layer, block in enumerate(vit.blocks):
            x = block(x)
            assert torch.allclose(found.values[layer], x[:, 1:].mean(1), atol=1e-5)
        family = family_of(vit)
        maps = attention_maps(vit, family.place(family.embed(images)))
    each = torch.stack([attention_distance(m, patch_distances(family), 1).mean(0) for m in maps])
    assert torch.allclose(layer_distances(encoder, few, batch_size=4), each)


def test_what_an_analysis_leaves(tmp_path: Path) -> None:
    encoder = open_encoder("untrained", CONFIG)
    train, val = open_source(DATA, "train"), open_source(DATA, "val")
    numbers = Analysis(SHORT).run(encoder, train, val, folder=tmp_path)
    assert set(numbers) == {"effective_rank", "attention_distance"} | {
        f"layer_{layer}_{name}"
        for layer in (1, 2)
        for name in ("accuracy", "effective_rank", "attention_distance")
    }
    assert numbers["effective_rank"] == numbers["layer_2_effective_rank"]
    both = (numbers["layer_1_attention_distance"] + numbers["layer_2_attention_distance"]) / 2
    assert numbers["attention_distance"] == pytest.approx(both)
    assert 0.1 < numbers["layer_2_accuracy"] <= 1
    with np.load(tmp_path / "analysis" / "features.npz") as file:
        assert file["features"].shape == (2, 7, 16) and file["sample_ids"].shape == (7,)
    with Image.open(tmp_path / "analysis" / "layers.png") as image:
        assert image.width > 900
    assert Analysis(SHORT).run(encoder, train, val) == numbers


def test_what_the_report_shows_of_it(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 1, 30, 4))
    names = []
    for regime in ("drop", "zero"):
        for seed in (0, 1):
            name = f"name={regime},seed={seed}"
            names.append(name)
            (tmp_path / name / "analysis").mkdir(parents=True)
            evaluations = {"layer_1_accuracy": 0.25 + 0.5 * seed, "layer_1_effective_rank": 2.0}
            result = {
                "format": 1,
                "kind": "run",
                "name": name,
                "status": "finished",
                "seed": seed,
                "axes": {"model.regime.name": regime, "seed": seed},
                "evaluations": {"analysis": {**evaluations, "effective_rank": 2.0}},
            }
            (tmp_path / name / "result.json").write_text(json.dumps(result))
            features = drawn[seed] * (1 if regime == "drop" else 2)
            place = tmp_path / name / "analysis" / "features.npz"
            np.savez(place, features=features, sample_ids=np.arange(30))
    overview = {"format": 1, "name": "x", "axes": {"seed": [0, 1]}, "base": {}, "runs": names}
    (tmp_path / "comparison.json").write_text(json.dumps(overview))
    comparison = read_comparison(tmp_path)
    table = report.layers_table(comparison)
    assert table is not None
    rows = [[cell.text for cell in row.cells] for row in table.rows]
    assert rows[0] == ["drop", "linear probe (%)", "50.0"]
    assert rows[1] == ["drop", "effective rank", "2.0"]
    alignment = report.alignment_table(comparison)
    assert alignment is not None
    cells = [[cell.text for cell in row.cells] for row in alignment.rows]
    assert cells[0][0] == "drop" and cells[0][2] == cells[1][1] == "1.00"  # scale does not count
    assert float(cells[0][1]) < 0.6  # between seeds
    assert [m.key for m in evaluation_measures(comparison)] == ["analysis.effective_rank"]
