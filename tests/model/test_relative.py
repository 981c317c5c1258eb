"""Relative position bias: the numbers of timm, and a bias that stays with its patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mim
from mim.core.errors import UserError
from mim.masks import PatchMask
from mim.model import MaskedImageModel

SIZES = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
# name -> backbone and its arguments
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"init_values": 0.1}),
    "SimMIM's": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": None},
    ),
    "both": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}),
    "relpos": ("vit_relpos_small_patch16_224", {"init_values": 0.1}),
    "shared": ("vit_srelpos_small_patch16_224", {}),
    "class token": ("vit_relpos_base_patch16_clsgap_224", {}),
}
EACH = pytest.mark.parametrize("name", BACKBONES)
IMAGES = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)).double()


def built(name: str, regime: str = "drop", **changes: Any) -> MaskedImageModel:
    backbone, args = BACKBONES[name]
    config = mim.load_config(
        None,
        {
            "data.source": "photos",
            "data.image_size": [16, 24],
            "model.backbone": backbone,
            "model.backbone_args": {**SIZES, **args},
            "model.regime.name": regime,
            "model.regime.zero.attention": "dense",
            "model.decoder.transformer": {"width": 16, "depth": 1, "heads": 2},
            **changes,
        },
    )
    model = mim.build_model(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    for part, values in model.backbone.named_parameters():
        if "rel" in part:  # tables begin at 0
            nn.init.normal_(values, std=0.5, generator=generator)
    return model


def mask(ratios: tuple[int, ...]) -> PatchMask:
    ranks = torch.rand(3, 24, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return PatchMask.from_ranks(ranks, torch.tensor(ratios))


@EACH
def test_full_images_are_timm_s(name: str) -> None:
    model = built(name)
    vit: Any = model.backbone
    expected: Tensor = vit.forward_features(IMAGES)
    torch.testing.assert_close(model.encode(IMAGES), expected)
    biases = [p for part, p in vit.named_parameters() if "rel" in part]
    for values in biases:
        nn.init.zeros_(values)
    assert biases and not torch.allclose(vit.forward_features(IMAGES), expected)


@EACH
@pytest.mark.parametrize("hidden", [(10, 10, 10), (6, 10, 17)], ids=["equal", "padded"])
def test_dropped_patches_are_as_if_nobody_read_them(name: str, hidden: tuple[int, ...]) -> None:
    drop, zero = built(name, "drop"), built(name, "zero")
    zero.backbone.load_state_dict(drop.backbone.state_dict())
    chosen = mask(hidden)
    short, full = drop.latents(IMAGES, chosen), zero.latents(IMAGES, chosen)
    torch.testing.assert_close(short.prefix, full.prefix)
    for image in range(3):
        ids = chosen.visible_ids[image, : 24 - hidden[image]]
        torch.testing.assert_close(short.patches[image, : len(ids)], full.patches[image, ids])


@EACH
@pytest.mark.parametrize("regime", ["drop", "zero", "token"])
def test_every_regime_trains(name: str, regime: str) -> None:
    model = built(name, regime).train()
    model(IMAGES, mask((10, 10, 10))).loss.backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(UserError, match=r"zero\.attention: 'split' needs plain timm blocks"):
        built("beit", "zero", **{"model.regime.zero.attention": "split"})
    with pytest.raises(UserError, match="has blocks of the kind ResPostRelPosBlock"):
        built("relpos", **{"model.backbone": "vit_relpos_base_patch32_plus_rpn_256"})
    with pytest.raises(UserError, match="needs plain timm blocks"):
        built("beit", **{"mask.name": "attention"})
