"""Steps of the one trainer on an accelerator: every part trains, and nothing waits."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.gpu import trainer_of
from mim import load_config
from mim.core.config import Config
from mim.masks import MASKS
from mim.model.decoders import DECODERS
from mim.model.regimes import REGIMES
from mim.model.targets import TARGETS
from tests.accelerator.conftest import steps
from tests.accelerator.pretend import Pretend

SMALL: dict[str, Any] = {
    "data.batch_size": 6,
    "data.workers": 0,
    "mask.aligned.unit": 4,
    "mask.target_blocks.min_keep": 2,
    "model.decoder.block_predictor": {"width": 16, "depth": 1, "heads": 2},
    "mask.learned.width": 8,
    **{
        f"model.decoder.{name}.{size}": value
        for name in ("transformer", "cross_attention", "rotary")
        for size, value in {"width": 16, "depth": 1, "heads": 2}.items()
    },
    "model.decoder.mlp.width": 16,
    "model.decoder.rotary.share": 0.5,
    **{f"model.decoder.convolutional.{size}": 4 for size in ("width", "groups")},
    "model.target.clusters.clusters": 8,
    "model.target.hog.cell": 2,
    "model.target.features.backbone": "vit_tiny_patch16_224",
    "model.target.features.backbone_args": {
        "patch_size": 2,
        "embed_dim": 12,
        "depth": 1,
        "num_heads": 2,
    },
    "train.max_steps": 4,
}
# Every regime under every target; decoders, generators and ways to train take turns.
WAYS: list[dict[str, Any]] = [
    {},
    {"train.accumulate": 2, "optim.clip_grad": 1.0, "train.ema_decay": 0.9},
    {"train.precision": "bf16", "log.grad_norm": True},
    {"train.precision": "bf16", "train.accumulate": 2, "mask.ratio": [0.3, 0.7]},
    {"train.precision": "bf16", "train.weights": "bf16", "optim.clip_grad": 1.0},
    {"online_probe.enabled": True, "mask.ratio": [0.3, 0.7], "train.gradient_checkpointing": True},
]


def cases() -> list[Any]:
    generators, ways = itertools.cycle(MASKS), itertools.cycle(WAYS)
    found = []
    for regime in REGIMES:
        able = [n for n in DECODERS if regime != "drop" or not DECODERS.get(n).needs_all_tokens]
        for target, decoder in zip(TARGETS, itertools.cycle(able), strict=False):
            generator, way = next(generators), dict(next(ways))
            if generator == "learned":
                way.pop("train.weights", None)
            if TARGETS.get(target).reads_batch:
                way.pop("train.accumulate", None)
            names = [generator, regime, decoder, target]
            keys = ("mask", "model.regime", "model.decoder", "model.target")
            changes = {f"{key}.name": name for key, name in zip(keys, names, strict=True)} | way
            found.append(pytest.param(changes, id="-".join(names)))
    return found


CASES = cases()


@pytest.fixture
def config_of(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Config]:
    def make(changes: Mapping[str, Any]) -> Config:
        np.save(tmp_path / "mask.npy", np.eye(4, dtype=bool))
        save_file({"codebook": torch.randn(5, 4)}, tmp_path / "codes.safetensors")
        files = {
            "mask.file.path": str(tmp_path / "mask.npy"),
            "model.target.codes.codebook": str(tmp_path / "codes.safetensors"),
        }
        path = tiny({**SMALL, **files, **changes})
        return load_config(path, {"output": str(tmp_path / "run")})

    return make


def check(config: Config, noted: Pretend, allowed: Collection[str] = (), **options: Any) -> None:
    """Two steps are taken, and neither waits but at the places that are allowed."""
    trainer = trainer_of(config, **options)
    before = [p.detach().clone() for p in trainer.task.model.parameters() if p.requires_grad]
    model = trainer.task.model
    held = itertools.chain(model.named_parameters(), model.named_buffers())
    assert {name for name, values in held if values.dtype == torch.float64} <= IN_DOUBLE
    noted.waits.clear()
    steps(trainer, 2)
    found = Counter(map(str, (wait for wait in noted.waits if wait.place not in allowed)))
    assert not found, "\n".join(f"{count} x {place}" for place, count in found.items())
    assert set(noted.places) == set(allowed)  # what no longer waits is taken from the list
    assert np.isfinite([float(values[0]) for _, values in trainer.state.unread]).all()
    after = [p for p in trainer.task.model.parameters() if p.requires_grad]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("changes", CASES)
def test_every_part_trains_and_no_step_waits(
    changes: dict[str, Any], config_of: Callable[..., Config], noted: Pretend
) -> None:
    check(config_of(changes), noted)


FAMILIES: dict[str, dict[str, Any]] = {
    "without a prefix": {
        "model.backbone": "vit_base_patch16_siglip_224",
        "model.backbone_args": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "rotary": {
        "model.backbone": "eva02_tiny_patch14_224",
        "model.backbone_args": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "rotary, coordinates drawn": {
        "model.backbone": "vit_base_patch16_dinov3",
        "model.backbone_args": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "naflex": {
        "model.backbone": "naflexvit_base_patch16_gap",
        "model.backbone_args": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
    },
    "swin": {
        "model.backbone": "swin_tiny_patch4_window7_224",
        "model.backbone_args": {
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [1, 2],
            "window_size": 4,
        },
        "data.image_size": 16,
        "model.regime.name": "token",
    },
    "hiera": {
        "model.backbone": "hiera_tiny_224",
        "model.backbone_args": {
            "embed_dim": 8,
            "num_heads": 1,
            "stages": [1, 2, 1],
            "q_pool": 2,
            "mask_unit_size": [4, 4],
            "mask_unit_attn": [True, False, False],
            "patch_stride": [2, 2],
            "patch_kernel": [3, 3],
            "patch_padding": [1, 1],
        },
        "data.image_size": 32,
    },
}
# Small tables of cosines, brought to the images' type where they are used.
IN_DOUBLE = {f"target._{n}" for n in ("gain", "vertical", "horizontal", "analysis", "synthesis")}
# timm asks for the size of each image's grid, and draws DINOv3's coordinates on the CPU.
TIMM_WAITS = {
    "naflex": ["mim/model/backbones/naflex.py NaFlexViT.place_patches"],
    "rotary, coordinates drawn": ["mim/model/backbones/rotary.py RotaryViT.place"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "zero pixels": {"model.regime.name": "zero", "model.regime.zero.at": "pixels"},
    "zero dense": {"model.regime.name": "zero", "model.regime.zero.attention": "dense"},
    "zero share": {
        "model.regime.name": "zero",
        "model.regime.zero.predict_share": 0.5,
        "model.decoder.name": "linear",
    },
    "zero unequal": {"model.regime.name": "zero", "mask.ratio": [0.3, 0.7]},
    "causal": {"model.regime.order": "causal", "mask.ratio": [0.3, 0.7]},
    "block as BEiT": {"mask.name": "block", "mask.block.exact": False, "train.accumulate": 2},
    "attention, drawn ratio": {"mask.name": "attention", "mask.ratio": [0.3, 0.7]},
    "learned, drawn ratio": {"mask.name": "learned", "mask.ratio": [0.3, 0.7]},
    "CAPI": {
        "model.backbone": "vit_large_patch14_capi",
        "model.backbone_args": {
            "patch_size": 2,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "num_reg_tokens": 4,
            "drop_path_rate": 0.2,
        },
        "mask.name": "inverse_block",
        "model.decoder.name": "rotary",
        "model.decoder.rotary.drop_path": 0.2,
        "model.target.name": "clusters",
        "optim.clip_grad": 1.0,
    },
    "CrossMAE": {
        "model.decoder.name": "cross_attention",
        "model.decoder.cross_attention.layers": "maps",
        "model.decoder.cross_attention.share_of": "all",
    },
    "data2vec 2": {
        "model.decoder.name": "convolutional",
        "model.target.name": "ema_features",
        "model.target.ema_features.layers": "mlp",
        "model.target.ema_features.normalize": "instance",
        "model.target.ema_features.class_weight": 2.56,
    },
    "loss on all": {"model.target.loss_on": "all", "model.regime.name": "token"},
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_backbones(
    family: str, precision: str, config_of: Callable[..., Config], noted: Pretend
) -> None:
    config = config_of({**FAMILIES[family], "train.precision": precision})
    check(config, noted, TIMM_WAITS.get(family, ()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, config_of: Callable[..., Config], noted: Pretend) -> None:
    check(config_of(VARIANTS[variant]), noted)


def test_gradients_scaled_for_fp16(config_of: Callable[..., Config], noted: Pretend) -> None:
    check(config_of({"optim.clip_grad": 1.0}), noted, fp16=True)


STEADY: dict[str, dict[str, Any]] = {
    **{name: {"model.regime.name": name} for name in REGIMES},
    "teacher": {"model.target.name": "ema_features", "train.ema_decay": 0.9},
    "parts": {"train.accumulate": 2, "optim.clip_grad": 1.0, "train.precision": "bf16"},
}


@pytest.mark.parametrize("variant", STEADY)
def test_a_steady_step_repeats_itself(
    variant: str, config_of: Callable[..., Config], noted: Pretend
) -> None:
    """The same operations, shapes and memory each time: what CUDA graphs ask for."""
    trainer = trainer_of(config_of({**STEADY[variant], "train.max_steps": 6}))
    calls, allocated = [], []
    for batch in trainer.task.batches(0):
        noted.calls.clear()
        trainer.train_step(batch)
        trainer.state.unread.clear()  # kept for the next line of the curves
        gc.collect()
        calls.append(list(noted.calls))
        allocated.append(noted.allocated)
    assert len(calls) == 6 and len(calls[2]) > 100
    assert calls[2] == calls[3] == calls[4] == calls[5]
    assert len(set(allocated[2:])) == 1, allocated


def test_weighted_images(config_of: Callable[..., Config], tmp_path: Path, noted: Pretend) -> None:
    weights = np.random.default_rng(0).uniform(0, 1, 1797)
    weights[::3] = 0
    np.save(tmp_path / "weights.npy", weights)
    changes = {"data.weights": str(tmp_path / "weights.npy"), "train.accumulate": 2}
    check(config_of(changes), noted)


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_images_of_several_sizes(
    batching: str, config_of: Callable[..., Config], own_sizes: dict[str, Any], noted: Pretend
) -> None:
    config = config_of({**own_sizes, "data.batching": batching, "data.batch_size": 8})
    packs = [] if batching == "padded" else ["mim/model/packing.py Packing.of"]
    check(config, noted, [*TIMM_WAITS["naflex"], *packs])
