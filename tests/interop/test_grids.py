"""Grids of patches that are not square survive every layout, whatever says which grid it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed

import mim as package
from mim.evaluate import open_encoder
from mim.model.backbones import fixed_grid, resample_positions, sincos_position_embedding
from mim.training.checkpoint import read_config

SIZE = [4, 16]  # 2 x 8 patches of 2 x 2 pixels
KINDS = ("learned", "sincos2d")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(kind: str, tmp_path: Path, tiny: Callable[..., Path], mim: Any) -> Path:
    changes = {
        "data.image_size": SIZE,
        "train.max_steps": 2,
        "model.position_embedding": kind,
        "optim.base_lr": 0.1,
    }
    path = tmp_path / "run"
    assert mim("pretrain", "--config", tiny(changes), "--output", path).code == 0
    return path


def exported(run: Path, mim: Any, part: str) -> Path:
    path = run.parent / f"{part}.pth"
    assert mim("export", run, "--to", "mae", "--part", part, "--output", path).code == 0
    return path


def without_arguments(path: Path) -> dict[str, Any]:
    """What MAE's own script would have stored: nothing that says which grid it is."""
    content = torch.load(path, weights_only=True)
    del content["args"]
    torch.save(content, path)
    state: dict[str, Any] = content["model"]
    return state


def same(one: Path, other: Path) -> bool:
    images = torch.randn(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = [package.load(run).encode(images) for run in (one, other)]
    return torch.allclose(*found, atol=1e-5)


HEADS = ("--model.backbone_args.num_heads", 2, "--model.decoder.transformer.heads", 2)


@pytest.mark.parametrize("part", ["model", "encoder"])
def test_through_maes_layout_and_back(part: str, run: Path, mim: Any) -> None:
    back = run.parent / "back"
    assert mim("import", exported(run, mim, part), "--output", back, *HEADS).code == 0
    assert read_config(back).data.size == (4, 16) and same(run, back)


def test_the_table_or_the_user_says_which_grid(kind: str, run: Path, mim: Any) -> None:
    places = {"model": exported(run, mim, "model"), "encoder": exported(run, mim, "encoder")}
    for part, path in places.items():
        without_arguments(path)
        back = run.parent / f"back-{part}"
        asked = () if kind == "sincos2d" or part == "model" else ("--data.image_size", SIZE)
        outcome = mim("import", path, "--output", back, *HEADS, *asked)
        assert outcome.code == 0, outcome.err
        assert read_config(back).data.size == (4, 16) and same(run, back), part
        if asked:
            assert "do not show their grid: 2 x 8" in outcome.out


def test_a_contradiction_is_refused(kind: str, run: Path, mim: Any) -> None:
    path = exported(run, mim, "encoder")
    content = torch.load(path, weights_only=True)
    content["args"]["input_size"] = 8
    torch.save(content, path)
    outcome = mim("import", path, "--output", run.parent / "back", *HEADS)
    if kind == "learned":  # which shows nothing, so that the file is believed
        assert outcome.code == 0
        return
    assert outcome.code == 2 and not (run.parent / "back").exists()
    assert "encoder.pth" in outcome.line and "2 x 8" in outcome.line


def test_a_named_file_into_another_grid(kind: str, run: Path, mim: Any) -> None:
    if kind == "learned":
        return  # its grid is that of the model
    state = without_arguments(exported(run, mim, "encoder"))
    config = read_config(run)
    other = package.load_config(
        None,
        {
            "data.source": "digits",
            "data.channels": 1,
            "data.image_size": 8,
            "model.backbone": config.model.backbone,
            "model.backbone_args": dict(config.model.backbone_args),
        },
    )
    vit: Any = open_encoder(f"{config.model.backbone}@{run.parent / 'encoder.pth'}", other).vit
    # Not by timm's function: an older one takes 2 x 8 for 4 x 4, which has as many patches.
    maps = state["pos_embed"][:, 1:].reshape(1, 2, 8, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=(4, 4), mode="bicubic", antialias=True)
    assert torch.allclose(vit.pos_embed[:, 1:], maps.flatten(2).transpose(1, 2), atol=1e-6)
    assert torch.equal(vit.pos_embed[:, :1], state["pos_embed"][:, :1])
    assert not torch.allclose(vit.pos_embed, state["pos_embed"], atol=0.1)


@pytest.mark.parametrize("new", [(2, 4), (3, 5), (8, 2), (7, 7)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_positions_are_resampled_as_timm_does(new: tuple[int, int], prefix: int) -> None:
    table = torch.randn(1, prefix + 16, 8, generator=torch.Generator().manual_seed(1))
    expected = resample_abs_pos_embed(table, list(new), [2, 8], prefix)
    assert torch.equal(resample_positions(table, new, (2, 8), prefix), expected)


@pytest.mark.parametrize("grid", [(2, 8), (4, 4), (8, 2), (14, 14), (3, 5)])
def test_a_fixed_table_shows_its_grid(grid: tuple[int, int]) -> None:
    table = sincos_position_embedding(grid, 32)[0]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    for shown in (table, table[:, order], table.bfloat16().float()):
        assert fixed_grid(shown) == grid
    assert fixed_grid(torch.randn(table.shape, generator=torch.Generator().manual_seed(1))) is None
    assert fixed_grid(torch.zeros_like(table)) is None
