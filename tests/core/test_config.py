"""Every mistake in a setting ends in one line that names the setting, the value and the choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from mim.core.config import (
    BlockMaskConfig,
    Config,
    DataConfig,
    DecoderConfig,
    LogConfig,
    MaskConfig,
    MixConfig,
    ModelConfig,
    OptimConfig,
    RegimeConfig,
    TargetConfig,
    TrainConfig,
    TransformerDecoderConfig,
    ZeroConfig,
)
from mim.core.errors import UserError
from mim.core.fields import build, hints
from mim.core.settings import explanations, leaves
from mim.model import check_config

NAN = float("nan")


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    return message


# (class, arguments, what the message begins with, what else it must say)
BAD: list[tuple[type[Any], dict[str, Any], str, list[str]]] = [
    (DataConfig, {"image_size": 0}, "data.image_size: 0", ["at least 1"]),
    (DataConfig, {"image_size": (32, -4)}, "data.image_size: -4", ["at least 1"]),
    (DataConfig, {"channels": 0}, "data.channels: 0", ["at least 1"]),
    (DataConfig, {"batch_size": 0}, "data.batch_size: 0", ["at least 1"]),
    (DataConfig, {"workers": -1}, "data.workers: -1", ["at least 0"]),
    (DataConfig, {"augment": "mea"}, "data.augment: 'mea'", ["mae, none", "did you mean 'mae'"]),
    (DataConfig, {"crop_scale": (0.0, 1.0)}, "data.crop_scale: (0.0, 1.0)", ["0 < from <= to"]),
    (DataConfig, {"crop_scale": (0.5, 0.2)}, "data.crop_scale: (0.5, 0.2)", ["<= 1"]),
    (DataConfig, {"crop_scale": (0.5, 1.1)}, "data.crop_scale: (0.5, 1.1)", ["<= 1"]),
    (DataConfig, {"crop_ratio": (0.0, 1.0)}, "data.crop_ratio: (0.0, 1.0)", ["0 < from <= to"]),
    (DataConfig, {"crop_ratio": (2.0, 1.0)}, "data.crop_ratio: (2.0, 1.0)", ["0 < from <= to"]),
    (DataConfig, {"val_fraction": 0.0}, "data.val_fraction: 0.0", ["between 0 and 1"]),
    (DataConfig, {"val_fraction": 1.0}, "data.val_fraction: 1.0", ["between 0 and 1"]),
    (DataConfig, {"mean": (0.5,)}, "data.mean: (0.5,)", ["3 values", "data.channels"]),
    (DataConfig, {"channels": 1, "std": (0.5, 0.5)}, "data.std: (0.5, 0.5)", ["1 values"]),
    (DataConfig, {"std": (0.5, 0.0, 0.5)}, "data.std: (0.5, 0.0, 0.5)", ["above 0"]),
    (MaskConfig, {"ratio": 0.0}, "mask.ratio: 0.0", ["between 0 and 1", "(from, to)"]),
    (MaskConfig, {"ratio": 1.0}, "mask.ratio: 1.0", ["between 0 and 1"]),
    (MaskConfig, {"ratio": 1.5}, "mask.ratio: 1.5", ["between 0 and 1"]),
    (MaskConfig, {"ratio": -0.5}, "mask.ratio: -0.5", ["between 0 and 1"]),
    (MaskConfig, {"ratio": NAN}, "mask.ratio: nan", ["between 0 and 1"]),
    (MaskConfig, {"ratio": (0.8, 0.2)}, "mask.ratio: (0.8, 0.2)", ["from <= to"]),
    (MaskConfig, {"ratio": (0.5, 1.0)}, "mask.ratio: (0.5, 1.0)", ["< 1"]),
    (
        ZeroConfig,
        {"at": "pixel"},
        "model.regime.zero.at: 'pixel'",
        ["embedding, pixels", "did you"],
    ),
    (
        ZeroConfig,
        {"attention": "sparse"},
        "model.regime.zero.attention: 'sparse'",
        ["dense, split"],
    ),
    *(
        (
            TransformerDecoderConfig,
            {name: 0},
            f"model.decoder.transformer.{name}: 0",
            ["at least 1"],
        )
        for name in ("width", "depth", "heads")
    ),
    (
        TransformerDecoderConfig,
        {"width": 64, "heads": 6},
        "model.decoder.transformer.width: 64",
        ["not divisible by model.decoder.transformer.heads=6"],
    ),
    (
        TransformerDecoderConfig,
        {"width": 66, "heads": 6},
        "model.decoder.transformer.width: 66",
        ["divisible by 4"],
    ),
    (TargetConfig, {"loss": "huber"}, "model.target.loss: 'huber'", ["l1, mse"]),
    (TargetConfig, {"loss_on": "visible"}, "model.target.loss_on: 'visible'", ["all, masked"]),
    (
        ModelConfig,
        {"position_embedding": "sincos"},
        "model.position_embedding: 'sincos'",
        ["learned, sincos2d", "did you mean 'sincos2d'"],
    ),
    (OptimConfig, {"base_lr": 0.0}, "optim.base_lr: 0.0", ["above 0"]),
    (OptimConfig, {"base_lr": NAN}, "optim.base_lr: nan", ["above 0"]),
    (OptimConfig, {"min_lr": -1e-6}, "optim.min_lr: -1e-06", ["at least 0"]),
    (OptimConfig, {"warmup_epochs": -1.0}, "optim.warmup_epochs: -1.0", ["at least 0"]),
    (OptimConfig, {"weight_decay": -0.1}, "optim.weight_decay: -0.1", ["at least 0"]),
    (OptimConfig, {"betas": (0.9, 1.0)}, "optim.betas: (0.9, 1.0)", ["[0, 1)"]),
    (OptimConfig, {"betas": (-0.1, 0.9)}, "optim.betas: (-0.1, 0.9)", ["[0, 1)"]),
    (OptimConfig, {"clip_grad": 0.0}, "optim.clip_grad: 0.0", ["above 0"]),
    (TrainConfig, {"epochs": 0}, "train.epochs: 0", ["at least 1"]),
    (TrainConfig, {"max_steps": 0}, "train.max_steps: 0", ["at least 1"]),
    (TrainConfig, {"precision": "fp4"}, "train.precision: 'fp4'", ["bf16, fp16, fp32"]),
    *(
        (TrainConfig, {name: 0}, f"train.{name}: 0", ["at least 1"])
        for name in ("accumulate", "log_every", "keep_checkpoints")
    ),
    *(
        (TrainConfig, {name: -0.5}, f"train.{name}: -0.5", ["at least 0"])
        for name in ("validate_every", "picture_every")
    ),
    (TrainConfig, {"checkpoint_every": 0.0}, "train.checkpoint_every: 0.0", ["above 0"]),
    (TrainConfig, {"ema_decay": 1.0}, "train.ema_decay: 1.0", ["between 0 and 1"]),
    (TrainConfig, {"ema_decay": 0.0}, "train.ema_decay: 0.0", ["between 0 and 1"]),
    (LogConfig, {"wandb": "on"}, "log.wandb: 'on'", ["disabled, offline, online"]),
    (Config, {"seed": -1}, "seed: -1", ["at least 0"]),
    (Config, {"resume": "always"}, "resume: 'always'", ["auto, never"]),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "start", "parts"), BAD, ids=[f"{b[2]} {b[1]}" for b in BAD]
)
def test_a_bad_value_is_refused(
    kind: type[Any], arguments: dict[str, Any], start: str, parts: list[str]
) -> None:
    message = message_of(lambda: kind(**arguments))
    assert message.startswith(start + " ")
    for part in parts:
        assert part in message


GOOD: list[tuple[type[Any], dict[str, Any]]] = [
    (DataConfig, {"image_size": (1, 64), "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}),
    (DataConfig, {"channels": 5, "mean": (0.5,) * 5, "std": (0.1,) * 5}),
    (MaskConfig, {"ratio": (0.5, 0.5)}),
    (MaskConfig, {"ratio": 0.999}),
    (OptimConfig, {"min_lr": 0.0, "warmup_epochs": 0, "weight_decay": 0, "betas": (0.0, 0.99)}),
    (OptimConfig, {"clip_grad": None}),
    (TrainConfig, {"epochs": 1, "max_steps": None, "validate_every": 0, "picture_every": 0}),
    (TrainConfig, {"max_steps": 1, "checkpoint_every": 0.01, "ema_decay": 0.999}),
    (Config, {"seed": 0, "resume": "auto"}),
]


@pytest.mark.parametrize(("kind", "arguments"), GOOD, ids=[f"{k.__name__} {a}" for k, a in GOOD])
def test_a_value_at_the_edge_is_accepted(kind: type[Any], arguments: dict[str, Any]) -> None:
    kind(**arguments)


def test_text_for_a_block_names_its_settings() -> None:
    with pytest.raises(UserError) as caught:
        build(Config, {"model": {"decoder": {"transformer": "{width: 32}"}}})
    assert str(caught.value).startswith("model.decoder.transformer: '{width: 32}' cannot be given")
    assert "as --model.decoder.transformer.NAME VALUE, where NAME is width, " in str(caught.value)


def test_ratio_range() -> None:
    assert MaskConfig(ratio=0.6).ratio_range == (0.6, 0.6)
    assert MaskConfig(ratio=(0.2, 0.8)).ratio_range == (0.2, 0.8)


def test_size() -> None:
    assert DataConfig(image_size=32).size == (32, 32)
    assert DataConfig(image_size=(32, 64)).size == (32, 64)


CLASSES = sorted({owner for owner, _ in leaves(Config).values()}, key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", [*CLASSES, MixConfig])
def test_settings_are_frozen_and_every_one_is_explained(kind: type[Any]) -> None:
    instance = kind(source="embedded") if kind is MixConfig else kind()
    explained = explanations(kind)
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field.name, None)
        # The help of the CLI is the string below the field; of a component's block, its docstring.
        assert explained.get(field.name) or hints(kind)[field.name].__doc__, field.name


def test_the_settings_of_components_stand_beside_them() -> None:
    assert {kind.__module__ for kind in CLASSES} > {"mim.masks.patterns", "mim.model.regimes"}
    assert Config().mask.block == BlockMaskConfig() and BlockMaskConfig.where == "mask.block"
    assert (
        dataclasses.replace(MaskConfig(), block=BlockMaskConfig(exact=False)).block.exact is False
    )


def test_the_default_config_fits_together() -> None:
    check_config(Config())


# --- What needs the other modules ----------------------------------------------------------------

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}


def make(
    backbone: str = "vit_tiny_patch16_224",
    args: dict[str, Any] | None = None,
    image_size: int | tuple[int, int] = 16,
    mask: MaskConfig | None = None,
    **model: Any,
) -> Config:
    return Config(
        data=DataConfig(image_size=image_size),
        mask=mask or MaskConfig(),
        model=ModelConfig(backbone=backbone, backbone_args={**SMALL, **(args or {})}, **model),
    )


def linear(regime: str) -> Config:
    return make(regime=RegimeConfig(regime), decoder=DecoderConfig("linear"))


UNFIT: dict[str, tuple[Config, list[str]]] = {
    "unknown backbone": (
        make("vit_tiny_patch16_225"),
        [
            "model.backbone: 'vit_tiny_patch16_225' is not one of",
            "vit_small_patch16_224, ",
            "did you mean 'vit_tiny_patch16_224'",
        ],
    ),
    "no transformer": (
        Config(model=ModelConfig(backbone="resnet18", backbone_args={})),
        ["model.backbone: 'resnet18'", "no patches to hide; the regimes need one of timm's"],
    ),
    "another transformer": (
        Config(model=ModelConfig(backbone="cait_xxs24_224")),
        ["model.backbone: 'cait_xxs24_224'", "is a Cait", "VisionTransformer, NaFlexVit"],
    ),
    "patches by a convolutional stem": (
        Config(model=ModelConfig(backbone="vit_tiny_r_s16_p8_224")),
        ["model.backbone: 'vit_tiny_r_s16_p8_224'", "Hybrid", "may mix patches"],
    ),
    "patch does not divide the height": (
        make(args={"patch_size": (3, 4)}),
        ["model.backbone_args.patch_size: (3, 4)", "data.image_size 16 x 16"],
    ),
    "patch does not divide the width": (
        make(image_size=(16, 18)),
        ["model.backbone_args.patch_size: (4, 4)", "data.image_size 16 x 18"],
    ),
    "patch of the name does not divide the image": (
        Config(data=DataConfig(image_size=100)),
        ["model.backbone_args.patch_size: (16, 16)", "data.image_size 100 x 100"],
    ),
    "patch larger than the image": (
        make(args={"patch_size": 32}),
        ["model.backbone_args.patch_size: (32, 32)", "16 x 16"],
    ),
    **{
        f"patch of {patch!r}": (
            make(args={"patch_size": patch}),
            ["model.backbone_args.patch_size: (", "must be 1 or 2 whole numbers above 0"],
        )
        for patch in (0, -4, 4.0, "4", (4, 4, 4), [4, 0])
    },
    **{
        f"{name} of 0": (
            make(args={name: 0}),
            ["model.backbone_args", f"'{name}': 0", "refused by timm"],
        )
        for name in ("num_heads", "embed_dim")
    },
    "argument unknown to timm": (
        make(args={"wings": 2}),
        ["model.backbone_args", "'wings'", "refused by timm"],
    ),
    "heads do not divide the width": (
        make(args={"num_heads": 5}),
        ["model.backbone_args", "'num_heads': 5", "refused by timm"],
    ),
    "sincos2d and a width it cannot have": (
        make(args={"embed_dim": 18}, position_embedding="sincos2d"),
        ["model.position_embedding: 'sincos2d'", "divisible by 4", "18"],
    ),
    "sincos2d without a position embedding": (
        make(args={"pos_embed": "none"}, position_embedding="sincos2d"),
        ["model.position_embedding: 'sincos2d'", "position embedding"],
    ),
    "unknown regime": (
        make(regime=RegimeConfig("zeros")),
        ["model.regime.name: 'zeros'", "drop, token, zero", "did you mean 'zero'"],
    ),
    "split on other blocks": (
        make("vit_small_patch16_18x2_224", regime=RegimeConfig("zero")),
        ["model.regime.zero.attention: 'split'", "ParallelThingsBlock", "choose dense"],
    ),
    "unknown decoder": (
        make(decoder=DecoderConfig("transfomer")),
        [
            "model.decoder.name: 'transfomer'",
            "cross_attention, linear, mlp, rotary, transformer",
            "did you mean 'transformer'",
        ],
    ),
    "linear with drop": (
        linear("drop"),
        [
            "model.decoder.name: 'linear'",
            "model.regime.name='drop'",
            "choose block_predictor, convolutional, cross_attention, rotary, transformer",
        ],
    ),
    "unknown target": (
        make(target=TargetConfig("hogs")),
        ["model.target.name: 'hogs'", "normalized_pixels, pixels", "did you mean 'hog'"],
    ),
    "unknown mask": (
        make(mask=MaskConfig("blok")),
        ["mask.name: 'blok'", "random"],
    ),
    "ratio that hides nothing": (
        make(mask=MaskConfig(ratio=0.02)),
        ["mask.ratio: 0.02", "hides no patch", "4 x 4"],
    ),
    "ratio that hides everything": (
        make(mask=MaskConfig(ratio=0.98)),
        ["mask.ratio: 0.98", "hides every patch", "4 x 4"],
    ),
    **{
        f"reserved {name}": (
            make(args={name: 1}),
            ["model.backbone_args", f"must not set {name}", place],
        )
        for name, place in {
            "img_size": "data.image_size",
            "in_chans": "data.channels",
            "num_classes": "evaluation",
            "pretrained": "mim evaluate",
            "checkpoint_path": "mim evaluate",
            "patch_drop_rate": "mask.ratio",
            "dynamic_img_size": "data.image_size",
        }.items()
    },
}


@pytest.mark.parametrize("what", UNFIT)
def test_parts_that_do_not_fit_are_refused(what: str) -> None:
    config, parts = UNFIT[what]
    message = message_of(lambda: check_config(config))
    for part in parts:
        assert part in message


@pytest.mark.parametrize("regime", ["zero", "token"])
def test_linear_fits_regimes_that_keep_every_token(regime: str) -> None:
    check_config(linear(regime))


def test_a_list_of_backbones_stays_readable() -> None:
    assert len(message_of(lambda: check_config(make("vit_tiny_patch16_225")))) < 2000
    assert len(message_of(lambda: check_config(make("nonsense")))) < 2000
