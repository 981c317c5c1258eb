"""The roofline counts what a step does, and continues it to other depths and batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.roofline import KEPT, Card, Operation, _totals, operations, roofline, whole_step
from mim import build_model, load_config
from mim.compare.cost.memory import bytes_added
from mim.core.config import Config
from mim.masks import sample_masks
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
    assert_continued(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"model.decoder.name": "linear", "model.regime.name": "token"},
        {"model.decoder.name": "cross_attention", "model.decoder.cross_attention.layers": "maps"},
        {"model.decoder.name": "convolutional", "model.decoder.convolutional.groups": 4},
        {"model.target.name": "ema_features", "model.target.ema_features.top": 2},
        {"mask.repeats": 3},
        {"mask.name": "attention"},
    ],
    ids=lambda settings: ",".join(str(value) for value in settings.values()),
)
def test_few_blocks_tell_of_many_in_other_methods(
    settings: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    sizes = {"cross_attention.depth": 3, "convolutional.depth": 4, "convolutional.width": 16}
    sizes |= {"cross_attention.width": 16, "cross_attention.heads": 2}
    decoders = {f"model.decoder.{key}": value for key, value in sizes.items()}
    assert_continued(load_config(tiny({**DEEP, **decoders, **settings})))


def assert_continued(config: Config) -> None:
    whole: Counter[str] = Counter()
    for item in operations(config, 7):
        whole[item.part] += item.bytes if item.part == KEPT else item.seconds(CARD)
    continued = whole_step(config, CARD)
    for part, figure in whole.items():
        assert continued[part] == pytest.approx(figure, rel=1e-9), part


def test_a_mask_that_sees_the_image_is_part_of_the_step(config: Config) -> None:
    counted, found = [], []
    for name in ("random", "attention"):
        config = replace(config, mask=replace(config.mask, name=name))
        images = torch.randn(2, 1, 8, 8)
        counted.append(2 * count_flops(build_model(config), images, torch.arange(2))[0])
        found.append(sum(item.flops for item in operations(config, 2)))
    assert found[1] - found[0] == counted[1] - counted[0] > 0


def test_what_is_kept_is_what_the_allocator_gives_out(config: Config) -> None:
    """A forward pass keeps as much as it says, beside what it needs for a moment."""
    model = build_model(config).train()
    images = torch.randn(64, 1, 8, 8)
    mask = sample_masks(config.mask, model.grid, seed=0, epoch=0, sample_ids=list(range(64)))
    given_out = bytes_added(lambda: model(images, mask), torch.device("cpu"))
    kept = sum(item.bytes for item in operations(config, 64) if item.part == KEPT)
    assert 0.9 * given_out < kept < given_out


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
