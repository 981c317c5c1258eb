"""Pooling against timm's own, and features of sources against a forward pass by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from mim.core.config import DataConfig
from mim.core.errors import UserError
from mim.data import eval_transform, normalize, open_source
from mim.evaluate import Encoder, extract_features, pixels_encoder, pool_tokens

DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=32)
SMALL = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}


def make_vit(**args: Any) -> VisionTransformer:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**SMALL, **args})
    assert isinstance(vit, VisionTransformer)
    for name, parameter in vit.named_parameters():
        if "norm" in name:  # at their initial 1 and 0, norms would hide a missing one
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return vit.eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "fc_norm": {"global_pool": "avg"},
    "fc_norm and registers": {"global_pool": "avg", "reg_tokens": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_pooling_is_timms(variant: str) -> None:
    vit = make_vit(**VARIANTS[variant])
    with torch.no_grad():
        tokens = vit.forward_features(torch.randn(3, 1, 8, 8))
        vit.global_pool = "avg"
        mean = vit.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(pool_tokens(vit, tokens, "mean"), mean)
        if not vit.has_class_token:
            return
        vit.global_pool = "token"
        cls = vit.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(pool_tokens(vit, tokens, "cls"), cls)
        both = pool_tokens(vit, tokens, "both")
        torch.testing.assert_close(both, torch.cat([mean, cls], 1))


def test_prefix_tokens_are_never_in_the_mean() -> None:
    vit = make_vit(reg_tokens=3)
    tokens = torch.randn(2, 4 + 4, 24)
    changed = tokens.clone()
    changed[:, :4] += 10
    assert torch.equal(pool_tokens(vit, tokens, "mean"), pool_tokens(vit, changed, "mean"))
    changed = tokens.clone()
    changed[:, 1:] += 10
    assert torch.equal(pool_tokens(vit, tokens, "cls"), pool_tokens(vit, changed, "cls"))


@pytest.mark.parametrize("pool", ["cls", "both"])
def test_class_token_missing(pool: str) -> None:
    vit = make_vit(class_token=False, global_pool="avg")
    with pytest.raises(UserError, match=f"pool: '{pool}' needs a class token"):
        extract_features(Encoder("x", "timm", DATA, vit), open_source(DATA, "val"), pool)


def test_unknown_pool_and_precision() -> None:
    encoder, val = Encoder("x", "timm", DATA, make_vit()), open_source(DATA, "val")
    with pytest.raises(UserError, match="pool: 'max' is not one of both, cls, mean"):
        extract_features(encoder, val, "max")
    with pytest.raises(UserError, match="precision: 'half' is not one of bf16, fp16, fp32"):
        extract_features(encoder, val, precision="half")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("x", "timm", DATA, make_vit(drop_path_rate=0.5))


def test_features_are_those_of_full_images_in_order(encoder: Encoder) -> None:
    val = open_source(DATA, "val")
    features = extract_features(encoder, val, "both")
    assert encoder.vit is not None
    assert features.labels is not None and val.labels is not None
    assert torch.equal(features.labels, val.labels)
    assert torch.equal(features.sample_ids, val.sample_ids)
    assert features.values.shape == (len(val), 48)
    assert features.values.dtype == torch.float32
    images = eval_transform([val.image(i) for i in (0, 5, len(val) - 1)], DATA)
    with torch.no_grad():
        tokens = encoder.vit.forward_features(normalize(images, val.mean, val.std))
    expected = torch.cat([tokens[:, 1:].mean(1), tokens[:, 0]], 1)
    torch.testing.assert_close(features.values[[0, 5, -1]], expected, rtol=1e-5, atol=1e-5)
    assert not features.values.requires_grad


def test_batch_size_and_precision(encoder: Encoder) -> None:
    val = open_source(DATA, "val")
    features = extract_features(encoder, val)
    again = extract_features(encoder, val, batch_size=7)
    torch.testing.assert_close(features.values, again.values, rtol=1e-5, atol=1e-5)
    low = extract_features(encoder, val, precision="bf16")
    assert low.values.dtype == torch.float32
    assert not torch.equal(features.values, low.values)
    torch.testing.assert_close(features.values, low.values, rtol=0.05, atol=0.1)


def test_an_encoder_is_frozen() -> None:
    vit = make_vit().train()
    encoder = Encoder("x", "timm", DATA, vit)
    assert not vit.training
    assert not any(p.requires_grad for p in vit.parameters())
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    extract_features(encoder, open_source(DATA, "val"))
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())


def test_pixels_are_the_normalised_image() -> None:
    val = open_source(DATA, "val")
    features = extract_features(pixels_encoder(DATA), val, "cls")
    images = eval_transform([val.image(3)], DATA)
    expected = (images.float() / 255 - val.mean[0]) / val.std[0]
    torch.testing.assert_close(features.values[3], expected.flatten())
