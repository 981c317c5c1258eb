"""Files that ``mim new`` writes: they run as they are, and nothing leaks."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mim as package
from mim.cli.new import KINDS
from mim.evaluate import Features, build_evaluation

CHOICES = {
    "mask": {"mask.name": "fresh_mask"},
    "regime": {"model.regime.name": "fresh_regime"},
    "target": {"model.target.name": "fresh_target"},
    "decoder": {"model.decoder.name": "fresh_decoder", "model.regime.name": "token"},
    "evaluation": {},
    "source": {"data.source": "fresh_source", "data.path": "images.npz"},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_each_works_as_it_is(
    kind: str, mim: Callable[..., Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (40, 8, 8), dtype=np.uint8)
    np.savez("images.npz", images=images, labels=np.arange(40) % 2)
    outcome = mim("new", kind, f"fresh_{kind}")
    assert outcome.code == 0 and f"fresh_{kind}.py" in outcome.out
    assert len(Path(f"fresh_{kind}.py").read_text().splitlines()) <= 40
    assert mim("new", kind, f"fresh_{kind}").code == 2, "a file is not overwritten"
    changes = {**CHOICES[kind], "plugins": [f"fresh_{kind}.py"], "data.batch_size": 8}
    config = tiny({**changes, "train.max_steps": 2, "output": str(tmp_path / "run")})
    outcome = mim("pretrain", "--config", config)
    assert outcome.code == 0, outcome.err
    if kind == "evaluation":
        labels = torch.arange(40) % 2
        values = torch.nn.functional.one_hot(labels, 4).float()
        features = Features(values, labels, torch.arange(40))
        evaluation: Any = build_evaluation("fresh_evaluation", {"few_shot": []})
        assert evaluation.run(features, features)["accuracy"] == 1.0


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"evaluation"}))
def test_what_it_says_to_try_can_be_tried(
    kind: str, mim: Callable[..., Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    np.savez("FILE.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 2)
    told = shlex.split(mim("new", kind, f"fresh_{kind}").out.partition("try it: mim ")[2])
    words = [word for word in told if word != "DIR"]  # the config has images
    config = tiny({"train.max_steps": 1, "data.batch_size": 8, "output": str(tmp_path / "run")})
    outcome = mim(*words, "--config", config)
    assert outcome.code == 0, outcome.err


def test_a_source_that_is_no_file_is_refused(mim: Callable[..., Any], tmp_path: Path) -> None:
    mim("new", "source", "fresh_source")
    known = ("--plugins", '["fresh_source.py"]', "--data.source", "fresh_source")
    outcome = mim("pretrain", *known, "--data.path", tmp_path, "--output", tmp_path / "run")
    assert outcome.code == 2 and f"data.path: '{tmp_path}' must be an .npz file" in outcome.err


@pytest.mark.parametrize("kind", ["mask", "regime", "target"])
def test_nothing_leaks(
    kind: str, mim: Callable[..., Any], tmp_path: Path, tiny: Callable[..., Path]
) -> None:
    assert mim("new", kind, f"fresh_{kind}").code == 0
    config = package.load_config(tiny({**CHOICES[kind], "plugins": [f"fresh_{kind}.py"]}))
    model = package.build_model(config).eval()
    ids = torch.tensor([3, 4])
    mask = package.sample_masks(config.mask, grid=model.grid, seed=0, epoch=0, sample_ids=ids)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden = mask.is_masked.view(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        one = model.latents(images, mask).tokens
        other = model.latents(torch.where(hidden, images + 5, images), mask).tokens
        shown = model.latents(images + 5, mask).tokens
    assert torch.equal(one, other) and not torch.equal(one, shown)
