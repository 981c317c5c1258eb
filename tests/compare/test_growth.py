"""How a step's time and memory grow: what is counted, fitted and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mim import build_model, load_config
from mim.compare.cost.growth import fit
from mim.compare.cost.memory import bytes_added, bytes_of

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
CPU = torch.device("cpu")
KIB = 1024


def test_bytes_of_a_step_by_hand(capfd: pytest.CaptureFixture[str]) -> None:
    def step() -> None:
        first = torch.empty(3 * KIB, dtype=torch.uint8)
        second = torch.empty(5 * KIB, dtype=torch.uint8)
        del first
        third = torch.empty(4 * KIB, dtype=torch.uint8)
        del second, third
        torch.empty(7 * KIB, dtype=torch.uint8)

    assert bytes_added(step, CPU) == 9 * KIB
    assert bytes_added(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""


def test_what_is_written_to_stderr_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    def step() -> None:
        import os

        os.write(2, b"of the step\n")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        bytes_added(step, CPU)
    assert capfd.readouterr().err.strip() == "of the step"


def test_bytes_of_views_count_once() -> None:
    whole = torch.zeros(100, dtype=torch.float32)
    assert bytes_of([whole, whole[:10], whole.view(10, 10), torch.zeros(3)]) == 400 + 12
    assert bytes_of([torch.zeros(0)]) == 0


def test_fits_of_known_laws() -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    straight = fit(x, [3 + 2 * value for value in x])
    assert straight.intercept == pytest.approx(3) and straight.slope == pytest.approx(2)
    assert straight.linear_r2 == pytest.approx(1) and straight.power_r2 < 0.999
    square = fit(x, [5 * value**2 for value in x])
    assert square.exponent == pytest.approx(2) and square.power_r2 == pytest.approx(1)
    assert square.linear_r2 < 0.97


def test_what_drop_saves_in_memory_grows_with_depth(tiny: Tiny) -> None:
    """Of a block's activations `drop` keeps the visible share, here 5 of 17 tokens."""
    added: dict[str, list[int]] = {}
    images = torch.randn(64, 1, 8, 8)
    for regime in ("drop", "token"):
        for depth in (1, 3, 5):
            changes = {"model.regime.name": regime, "model.backbone_args.depth": depth}
            model = build_model(load_config(tiny(changes)))
            ids = torch.arange(64)

            def step(model: Any = model, ids: torch.Tensor = ids) -> None:
                model(images, model.draw_mask(images, ids, sample_ids=ids)).loss.backward()
                model.zero_grad()

            step()
            added.setdefault(regime, []).append(bytes_added(step, CPU))
    drop, token = (added[name] for name in ("drop", "token"))
    assert drop[2] - drop[1] == pytest.approx(drop[1] - drop[0], rel=0.02), "linear in depth"
    assert (drop[2] - drop[1]) / (token[2] - token[1]) == pytest.approx(5 / 17, rel=0.1)


def test_grow_over_a_setting(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    call = ("bench", "grow", "--config", tiny(), "--rounds", 1, "--regimes", "drop")
    files = [tmp_path / "new" / name for name in ("growth.json", "growth.md", "growth.png")]
    written = [part for file in files for part in (f"--{_OPTION[file.suffix]}", file)]
    done = mim(*call, "--over", "data.batch_size=16,32,64", *written)
    assert done.code == 0, done.err
    figures = json.loads(files[0].read_text())
    assert figures["over"] == "data.batch_size" and figures["values"] == ["16", "32", "64"]
    rows = figures["curves"]["drop"]
    for row in rows:
        assert row["peak_memory"] == row["kept_memory"] + row["step_memory"]
    # Twice the images, twice the activations; weights and moments stay, the images are 256 bytes.
    one, two, four = (row["step_memory"] for row in rows)
    assert four - two == pytest.approx(2 * (two - one), rel=0.1)
    assert rows[1]["kept_memory"] - rows[0]["kept_memory"] == 16 * 8 * 8 * 4
    fits = figures["fits"]["drop"]
    assert fits["step_memory"]["linear_r2"] > 0.99 and fits["seconds_per_step"]["exponent"] < 2
    assert done.out.count("| drop |") == 4 and "| drop | 64 |" in files[1].read_text()
    assert "batch 16," not in done.out, "the batch is what varies"
    assert Image.open(files[2]).size[0] > 600

    for over, said in (
        ("data.batch_size", "KEY=V1,V2"),
        ("data.batch_size=4", "two values"),
        ("model.regime.name=drop,zero", "--regimes"),
        ("model.nothing=1,2", "model.nothing"),
        ("mask.ratio=[0.5", "JSON list"),
    ):
        refused = mim(*call, "--over", over)
        assert refused.code == 2 and said in refused.line


_OPTION = {".json": "json", ".md": "append", ".png": "figure"}


def test_parts_of_a_batch_take_less_memory(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    """Accumulation and checkpointing: the same loss from less memory."""
    numbers = tmp_path / "numbers.json"
    call = ("bench", "step", "--config", tiny({"model.backbone_args.depth": 4}), "--rounds", 1)
    variants = {"parts": {"train.accumulate": 4}, "again": {"train.gradient_checkpointing": True}}
    few = ("--steps", 1, "--regimes", "token", "--json", numbers)
    done = mim(*call, *few, "--variants", json.dumps(variants), "--model.regime.name", "token")
    assert done.code == 0, done.err
    rows = json.loads(numbers.read_text())["regimes"]
    whole, cut, again = (rows[name] for name in ("token", "parts", "again"))
    assert cut["kept_memory"] == again["kept_memory"] == whole["kept_memory"]
    added = {name: row["peak_memory"] - row["kept_memory"] for name, row in rows.items()}
    assert added["parts"] < 0.5 * added["token"] and added["again"] < 0.7 * added["token"]
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-5)
