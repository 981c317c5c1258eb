"""torch.compile of a step: one graph, no break in it, and no other one from step to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mim import build_model, load_config
from mim.core.rng import image_keys
from mim.model.regimes import REGIMES

Step = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(path: Path, counter: CompileCounterWithBackend) -> Step:
    """The loss of a step under other masks each time, forward and backward."""
    config = load_config(path)
    model = build_model(config).train()
    forward = torch.compile(model, fullgraph=True, backend=counter)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def step(number: int) -> Tensor:
        ids = torch.arange(6) + 6 * number
        keys = image_keys(0, number, ids)
        mask = model.draw_mask(images, keys, epoch=number, sample_ids=ids)
        loss = forward(images, mask).loss
        loss.backward()
        plain = model(images, mask).loss
        assert torch.allclose(loss, plain, atol=1e-5)
        return loss

    return step


EQUAL: dict[str, dict[str, Any]] = {
    **{name: {"model.regime.name": name} for name in REGIMES},
    "zero dense": {"model.regime.name": "zero", "model.regime.zero.attention": "dense"},
    "zero, pixels": {"model.regime.name": "zero", "model.regime.zero.at": "pixels"},
    "cross_attention": {"model.decoder.name": "cross_attention"},
    "linear": {"model.decoder.name": "linear", "model.regime.name": "token"},
    "ema_features": {"model.target.name": "ema_features"},
    "data2vec 2": {
        "model.target.name": "ema_features",
        "model.target.ema_features.layers": "mlp",
        "model.target.ema_features.normalize": "instance",
        "model.target.ema_features.class_weight": 1.0,
        "model.decoder.name": "convolutional",
        "model.decoder.convolutional.noise": 0,
        "model.decoder.convolutional.width": 16,
    },
    **{
        f"CAPI {name}": {
            "model.backbone": "vit_large_patch14_capi",
            "model.backbone_args": {
                "patch_size": 2,
                "embed_dim": 16,
                "depth": 1,
                "num_heads": 2,
                "num_reg_tokens": 4,
            },
            "model.regime.name": name,
            "model.decoder.name": "rotary",
            "model.decoder.rotary.width": 16,
            "model.decoder.rotary.depth": 1,
            "model.decoder.rotary.heads": 2,
            "model.target.name": "clusters",
            "model.target.clusters.clusters": 4,
        }
        for name in REGIMES
    },
}


@pytest.mark.parametrize("name", EQUAL)
def test_one_graph(name: str, tiny: Callable[..., Path]) -> None:
    counter = CompileCounterWithBackend("eager")
    step = compiled(tiny(EQUAL[name]), counter)
    for number in range(4):
        step(number)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("name", [*REGIMES])
def test_unequal_counts_take_one_graph_more(name: str, tiny: Callable[..., Path]) -> None:
    counter = CompileCounterWithBackend("eager")
    step = compiled(tiny({"model.regime.name": name, "mask.ratio": [0.2, 0.8]}), counter)
    for number in range(8):
        step(number)
    assert counter.frame_count <= 2
    assert not torch._dynamo.utils.counters["graph_break"]
