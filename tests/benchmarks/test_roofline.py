"""The roofline counts what a step does, and continues it to other depths and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.roofline import Card, Operation, _totals, _whole, operations, roofline
from mim import build_model, load_config
from mim.core.config import Config
from mim.model.regimes import REGIMES
from mim.training.runtime.cost import count_flops

CARD = Card(tflops=1e-3, terabytes=1e-3)
DEEP: dict[str, Any] = {
    "model.backbone_args.depth": 4,
    "model.decoder.transformer.depth": 3,
    "data.batch_size": 7,
}


@pytest.fixture
def config(tiny: Callable[..., Path]) -> Config:
    return load_config(tiny(DEEP))


@pytest.mark.parametrize("regime", list(REGIMES))
def test_few_blocks_tell_of_many(regime: str, config: Config) -> None:
    """A step of the whole depth and batch has the seconds that are continued from small ones."""
    model = replace(config.model, regime=replace(config.model.regime, name=regime))
    config = replace(config, model=model)
    whole: Counter[str] = Counter()
    for item in operations(config, 7):
        whole[item.part] += item.seconds(CARD)
    continued = _whole(config, CARD)
    for part, seconds in whole.items():
        assert continued[part] == pytest.approx(seconds, rel=1e-9), part


def test_arithmetic_is_that_of_the_flop_counter(config: Config) -> None:
    images = torch.randn(2, 1, 8, 8)
    forward, backward = count_flops(build_model(config), images, torch.arange(2))
    found = sum(item.flops for item in operations(config, 2) if item.part == "products")
    attention = sum(item.flops for item in operations(config, 2) if item.part == "attention")
    # Fused attention computes its scores again in the backward pass: 7 products for 6.
    assert found + attention * 6 / 7 == pytest.approx(2 * (forward + backward), rel=1e-9)


def test_an_operation_waits_for_the_slower_of_two() -> None:
    card = Card(tflops=2.0, terabytes=1.0)
    busy, moving = Operation("products", 4e12, 1e12), Operation("casts", 0, 3e12)
    assert busy.seconds(card) == 2.0 and not busy.waits_for_memory(card)
    assert moving.seconds(card) == 3.0 and moving.waits_for_memory(card)


def test_a_slower_memory_makes_more_of_a_step_wait(config: Config) -> None:
    fast, slow = (
        roofline({"small": config}, ["drop"], Card(1.0, terabytes))["rows"][0]
        for terabytes in (1.0, 0.1)
    )
    assert slow["memory"] > fast["memory"] and slow["mfu"] < fast["mfu"]
    assert sum(slow["seconds"].values()) > slow["fused"]["seconds"]
    assert _totals(config, CARD)["waits for memory"] > 0
