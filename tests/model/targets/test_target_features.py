"""Features as targets: whose they are, where their weights come from, and that they stay frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mim import load_config
from mim.core.config import (
    Config,
    DataConfig,
    DecoderConfig,
    EmaFeaturesConfig,
    FeaturesConfig,
    ModelConfig,
    RegimeConfig,
    TargetConfig,
)
from mim.core.errors import UserError
from mim.masks import PatchMask
from mim.model import build_model, check_config
from mim.model.backbones import build_backbone
from mim.model.targets import EmaFeatures, FrozenFeatures, Target, Teacher
from mim.training.optim import build_optimizer

Make = Callable[..., Target]
NAME = "vit_tiny_patch16_224"
ARGS: dict[str, Any] = {"patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def trained(size: int = 8, seed: int = 7, **args: Any) -> VisionTransformer:
    """A model as timm makes it, whose weights nobody else has."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(NAME, img_size=size, num_classes=0, **{**ARGS, **args}).eval()


def features(**settings: Any) -> FeaturesConfig:
    return FeaturesConfig(**{"backbone": NAME, "backbone_args": ARGS, **settings})


def frozen(make: Make, **settings: Any) -> FrozenFeatures:
    target = make("features", (4, 4), 3, features=features(**settings))
    assert isinstance(target, FrozenFeatures)
    return target


def normalized(tokens: Tensor) -> Tensor:
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# --- A frozen model ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
def test_it_is_the_normalised_output_of_a_block_of_the_checkpoint(
    layer: int, make: Make, tmp_path: Path
) -> None:
    vit = trained()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    target = frozen(make, checkpoint=str(tmp_path / "model.safetensors"), layer=layer)
    seen: list[Tensor] = []
    vit.blocks[layer].register_forward_hook(lambda _, __, output: seen.append(output))
    vit(IMAGES)
    got = target(IMAGES)
    torch.testing.assert_close(got, normalized(seen[0][:, 1:]), **CLOSE)  # less the class token
    assert target.dim == 12 and got.shape == (2, 4, 12)


def test_the_last_block_is_what_the_model_returns_but_for_the_weights_of_its_norm(
    make: Make, tmp_path: Path
) -> None:
    vit = trained()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    got = frozen(make, checkpoint=str(tmp_path / "model.safetensors"))(IMAGES)
    returned = vit.forward_features(IMAGES)[:, 1:]  # a new norm's weights are 1 and 0
    torch.testing.assert_close(got, returned, rtol=1e-2, atol=1e-2)  # their epsilons differ


@pytest.mark.parametrize("kind", ["model.safetensors", "model.pth", "run"])
def test_where_weights_come_from(kind: str, make: Make, tmp_path: Path) -> None:
    state, path = trained().state_dict(), tmp_path / kind
    if kind == "run":
        path.mkdir()
        save_file(state, path / "encoder.safetensors", metadata={"format": "pt"})
    elif kind == "model.pth":
        torch.save({"model": {**state, "head.weight": torch.zeros(5, 12)}}, path)
    else:
        save_file(state, path)
    target = frozen(make, checkpoint=str(path))
    assert torch.equal(target._teacher[0].pos_embed, state["pos_embed"])
    random = frozen(make)
    assert not torch.allclose(target(IMAGES), random(IMAGES), atol=0.1)


def test_position_embeddings_of_another_image_size_are_resampled(
    make: Make, tmp_path: Path
) -> None:
    save_file(trained(16).state_dict(), tmp_path / "large.safetensors")
    target = frozen(make, checkpoint=str(tmp_path / "large.safetensors"))
    assert target._teacher[0].pos_embed.shape == (1, 5, 12)


def test_a_random_model_is_the_same_always_and_no_students(make: Make) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = frozen(make)(IMAGES)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(frozen(make)(IMAGES), one)
    config = Config(data=DataConfig(image_size=8), model=ModelConfig(NAME, ARGS))
    student = build_model(config).backbone.patch_embed.proj.weight
    teacher = frozen(make)._teacher[0].patch_embed.proj.weight
    assert not torch.allclose(student, teacher)


def test_dropout_never_wakes(make: Make) -> None:
    args = {**ARGS, "drop_path_rate": 0.9, "proj_drop_rate": 0.9}
    target = frozen(make, backbone_args=args).train()
    torch.nn.Sequential(target).train()
    assert torch.equal(target(IMAGES), target(IMAGES))


def test_it_follows_the_model_to_another_type(make: Make) -> None:
    target = frozen(make)
    single = target(IMAGES)
    double = torch.nn.Sequential(copy.deepcopy(target)).double()(IMAGES.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, **CLOSE)
    assert target(IMAGES).dtype == torch.float32  # a copy has a teacher of its own
    assert target.to("meta")._teacher[0].pos_embed.is_meta


def test_neither_the_optimizer_nor_a_checkpoint_sees_it() -> None:
    wide = {**ARGS, "embed_dim": 28}  # a width that nothing else has
    target = TargetConfig("features", features=features(backbone_args=wide))
    regime, decoder = RegimeConfig("token"), DecoderConfig("linear")
    config = Config(
        data=DataConfig(image_size=8),
        model=ModelConfig(NAME, ARGS, regime=regime, decoder=decoder, target=target),
    )
    model = build_model(config)
    assert isinstance(model.target, FrozenFeatures) and model.target.dim == 28
    assert not [name for name in model.state_dict() if name.startswith("target")]
    frozen_weights = {id(p) for p in model.target._teacher[0].parameters()}
    optimizer = build_optimizer(config.optim, model, 0.1)
    trained_weights = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert frozen_weights and not frozen_weights & trained_weights
    before = model.target(IMAGES)
    # With gradients on all that can have them, a step moves the student and not the teacher.
    mask = torch.tensor([[True, False, True, False]]).expand(2, 4)
    loss = model(IMAGES, PatchMask(mask)).loss
    loss.backward()
    optimizer.step()
    assert torch.equal(model.target(IMAGES), before)
    assert model(IMAGES, PatchMask(mask)).loss.item() != loss.item()
    assert all(p.grad is None for p in model.target._teacher[0].parameters())


# --- What is refused -----------------------------------------------------------------------------


def test_a_teacher_of_another_patch_size_is_refused(make: Make) -> None:
    reason = r"model\.target\.features\.backbone: .* grid of 4 x 4 patches .* model\.backbone has 2"
    with pytest.raises(UserError, match=reason + r" x 2: the patch sizes must agree"):
        frozen(make, backbone_args={**ARGS, "patch_size": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, r"features\.layer: 3 must lie between -3 and 2, for 3 blocks"),
        ({"layer": -4}, r"features\.layer: -4 must lie between -3 and 2"),
        ({"backbone": "vit_tiny"}, r"features\.backbone: 'vit_tiny' is not one of .*vit_tiny_"),
        (
            {"backbone": "resnet18", "backbone_args": {}},
            r"features\.backbone: 'resnet18' takes images of any size and, like every CNN, has no "
            r"patches to hide; the regimes need one of",
        ),
        (
            {"backbone_args": {**ARGS, "patch_size": 3}},
            r"features\.backbone_args\.patch_size: \(3, 3\) does not divide data\.image_size 8 x 8",
        ),
        (
            {"backbone_args": {"num_classes": 3}},
            r"features\.backbone_args: .* must not set num_classes",
        ),
        ({"checkpoint": "nowhere.pth"}, r"target\.features: checkpoint nowhere.pth does not exist"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        frozen(make, **settings)
    assert str(caught.value).startswith("model.target.features") and "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(trained(embed_dim=16).state_dict(), path)
    with pytest.raises(UserError, match=r"model\.target\.features: checkpoint .*cls_token"):
        frozen(make, checkpoint=str(path))
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.target\.features: .* cannot be read as weights"):
        frozen(make, checkpoint=str(path))
    with pytest.raises(UserError, match=r"features\.checkpoint: .* holds no encoder\.safetensors"):
        frozen(make, checkpoint=str(tmp_path))


def test_two_sources_of_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"features\.pretrained: True cannot be combined with"):
        FeaturesConfig(pretrained=True, checkpoint="model.pth")


# --- timm's own weights --------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each model that was built asked for a download, which is not done."""
    asked: list[bool] = []

    def create(name: str, *, pretrained: bool, **args: Any) -> Any:
        asked.append(pretrained)
        return timm.create_model(name, **args)

    monkeypatch.setattr("mim.model.backbones.build.create_model", create)
    return asked


def test_pretrained_weights_are_asked_for_where_set(make: Make, asked: list[bool]) -> None:
    frozen(make)
    frozen(make, pretrained=True)
    frozen(make, backbone=f"{NAME}.augreg_in21k", pretrained=True)
    assert asked == [False, True, True]


def test_a_tag_of_weights_needs_them(make: Make) -> None:
    with pytest.raises(UserError, match=r"features\.backbone: 'vit_tiny_patch16_224\.augreg.* not"):
        frozen(make, backbone=f"{NAME}.augreg_in21k")
    with pytest.raises(UserError, match=r"features\.backbone_args: .*[Ii]nvalid pretrained tag"):
        frozen(make, backbone=f"{NAME}.nobody", pretrained=True)


def test_a_model_without_weights_is_refused(make: Make, asked: list[bool]) -> None:
    with pytest.raises(UserError, match=r"features\.pretrained: True .* no weights of vit_base_"):
        frozen(make, backbone="vit_base_patch16_gap_224", pretrained=True)


def test_a_failed_download_is_one_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no connection")

    monkeypatch.setattr("mim.model.backbones.build.create_model", create)
    with pytest.raises(UserError, match=r"features\.pretrained: True .* cannot be had: no conn"):
        frozen(make, pretrained=True)


def test_a_config_is_checked_without_weights(asked: list[bool], tmp_path: Path) -> None:
    def config(**settings: Any) -> Config:
        target = TargetConfig("features", features=features(**settings))
        model = ModelConfig(NAME, ARGS, target=target)
        return Config(data=DataConfig(image_size=8), model=model)

    check_config(config(pretrained=True))
    assert not any(asked)
    for size in (8, 16):
        path = tmp_path / f"{size}.safetensors"
        save_file(trained(size).state_dict(), path)
        check_config(config(checkpoint=str(path)))
    save_file(trained(depth=2).state_dict(), path)
    with pytest.raises(UserError, match=r"does not fit the model: lacks blocks\.2"):
        check_config(config(checkpoint=str(path)))


# --- The moving average --------------------------------------------------------------------------


class Listed:
    """A teacher whose blocks' features are given."""

    def __init__(self, *layers: list[float]) -> None:
        self._layers = [torch.tensor([[layer]], dtype=torch.float64) for layer in layers]

    def layers(self, images: Tensor) -> list[Tensor]:
        return self._layers


# Normalised: (-1, -1, 1, 1), (1, -1, 1, -1), (-1, 1, 1, -1), whatever their scales and offsets.
LISTED = Listed([9, -9, -9, 9], [0, 0, 1, 1], [25, 5, 25, 5], [-3e3, 3e3, 3e3, -3e3])


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (1, [-1, 1, 1, -1]),
        (2, [0, 0, 1, -1]),
        (3, [-1 / 3, -1 / 3, 1, -1 / 3]),
        (None, [0, 0, 1, -1]),  # half of 4
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_the_mean_of_the_last_blocks_by_hand(
    top: int | None, expected: list[float], again: bool, make: Make
) -> None:
    settings = EmaFeaturesConfig(top, normalize_mean=again)
    target = make("ema_features", width=4, depth=4, ema_features=settings)
    worked = torch.tensor([[expected]], dtype=torch.float64)
    if again:
        worked = normalized(worked)
    got = target(torch.zeros(1, 1, 4, 4).double(), LISTED)
    torch.testing.assert_close(got, worked, rtol=0, atol=1e-4)


def test_half_of_one_block_is_one(make: Make) -> None:
    target = make("ema_features", depth=1)
    assert isinstance(target, EmaFeatures) and target.top == 1
    assert target.dim == 12 and target.needs_teacher


def test_more_blocks_than_there_are_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match=r"ema_features\.top: 5 is more than the 4 blocks of model"):
        make("ema_features", ema_features=EmaFeaturesConfig(5))
    with pytest.raises(UserError, match=r"model\.target\.ema_features\.top: 0 must be at least 1"):
        EmaFeaturesConfig(0)


def test_half_precision_features_are_normalised_in_float32(make: Make) -> None:
    class Half:
        def layers(self, images: Tensor) -> list[Tensor]:
            return [images.flatten(2).expand(-1, 4, -1)[..., :12].bfloat16()] * 4

    got = make("ema_features")(torch.randn(2, 1, 4, 4), Half())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.std(-1, correction=0), torch.ones(2, 4), **CLOSE)


def test_the_gradient_does_not_reach_the_teacher(make: Make) -> None:
    weight = torch.ones(12, requires_grad=True)

    class Trainable:
        def layers(self, images: Tensor) -> list[Tensor]:
            return [images.flatten(2).expand(-1, 4, -1)[..., :12] * weight] * 4

    assert not make("ema_features")(torch.randn(2, 1, 4, 4), Trainable()).requires_grad


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_output_has_the_final_norm_and_its_weights(pool: str, make: Make) -> None:
    """I-JEPA's target; timm norms before or after the pooling."""
    args = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "global_pool": pool}
    args |= {"class_token": pool == "token"}
    vit = build_backbone(ModelConfig("vit_tiny_patch16_224", args), (8, 8), 3)
    norm: Any = vit.norm if pool == "token" else vit.fc_norm
    norm.weight.data = torch.linspace(0.5, 2, 12)
    teacher, images = Teacher(vit, 0.9), torch.randn(2, 3, 8, 8)
    settings = EmaFeaturesConfig(layers="output", normalize_mean=False)
    target = make("ema_features", (4, 4), 3, width=12, depth=2, ema_features=settings)
    blocks = teacher.layers(images)
    expected = normalized(normalized(blocks[-1]) * torch.linspace(0.5, 2, 12))
    torch.testing.assert_close(target(images, teacher), expected, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"ema_features\.top: 2 must be 1 with .*layers=output"):
        EmaFeaturesConfig(top=2, layers="output")


# --- data2vec 2.0 --------------------------------------------------------------------------------


def test_channels_normalised_over_tokens(make: Make, teach: Any, images_of: Any) -> None:
    settings = EmaFeaturesConfig(top=2, normalize="instance", layers="mlp", normalize_mean=False)
    target = make("ema_features", grid=(3, 3), ema_features=settings).double()
    images = images_of(target)
    teacher = teach(target)
    expected = 0
    for tokens in teacher.mlp_outputs(images)[-2:]:  # (B, N, D)
        mean, var = tokens.mean(1, keepdim=True), tokens.var(1, keepdim=True, unbiased=False)
        expected = expected + (tokens - mean) / (var + 1e-5).sqrt() / 2
    torch.testing.assert_close(target(images, teacher), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_the_output_of_an_mlp_is_what_its_module_gives(backbone: str) -> None:
    args = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    vit = build_backbone(ModelConfig(backbone, args), (32, 32), 3)
    teacher, seen = Teacher(vit, 0.9), []
    for block in teacher.encoder.blocks:
        block.mlp.register_forward_hook(lambda module, given, out: seen.append(out[:, 1:]))
    images = torch.randn(2, 3, 32, 32)
    teacher.encoder.forward_features(images)
    expected = list(seen)
    for one, other in zip(teacher.mlp_outputs(images), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_class_token_predicts_the_mean_of_the_target() -> None:
    config = load_config(
        None,
        {
            "data.image_size": 32,
            "model.backbone_args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
            "model.decoder.transformer": {"width": 16, "depth": 1, "heads": 2},
            "model.target.name": "ema_features",
            "model.target.loss": "mse",
            "model.target.ema_features.class_weight": 2.56,
        },
    )
    model = build_model(config).double().train()
    images = torch.randn(3, 3, 32, 32).double()
    output = model(images, model.draw_mask(images, torch.arange(3)))
    wanted = model.target(images, model.teacher).mean(dim=1)
    distance = (output.latents.prefix[:, 0] - wanted).square().mean()
    assert output.terms["class_token"].item() == pytest.approx(2.56 * distance.item(), abs=1e-9)


def test_a_class_token_is_needed_for_its_loss(make: Make) -> None:
    with pytest.raises(UserError, match=r"ema_features\.class_weight: 0\.5 needs a backbone with"):
        make("ema_features", ema_features=EmaFeaturesConfig(class_weight=0.5))
    make("ema_features", has_class_token=True, ema_features=EmaFeaturesConfig(class_weight=0.5))
