"""Each generator x regime x decoder x target trains a step, or is refused with the config."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mim import load_config
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.masks import MASKS
from mim.model import build_model, check_config
from mim.model.decoders import DECODERS
from mim.model.regimes import REGIMES
from mim.model.targets import TARGETS

SIZES: dict[str, Any] = {
    "data.image_size": 32,
    "mask.ratio": 0.5,
    "model.decoder.name": "transformer",
    "mask.aligned.unit": 16,
    "mask.target_blocks.min_keep": 2,
    "model.decoder.block_predictor": {"width": 16, "depth": 1, "heads": 2},
    "mask.learned.width": 8,
    "model.backbone_args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    **{
        f"model.decoder.{name}.{size}": value
        for name in ("transformer", "cross_attention", "rotary")
        for size, value in {"width": 16, "depth": 1, "heads": 2}.items()
    },
    "model.decoder.mlp.width": 16,
    "model.decoder.rotary.share": 0.5,
    **{f"model.decoder.convolutional.{size}": 4 for size in ("width", "groups")},
    "model.target.clusters.clusters": 8,
    "model.target.features.backbone": "vit_tiny_patch16_224",
    "model.target.features.backbone_args": {
        "patch_size": 8,
        "embed_dim": 12,
        "depth": 1,
        "num_heads": 2,
    },
}

PARTS = list(itertools.product(DECODERS, TARGETS))  # before another test adds a plug-in


@pytest.mark.parametrize("regime", list(REGIMES))
@pytest.mark.parametrize("generator", list(MASKS))
def test_every_combination_trains_or_is_refused(
    generator: str, regime: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "mask.npy", np.eye(4, dtype=bool))
    save_file({"codebook": torch.randn(5, 192)}, tmp_path / "codes.safetensors")
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(3)
    base = load_config(
        None,
        {
            **SIZES,
            "mask.name": generator,
            "mask.file.path": str(tmp_path / "mask.npy"),
            "model.target.codes.codebook": str(tmp_path / "codes.safetensors"),
            "model.regime.name": regime,
        },
    )
    trained = 0
    for decoder, target in PARTS:
        parts = {
            "decoder": replace(base.model.decoder, name=decoder),
            "target": replace(base.model.target, name=target),
        }
        config = replace(base, model=replace(base.model, **parts))
        try:
            # As build_model, without weights: each generator, and each of the other parts.
            if generator == "random" or (decoder, target) == PARTS[0]:
                check_config(config)
            model = build_model(config).train()
        except UserError as error:
            assert decoder in ("linear", "mlp") and regime == "drop", error
            assert "needs a token at every patch" in str(error)
            continue
        mask = model.draw_mask(images, image_keys(0, 0, ids), epoch=0, sample_ids=ids)
        output = model(images, mask)
        output.loss.backward()
        what = (generator, regime, decoder, target)
        assert output.loss.isfinite(), what
        assert output.reconstruction > 0, what
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                assert grad is not None and grad.isfinite().all(), (*what, name)
                assert grad.abs().max() > 0, (*what, name)
        model.update_teacher()
        dim = output.prediction.shape[-1]
        numbers = target == "codes"  # of entries, each of which has a logit
        assert output.target.shape == (*output.prediction.shape[:2], 1 if numbers else dim)
        trained += 1
    refused = 2 * len(list(TARGETS)) if regime == "drop" else 0  # linear and mlp
    assert trained == len(PARTS) - refused
