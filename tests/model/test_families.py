"""Backbones with windows and mask units: Swin under ``token``, Hiera under ``drop``.

What rotary ViTs share with plain ones is tested beside them, in ``test_regimes.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from mim.core.config import (
    Config,
    DataConfig,
    DecoderConfig,
    MaskConfig,
    ModelConfig,
    RegimeConfig,
    TargetConfig,
    TransformerDecoderConfig,
    ZeroConfig,
)
from mim.core.errors import UserError
from mim.evaluate.encoders import untrained_encoder
from mim.evaluate.finetune import FinetuneSettings, build_classifier, parameter_groups
from mim.masks import PatchMask
from mim.model import build_model, check_config
from mim.model.backbones import build_backbone, family_of
from mim.model.regimes import Token, build_regime

SWIN: dict[str, Any] = {
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
HIERA: dict[str, Any] = {
    "embed_dim": 8,
    "num_heads": 1,
    "stages": [1, 2, 1],
    "q_pool": 2,
    "mask_unit_size": [4, 4],
    "mask_unit_attn": [True, False, False],
    "patch_stride": [2, 2],
    "patch_kernel": [3, 3],
    "patch_padding": [1, 1],
}
SIMPLE: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN1, SWIN2, HIERA1 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "hiera_tiny_224"
# name -> (backbone, arguments, (height, width), pixels of what a mask hides)
SWINS: dict[str, tuple[str, dict[str, Any], tuple[int, int], int]] = {
    "Swin": (SWIN1, SWIN, (16, 32), 4),
    "Swin v2": (SWIN2, SWIN, (32, 16), 4),
    # Maps of 8 x 8 and 4 x 4 in windows of 3: timm pads.
    "Swin, odd windows": (SWIN1, {**SWIN, "window_size": 3}, (16, 16), 4),
    "Swin v2, three stages": (
        SWIN2,
        {**SWIN, "depths": [1, 2, 1], "num_heads": [1, 1, 2]},
        (16, 32),
        8,
    ),
}
HIERAS: dict[str, tuple[str, dict[str, Any], tuple[int, int], int]] = {
    "Hiera": (HIERA1, HIERA, (16, 32), 8),
    "Hiera, window positions": (
        "hiera_small_abswin_256",
        {**HIERA, "global_pos_size": [4, 4]},
        (32, 24),
        8,
    ),
}
ANY_SWIN = pytest.mark.parametrize("name", SWINS)
ANY_HIERA = pytest.mark.parametrize("name", HIERAS)
ANY = pytest.mark.parametrize("name", [*SWINS, *HIERAS])

TOKEN = RegimeConfig("token")
ATTENDED = {
    at: RegimeConfig("zero", zero=ZeroConfig(at=at, attend_mask=False))
    for at in ("pixels", "embedding")
}


def make(name: str) -> Any:
    """In float64, every parameter with a value of its own."""
    backbone, args, size, _ = {**SWINS, **HIERAS}[name]
    vit = build_backbone(ModelConfig(backbone, args), size, 3)
    generator = torch.Generator().manual_seed(5)
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return vit.double().eval()


def images_of(name: str, count: int = 3) -> Tensor:
    height, width = {**SWINS, **HIERAS}[name][2]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def mask_of(vit: Any, rows: int = 3) -> PatchMask:
    """Hides half of the grid, another half for each image."""
    down, across = family_of(vit).grid
    generator = torch.Generator().manual_seed(1)
    ranks = torch.stack([torch.randperm(down * across, generator=generator) for _ in range(rows)])
    return PatchMask.from_ranks(ranks, down * across // 2)


def pixels_of(mask: PatchMask, vit: Any) -> Tensor:
    """(B, 1, H, W) bool, the pixels a mask hides, by numpy's Kronecker product."""
    family = family_of(vit)
    flags = mask.is_masked.view(-1, *family.grid).numpy()
    block = np.ones(family.patch_size, dtype=bool)
    return torch.from_numpy(np.stack([np.kron(row, block) for row in flags]))[:, None]


def oracle_of(name: str, vit: Any) -> Any:
    """A model that timm built itself and that loads our weights: the state dict stays timm's."""
    backbone, args, size, _ = {**SWINS, **HIERAS}[name]
    oracle = timm.create_model(backbone, img_size=size, num_classes=0, **args)
    oracle.load_state_dict(vit.state_dict(), strict=True)
    return oracle.double().eval()


# --- What a mask hides ----------------------------------------------------------------------------


@ANY
def test_a_mask_hides_squares_of_the_final_stride(name: str) -> None:
    vit, (_, _, (height, width), unit) = make(name), {**SWINS, **HIERAS}[name]
    family = family_of(vit)
    assert family.patch_size == (unit, unit)
    assert family.grid == (height // unit, width // unit)
    features = family.features(images_of(name, 1))
    assert features.shape == (1, family.grid[0] * family.grid[1], family.width)
    first = vit.patch_embed(images_of(name, 1)).flatten(1, -2)  # (B, tokens, D)
    assert family.length(features.shape[1]) == first.shape[1]
    assert family.token_width == first.shape[2]


def test_units_of_the_sizes_people_use() -> None:
    with torch.device("meta"):
        for backbone in (SWIN1, HIERA1):
            family = family_of(build_backbone(ModelConfig(backbone, {}), (224, 224), 3))
            assert family.patch_size == (32, 32) and family.grid == (7, 7)


# --- Without a mask -------------------------------------------------------------------------------


@ANY
def test_without_a_mask_each_regime_is_timms_forward(name: str) -> None:
    vit, images = make(name), images_of(name)
    with torch.no_grad():
        expected = oracle_of(name, vit).forward_features(images)
    if expected.ndim == 4:  # (B, rows, columns, D): row by row
        assert expected.shape[1:3] == family_of(vit).grid
        expected = expected.flatten(1, 2)
    assert expected.std() > 0.05
    empty = PatchMask.empty(len(images), expected.shape[1])
    regimes = [TOKEN, *ATTENDED.values()] + [RegimeConfig("drop")] * (name in HIERAS)
    for config in regimes:
        with torch.no_grad():
            latents = build_regime(config, vit).double()(vit, images, empty)
        torch.testing.assert_close(latents.tokens, expected, rtol=1e-12, atol=1e-12)
        assert latents.num_prefix == 0 and latents.num_patches == expected.shape[1]


# --- Under a mask ---------------------------------------------------------------------------------


@ANY_SWIN
def test_swin_under_token_is_simmim(name: str) -> None:
    """SimMIM's own lines (microsoft/SimMIM, models/simmim.py), around timm's forward."""
    vit, images = make(name), images_of(name)
    mask, oracle = mask_of(vit), oracle_of(name, vit)
    regime = build_regime(TOKEN, vit).double()
    patch = oracle.patch_embed.patch_size[0]
    hidden = pixels_of(mask, vit)[:, 0, ::patch, ::patch]  # (B, rows, columns) of patches
    w = hidden[..., None].double()

    def hide(module: Any, args: Any, output: Tensor) -> Tensor:
        return output * (1.0 - w) + regime.mask_token[:, None] * w  # type: ignore[operator]

    oracle.patch_embed.register_forward_hook(hide)
    with torch.no_grad():
        expected = oracle.forward_features(images).flatten(1, 2)
        got = regime(vit, images, mask).tokens
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@ANY_HIERA
def test_hiera_under_drop_is_timms_masked_forward(name: str) -> None:
    vit, images = make(name), images_of(name)
    mask = mask_of(vit)
    latents = build_regime(RegimeConfig("drop"), vit)(vit, images, mask)
    expected = oracle_of(name, vit).forward_features(images, mask=~mask.is_masked)
    torch.testing.assert_close(latents.tokens, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(latents.patch_ids, mask.visible_ids)  # type: ignore[arg-type]
    assert latents.tokens.shape[1] == mask.num_visible


@ANY
def test_masked_pixels_change_nothing(name: str) -> None:
    vit, images = make(name), images_of(name)
    mask = mask_of(vit)
    regimes = [TOKEN, *ATTENDED.values()] + [RegimeConfig("drop")] * (name in HIERAS)
    for config in regimes:
        regime = build_regime(config, vit).double()
        with torch.no_grad():
            before = regime(vit, images, mask).tokens
            for value in (7.0, float("nan")):
                altered = images.masked_fill(pixels_of(mask, vit), value)
                assert torch.equal(regime(vit, altered, mask).tokens, before)  # bit for bit
            assert not torch.equal(regime(vit, images.flip(0), mask).tokens, before)


@ANY
def test_checkpointing_changes_nothing_and_is_done(name: str) -> None:
    vit, images = make(name).train(), images_of(name)
    mask, config = mask_of(vit), RegimeConfig("drop") if name in HIERAS else TOKEN
    calls = [0]
    family_of(vit).blocks[0].register_forward_pre_hook(
        lambda *_: calls.__setitem__(0, calls[0] + 1)
    )
    found = []
    for checkpointing in (False, True):
        regime = build_regime(config, vit).double()
        regime.checkpointing = checkpointing
        vit.zero_grad()
        tokens = regime(vit, images, mask).tokens
        tokens.square().sum().backward()
        found.append((tokens, [p.grad.clone() for p in vit.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1])
    assert calls[0] == 3  # the block ran again in the backward pass


def test_hiera_refuses_padding() -> None:
    vit = make("Hiera")
    mask = PatchMask(torch.arange(8) < torch.tensor([[3], [4], [4]]))
    with pytest.raises(UserError, match=r"mask: images.*different numbers.*Hiera takes no mask"):
        build_regime(RegimeConfig("drop"), vit)(vit, images_of("Hiera"), mask)


# --- Whole models ---------------------------------------------------------------------------------

DECODER = TransformerDecoderConfig(width=16, depth=1, heads=2)
# name -> (backbone, arguments, side of the image, regime, decoder)
MODELS: dict[str, tuple[str, dict[str, Any], int, str, str]] = {
    "EVA-02, drop": ("eva02_tiny_patch14_224", SIMPLE, 16, "drop", "transformer"),
    "EVA-02, zero": ("eva02_tiny_patch14_224", SIMPLE, 16, "zero", "cross_attention"),
    "DINOv3, drop": ("vit_small_patch16_dinov3", SIMPLE, 16, "drop", "transformer"),
    "DINOv3, token": ("vit_small_patch16_dinov3", SIMPLE, 16, "token", "linear"),
    "RoPE mixed, zero": ("vit_small_patch16_rope_mixed_224", SIMPLE, 16, "zero", "linear"),
    "Swin, token": (SWIN1, SWIN, 16, "token", "linear"),
    "Swin v2, token": (SWIN2, SWIN, 16, "token", "transformer"),
    "Hiera, drop": (HIERA1, HIERA, 32, "drop", "transformer"),
    "Hiera, token": (HIERA1, HIERA, 32, "token", "linear"),
}


def config_of(
    backbone: str, args: dict[str, Any], side: int, regime: str, decoder: str, **others: Any
) -> Config:
    return Config(
        data=DataConfig(image_size=side),
        mask=others.pop("mask", MaskConfig(ratio=0.5)),
        model=ModelConfig(
            backbone=backbone,
            backbone_args=args,
            regime=others.pop("regime_config", RegimeConfig(regime)),
            decoder=others.pop("decoder_config", DecoderConfig(decoder, transformer=DECODER)),
            **others,
        ),
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_a_finite_loss_and_moves_every_parameter(name: str) -> None:
    model = build_model(config_of(*MODELS[name])).train()
    side = MODELS[name][2]
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    mask = model.draw_mask(images, torch.arange(4))
    output = model(images, mask)
    assert output.loss.isfinite()
    assert output.prediction.shape == output.target.shape
    height, width = model.patch_size
    assert output.target.shape[1:] == (mask.num_patches, height * width * 3)
    output.loss.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


REFUSED: dict[str, tuple[Config, list[str]]] = {
    "drop on Swin": (
        config_of(SWIN1, SWIN, 16, "drop", "transformer"),
        ["model.regime.name: 'drop'", "windows of a SwinTransformer", "choose token"],
    ),
    "zero on Swin": (
        config_of(SWIN2, SWIN, 16, "zero", "linear"),
        ["model.regime.zero.attend_mask: True", "SwinTransformerV2", "nothing to read"],
    ),
    "zero on Hiera": (
        config_of(HIERA1, HIERA, 32, "zero", "linear"),
        ["model.regime.zero.attend_mask: True", "attention of a Hiera takes no mask"],
    ),
    "an order on Swin": (
        config_of(
            SWIN1, SWIN, 16, "", "linear", regime_config=RegimeConfig("token", order="causal")
        ),
        ["model.regime.order: 'causal'", "windows"],
    ),
    "an order on Hiera": (
        config_of(
            HIERA1, HIERA, 32, "", "linear", regime_config=RegimeConfig("token", order="causal")
        ),
        ["model.regime.order: 'causal'", "Hiera"],
    ),
    "linear after drop on Hiera": (
        config_of(HIERA1, HIERA, 32, "drop", "linear"),
        ["model.decoder.name: 'linear'", "needs a token at every patch"],
    ),
    "a ratio for each image on Hiera": (
        config_of(HIERA1, HIERA, 32, "drop", "transformer", mask=MaskConfig(ratio=(0.4, 0.6))),
        ["mask.ratio: (0.4, 0.6)", "hiera_tiny_224", "give one ratio"],
    ),
    "an image that is no multiple of the stride": (
        config_of(SWIN1, SWIN, 18, "token", "linear"),
        ["data.image_size: '18 x 18'", "no multiple of 4 x 4 pixels", SWIN1],
    ),
    "an image that is no multiple of the mask unit": (
        config_of(HIERA1, HIERA, 36, "drop", "transformer"),
        ["data.image_size: '36 x 36'", "no multiple of 8 x 8 pixels"],
    ),
    "mask units that end as several tokens": (
        config_of(HIERA1, {**HIERA, "mask_unit_size": [8, 8]}, 32, "drop", "transformer"),
        ["model.backbone: 'hiera_tiny_224'", "mask units of 8 x 8"],
    ),
    "all layers of Swin": (
        config_of(SWIN1, SWIN, 16, "token", "cross_attention"),
        ["model.decoder.cross_attention.layers: 'weighted'", "one width", "choose last"],
    ),
    "targets from all layers of Hiera": (
        config_of(
            HIERA1, HIERA, 32, "token", "linear", target=TargetConfig("ema_features")
        ),
        ["model.target.name: 'ema_features'", "one width"],
    ),
    "attention of Swin": (
        config_of(SWIN1, SWIN, 16, "token", "linear", mask=MaskConfig("attention", ratio=0.5)),
        ["mask.name: 'attention'", "plain timm blocks"],
    ),
    "fixed positions on Swin": (
        config_of(SWIN1, SWIN, 16, "token", "linear", position_embedding="sincos2d"),
        ["model.position_embedding: 'sincos2d'", "needs a ViT", SWIN1],
    ),
    "fixed positions without any on DINOv3": (
        config_of(
            "vit_small_patch16_dinov3", SIMPLE, 16, "drop", "transformer",
            position_embedding="sincos2d",
        ),
        ["model.position_embedding: 'sincos2d'", "dinov3"],
    ),
    "a window of nothing": (
        config_of(SWIN1, {**SWIN, "window_size": 0}, 16, "token", "linear"),
        ["model.backbone_args", "is refused by timm", "positive"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_backbone_cannot_do_is_refused_when_the_config_is_read(case: str) -> None:
    config, parts = REFUSED[case]
    with pytest.raises(UserError) as caught:
        check_config(config)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", [SWIN1, HIERA1])
def test_a_regime_of_ones_own_says_whether_it_takes_merging(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, size = (SWIN, 16) if name == SWIN1 else (HIERA, 32)
    config = config_of(name, args, size, "token", "linear")
    check_config(config)
    monkeypatch.setattr(Token, "takes_merging", False)
    with pytest.raises(UserError, match=r"model\.regime\.name: 'token' works on one token"):
        check_config(config)


# --- Fine-tuning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MODELS if n.endswith(("token", "mixed, zero"))])
def test_a_classifier_begins_with_the_encoder_and_timm_loads_it(name: str, tmp_path: Path) -> None:
    config = config_of(*MODELS[name])
    encoder = untrained_encoder(config)
    settings = FinetuneSettings(pool="mean")
    classifier = build_classifier(encoder, 5, settings)
    assert encoder.vit is not None
    images = torch.randn(2, 3, *config.data.size, generator=torch.Generator().manual_seed(0))
    tokens, _ = (family_of(vit).features(images) for vit in (classifier.model.eval(), encoder.vit))
    family = family_of(classifier.model)
    pooled = family.pool_norm(tokens[:, family.num_prefix :].mean(1))
    expected = classifier.model.get_classifier()(pooled)
    torch.testing.assert_close(classifier.model(images), expected)
    own, given = classifier.model.state_dict(), encoder.vit.state_dict()
    shared = [k for k in given if k in own and "norm" not in k]
    assert len(shared) > 10 and all(torch.equal(own[k], given[k]) for k in shared)
    groups = parameter_groups(classifier.model, settings)
    assert sum(len(g["params"]) for g in groups) == len([*classifier.model.parameters()])
    scales = {g["lr_scale"] for g in groups}
    assert max(scales) == 1.0 and len(scales) > 2  # by layer
    file = classifier.save(tmp_path / "classifier.safetensors")
    built = classifier.built
    loaded = timm.create_model(
        built.backbone, img_size=config.data.size, num_classes=5, checkpoint_path=file,
        **built.backbone_args,
    ).eval()  # fmt: skip
    torch.testing.assert_close(loaded(images), classifier.model(images))


# --- The command line -----------------------------------------------------------------------------

CLI: dict[str, dict[str, Any]] = {
    "Swin": {
        "model.backbone": SWIN1,
        "model.backbone_args": SWIN,
        "model.regime.name": "token",
        "model.decoder.name": "linear",
    },
    "Hiera": {"model.backbone": HIERA1, "model.backbone_args": HIERA},
    "DINOv3": {
        "model.backbone": "vit_small_patch16_dinov3",
        "model.backbone_args": SIMPLE,
        "model.regime.name": "zero",
    },
}


@pytest.mark.parametrize("name", CLI)
def test_a_run_is_trained_evaluated_shown_and_exported(
    name: str, tiny: Callable[..., Path], mim: Callable[..., Any], tmp_path: Path
) -> None:
    changes = {
        "data.image_size": 16,
        "data.batch_size": 32,
        "mask.ratio": 0.5,
        "train.max_steps": 3,
        **CLI[name],
    }
    run = tmp_path / "run"
    config = tiny(changes)
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    result = json.loads((run / "result.json").read_text())
    assert np.isfinite(result["val_loss"])
    assert np.load(run / "reconstructions.npz")["prediction"].shape[1:] == (16, 16, 1)
    assert mim("evaluate", "knn", run).code == 0
    found = json.loads((run / "result.json").read_text())["evaluations"]
    assert found["knn"]["accuracy"] > 0.2  # chance is 0.1
    picture = tmp_path / "picture.png"
    assert mim("visualize", "reconstruct", run, "--output", picture).code == 0
    shown = mim("visualize", "attention", run, "--output", picture)
    if name == "DINOv3":
        assert shown.code == 0
    else:
        assert shown.code == 2 and "do not show their attention" in shown.line
    file = tmp_path / "encoder.safetensors"
    assert mim("export", run, "--to", "timm", "--output", file).code == 0
    args = changes["model.backbone_args"]
    # timm reads the file by itself; a strict load.
    vit = timm.create_model(
        changes["model.backbone"], img_size=16, in_chans=1, num_classes=0, checkpoint_path=file,
        **args,
    )  # fmt: skip
    assert all(p.isfinite().all() for p in vit.parameters())
    for to, suffix in (("hf", ""), ("mae", ".pth")):
        refused = mim("export", run, "--to", to, "--output", tmp_path / f"other{suffix}")
        assert refused.code == 2 and "plain ViTs" in refused.line


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_mixed_224"])
def test_what_was_taken_can_be_taken_from_again(name: str) -> None:
    args = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    family = family_of(build_backbone(ModelConfig(name, args), (16, 16), 3))
    whole = family.place(family.embed(torch.randn(2, 3, 16, 16)))
    first, second = torch.tensor([[3, 1, 7, 9], [0, 2, 5, 8]]), torch.tensor([[2, 0], [1, 3]])
    once = family.take(whole, first.gather(1, second))
    twice = family.take(family.take(whole, first), second)
    assert once.rotation is not None and twice.rotation is not None
    assert torch.equal(once.tokens, twice.tokens) and torch.equal(once.rotation, twice.rotation)


@pytest.mark.parametrize("name", ["plain", "Swin", "Hiera"])
def test_a_run_in_two_parts_is_the_whole_and_keeps_checkpointing(name: str) -> None:
    if name == "plain":
        backbone, args, size = "vit_tiny_patch16_224", {**SIMPLE, "depth": 3}, (16, 16)
    else:
        backbone, args, size, _ = {**SWINS, **HIERAS}[name]
    vit = build_backbone(ModelConfig(backbone=backbone, backbone_args=args), size, 3, 0)
    family = family_of(vit)
    calls = []
    for block in family.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 3, *size)
    whole, once = family.run(family.place(family.embed(images))), len(calls)
    for checkpointing in (False, True):
        embedded = family.place(family.embed(images))
        calls.clear()
        begun = family.run(embedded, stop=1, checkpointing=checkpointing)
        rest = replace(embedded, tokens=begun)
        ended = family.run(rest, start=1, checkpointing=checkpointing)
        torch.testing.assert_close(ended, whole)
        ended.square().sum().backward()
        assert len(calls) == once * (1 + checkpointing), "each block is computed again"
