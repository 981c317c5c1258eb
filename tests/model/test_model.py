"""The model: shared initial weights, gradients everywhere, hand-worked losses, no leak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim.core.config import (
    Config,
    CrossDecoderConfig,
    DataConfig,
    DecoderConfig,
    MaskConfig,
    MlpDecoderConfig,
    ModelConfig,
    RegimeConfig,
    TargetConfig,
    TrainConfig,
    TransformerDecoderConfig,
    ZeroConfig,
)
from mim.core.errors import UserError
from mim.core.patches import patchify, unpatchify
from mim.masks import PatchMask
from mim.model import MaskedImageModel, build_model, check_config

REGIMES = {
    "drop": RegimeConfig("drop"),
    **{
        f"zero {at} {attention}": RegimeConfig("zero", zero=ZeroConfig(at, attention=attention))
        for at in ("pixels", "embedding")
        for attention in ("split", "dense")
    },
    "zero pixels attended": RegimeConfig("zero", zero=ZeroConfig("pixels", attend_mask=False)),
    "token": RegimeConfig("token"),
}
DECODERS = ("transformer", "cross_attention", "linear", "mlp")
PAIRS = [(r, d) for r in REGIMES for d in DECODERS if r != "drop" or d not in ("linear", "mlp")]
ANY_PAIR = pytest.mark.parametrize(
    ("regime", "decoder"), PAIRS, ids=[f"{r}, {d}" for r, d in PAIRS]
)
ANY_TARGET = pytest.mark.parametrize("target", ["pixels", "normalized_pixels"])
SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def make_config(
    regime: str = "drop",
    decoder: str = "transformer",
    target: TargetConfig | str = "normalized_pixels",
    *,
    args: dict[str, Any] | None = None,
    data: DataConfig | None = None,
    seed: int = 0,
    **model: Any,
) -> Config:
    if isinstance(target, str):
        target = TargetConfig(name=target)
    return Config(
        seed=seed,
        data=data or DataConfig(image_size=16, channels=3),
        model=ModelConfig(
            backbone="vit_tiny_patch16_224",
            backbone_args={**SMALL, **(args or {})},
            regime=REGIMES[regime],
            decoder=DecoderConfig(
                decoder,
                transformer=TransformerDecoderConfig(16, 2, 2),
                cross_attention=CrossDecoderConfig(16, 2, 2, share=1.0),
                mlp=MlpDecoderConfig(16),
            ),
            target=target,
            **model,
        ),
    )


def rows(*texts: str) -> PatchMask:
    return PatchMask(torch.tensor([[c == "x" for c in text] for text in texts]))


# 16 patches each
EQUAL = rows("xxxx.xx.x...xxx.", "x.x.x.x.xxxxxx..", ".xxxxx.xxxx.x...")
UNEQUAL = rows("xxxxxxxxxxxxxxx.", "x...............", "x.x.x.x.x.x.x.x.")
ANY_MASK = pytest.mark.parametrize("mask", [EQUAL, UNEQUAL], ids=["equal", "unequal"])


def make_images(count: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)


# --- Initial weights -----------------------------------------------------------------------------


def weights(regime: str, decoder: str, seed: int = 0, **args: Any) -> dict[str, Tensor]:
    return build_model(make_config(regime, decoder, seed=seed, args=args)).state_dict()


@pytest.mark.parametrize("args", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("decoder", ["transformer", "linear"])
def test_regimes_start_from_the_same_weights(decoder: str, args: dict[str, Any]) -> None:
    states = [weights(r, d, **args) for r, d in PAIRS if d == decoder]
    own = {"regime.mask_token", "decoder.mask_token"}
    for state in states[1:]:
        assert state.keys() - own == states[0].keys() - own
        for name in state.keys() - own:
            assert torch.equal(state[name], states[0][name]), name


def test_the_decoder_does_not_change_the_backbone() -> None:
    one, other = weights("zero pixels split", "transformer"), weights("zero pixels split", "linear")
    shared = [name for name in one if name.startswith("backbone.")]
    assert shared and all(torch.equal(one[name], other[name]) for name in shared)


@ANY_PAIR
def test_another_seed_gives_other_weights(regime: str, decoder: str) -> None:
    one, other = weights(regime, decoder), weights(regime, decoder, seed=1)
    for name, value in one.items():
        fixed = name in ("decoder.pos_embed", "decoder.layer_weights")
        drawn = value.unique().numel() > 1 and not fixed
        assert torch.equal(value, other[name]) != drawn, name


@ANY_PAIR
def test_building_neither_reads_nor_moves_the_global_generator(regime: str, decoder: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = weights(regime, decoder)
    check_config(make_config(regime, decoder))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = weights(regime, decoder)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_who_has_a_mask_token() -> None:
    def tokens(regime: str) -> list[str]:
        return [name for name in weights(regime, "transformer") if "mask_token" in name]

    assert tokens("drop") == ["decoder.mask_token"]
    assert tokens("token") == ["regime.mask_token"]
    assert tokens("zero pixels split") == []


# --- Gradients -----------------------------------------------------------------------------------


@ANY_TARGET
@ANY_PAIR
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"reg_tokens": 2, "init_values": 0.1, "qk_norm": True},
        {"class_token": False, "global_pool": "avg"},
        {"global_pool": "avg", "pre_norm": True},
    ],
    ids=["class token", "registers", "no prefix", "fc_norm"],
)
def test_every_parameter_gets_a_gradient(
    args: dict[str, Any], regime: str, decoder: str, target: str
) -> None:
    model = build_model(make_config(regime, decoder, target, args=args)).train()
    model(make_images(), EQUAL).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert name.endswith("pos_embed") and parameter.grad is None, name


@ANY_PAIR
@ANY_MASK
def test_checkpointing_changes_no_gradient(mask: PatchMask, regime: str, decoder: str) -> None:
    config = make_config(regime, decoder)
    grads = []
    for checkpointing in (False, True):
        model = build_model(
            replace(config, train=TrainConfig(gradient_checkpointing=checkpointing))
        )
        assert model.regime.checkpointing == checkpointing
        model = model.double().train()
        model(make_images(dtype=torch.float64), mask).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-10, atol=1e-12)


# --- The loss, by hand ---------------------------------------------------------------------------

# 4 x 4 pixels in patches of 2 x 2, each flat but the last.
HAND = DataConfig(image_size=4, channels=1)
FIRST = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 0, 2], [3, 3, 4, 6]]).double()


def constant_model(**target: Any) -> MaskedImageModel:
    """Predicts 1 at every pixel."""
    config = make_config(
        "zero pixels split",
        "linear",
        TargetConfig(**target),
        data=HAND,
        args={"patch_size": 2},
    )
    model = build_model(config).double()
    head = model.decoder.head
    assert isinstance(head, nn.Linear)
    nn.init.zeros_(head.weight)
    nn.init.ones_(head.bias)
    return model


def hand_images() -> Tensor:
    return torch.stack([FIRST, FIRST + 1, 2 * FIRST])[:, None]  # (3, 1, 4, 4)


def test_the_loss_by_hand() -> None:
    # Squared errors of the patches of FIRST: 0, 1, 4, and (1 + 1 + 9 + 25) / 4 = 9;
    # of FIRST + 1: 1, 4, 9, (0 + 4 + 16 + 36) / 4 = 14;
    # of 2 * FIRST: 1, 9, 25, (1 + 9 + 49 + 121) / 4 = 45.
    model, images = constant_model(name="pixels"), hand_images()
    output = model(images, rows("x.x.", ".x.x", "..xx"))
    assert output.loss_per_image.tolist() == [2, 9, 35]
    assert output.loss.item() == pytest.approx(46 / 3, abs=1e-12)
    # Unequal counts: each image is the mean over its own patches, and images count alike.
    output = model(images, rows("xxx.", "...x", "...."))
    assert output.loss_per_image.tolist() == pytest.approx([5 / 3, 14, 0], abs=1e-12)
    assert output.loss.item() == pytest.approx((5 / 3 + 14) / 3, abs=1e-12)


def test_the_l1_loss_and_the_loss_on_all_patches_by_hand() -> None:
    output = constant_model(name="pixels", loss="l1")(hand_images()[:1], rows("..xx"))
    assert output.loss.item() == pytest.approx((2 + (1 + 1 + 3 + 5) / 4) / 2, abs=1e-12)
    model = constant_model(name="pixels", loss_on="all")
    output = model(hand_images(), rows("xxx.", "...x", "...."))
    assert output.loss_per_image.tolist() == [14 / 4, 28 / 4, 80 / 4]


def test_the_loss_on_normalised_patches_by_hand() -> None:
    # A flat patch has target 0: error 1. The last has mean 3, sum of squares 9 + 1 + 1 + 9 = 20,
    # variance 20 / 3: targets t = -3, -1, 1, 3 over the root; mean of (1 - t)^2 = 1 + mean t^2.
    model = constant_model(name="normalized_pixels")
    output = model(hand_images()[:1], rows("..xx"))
    last = 1 + 5 / (20 / 3 + 1e-6)
    assert output.loss.item() == pytest.approx((1 + last) / 2, abs=1e-12)


def test_weights_of_images_by_hand() -> None:
    model, images, mask = constant_model(name="pixels"), hand_images(), rows("x.x.", ".x.x", "..xx")

    def loss(*weight: float) -> float:
        return model(images, mask, torch.tensor(weight).double()).loss.item()

    assert loss(1, 1, 1) == pytest.approx(46 / 3, abs=1e-12)
    assert loss(2, 1, 1) == pytest.approx((2 * 2 + 9 + 35) / 4, abs=1e-12)
    assert loss(1, 1, 0) == pytest.approx(11 / 2, abs=1e-12)
    assert loss(0.5, 0, 0) == 2
    assert loss(0, 0, 0) == 0


@ANY_PAIR
def test_an_image_of_weight_0_is_left_out(regime: str, decoder: str) -> None:
    """Loss and gradients are those of the other images, whatever it shows."""
    model = build_model(make_config(regime, decoder)).double()
    results = []
    for images, mask, weight in (
        (make_images(dtype=torch.float64)[:2], UNEQUAL[:2], None),
        (make_images(dtype=torch.float64), UNEQUAL, torch.tensor([1.0, 1.0, 0.0])),
    ):
        model.zero_grad()
        loss = model(images, mask, weight).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss, grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@ANY_PAIR
def test_a_broken_image_of_weight_0_spoils_nothing(regime: str, decoder: str) -> None:
    """NaN and infinity in it change no bit of loss and gradients: 0 * NaN would be NaN."""
    model, results = build_model(make_config(regime, decoder)), []
    for broken in (None, float("nan"), float("inf")):
        images = make_images()
        if broken is not None:
            images[1] = broken
        model.zero_grad()
        loss = model(images, UNEQUAL, torch.tensor([1.0, 0.0, 2.0])).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    for values in zip(*results, strict=True):
        assert values[0].isfinite().all()
        assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize(("regime", "decoder"), PAIRS)
def test_a_mask_that_hides_nothing_has_loss_0(regime: str, decoder: str) -> None:
    output = build_model(make_config(regime, decoder))(make_images(), PatchMask.empty(3, 16))
    assert output.loss_per_image.tolist() == [0, 0, 0] and output.loss.item() == 0


# --- Outputs -------------------------------------------------------------------------------------


@ANY_TARGET
@ANY_MASK
@ANY_PAIR
def test_the_loss_is_that_of_the_prediction(
    regime: str, decoder: str, mask: PatchMask, target: str
) -> None:
    """What the loss projects, at masked patches only, is what the prediction shows there."""
    model = build_model(make_config(regime, decoder, target)).double()
    output = model(make_images(dtype=torch.float64), mask)
    assert output.prediction.shape == output.target.shape == (3, 16, 4 * 4 * 3)
    error = ((output.prediction - output.target) ** 2).mean(-1)
    expected = torch.stack([e[m].mean() for e, m in zip(error, mask.is_masked, strict=True)])
    torch.testing.assert_close(output.loss_per_image, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-10, atol=1e-10)
    assert output.latents.num_patches == 16


@ANY_MASK
@ANY_PAIR
def test_a_prediction_does_not_depend_on_the_batch(
    regime: str, decoder: str, mask: PatchMask
) -> None:
    model = build_model(make_config(regime, decoder)).double()
    images = make_images(dtype=torch.float64)
    whole = model(images, mask)
    for row in range(len(mask)):
        part = slice(row, row + 1)
        alone = model(images[part], mask[part])
        close = {"rtol": 1e-10, "atol": 1e-10}
        torch.testing.assert_close(alone.prediction, whole.prediction[part], **close)
        torch.testing.assert_close(alone.loss, whole.loss_per_image[row], **close)


@ANY_MASK
def test_mask_tokens_stand_where_no_latent_is(mask: PatchMask) -> None:
    model = build_model(make_config("drop"))
    decoder: Any = model.decoder
    seen: list[Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        output = model(make_images(), mask)
        embedded = decoder.embed(output.latents.tokens)
    tokens = (seen[0] - decoder.pos_embed)[:, 1:]
    for row, hidden in enumerate(mask.is_masked):
        fill = decoder.mask_token[0].expand(int(hidden.sum()), -1)
        torch.testing.assert_close(tokens[row, hidden], fill)
        torch.testing.assert_close(tokens[row, ~hidden], embedded[row, 1 : 1 + (~hidden).sum()])


@pytest.mark.parametrize(("on", "projected"), [("masked", 10), ("all", 16)])
def test_the_last_projection_runs_only_where_the_loss_looks(on: str, projected: int) -> None:
    model = build_model(make_config(target=TargetConfig(loss_on=on)))
    shapes: list[tuple[int, ...]] = []
    model.decoder.head.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    output = model(make_images(), rows(*["xxxxxxxxxx......"] * 3))
    assert shapes == [(3, projected, 16)]
    assert output.prediction.shape[1] == 16  # only when asked for
    assert len(shapes) == 2


@pytest.mark.parametrize("regime", REGIMES)
def test_features_without_a_mask_are_timms(regime: str) -> None:
    model = build_model(make_config(regime)).eval()
    images = make_images()
    with torch.no_grad():
        expected = model.backbone.forward_features(images)
        torch.testing.assert_close(model.encode(images), expected, rtol=1e-5, atol=1e-6)
        masked = model.encode(images, EQUAL)
    assert masked.shape[1] == 1 + (EQUAL.num_visible if regime == "drop" else 16)


@pytest.mark.parametrize("regime", REGIMES)
def test_latents_of_a_pooling_backbone_are_normed_for_the_decoder(regime: str) -> None:
    """timm puts the norm of such a model behind its pooling; a decoder reads normed tokens."""
    model = build_model(make_config(regime, args={"global_pool": "avg"}))
    nn.init.normal_(model.backbone.fc_norm.weight)
    seen: list[Tensor] = []
    model.decoder.embed.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, args: seen.append(args[0])
    )
    output = model(make_images(), EQUAL)
    torch.testing.assert_close(seen[0], model.backbone.fc_norm(output.latents.tokens))


def test_sizes_follow_the_backbone() -> None:
    data = DataConfig(image_size=(8, 48), channels=5)
    model = build_model(make_config(data=data, args={"patch_size": (4, 8)}))
    assert model.grid == (2, 6) and model.patch_size == (4, 8)
    output = model(torch.randn(1, 5, 8, 48), rows("xxxx.....xxx"))
    assert output.prediction.shape == (1, 12, 4 * 8 * 5)
    assert output.loss.isfinite()


# --- No leak -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [7.0, float("nan")])
@ANY_MASK
@ANY_PAIR
def test_masked_pixels_change_no_prediction(
    regime: str, decoder: str, mask: PatchMask, value: float
) -> None:
    model = build_model(make_config(regime, decoder))
    images = make_images()
    patches = patchify(images, (4, 4)).masked_fill(mask.is_masked[..., None], value)
    altered = unpatchify(patches, (4, 4), (4, 4))
    with torch.no_grad():
        before, after = model(images, mask), model(altered, mask)
    assert before.prediction.isfinite().all()
    assert torch.equal(before.prediction, after.prediction)
    assert torch.equal(before.latents.tokens, after.latents.tokens)
    assert not torch.equal(before.loss, after.loss)  # the target does change


@ANY_PAIR
def test_a_fully_masked_image_trains_on_its_class_token(regime: str, decoder: str) -> None:
    model = build_model(make_config(regime, decoder))
    output = model(make_images(2), rows("x" * 16, "x..............."))
    output.loss.backward()
    assert output.prediction.isfinite().all() and output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# --- check_config --------------------------------------------------------------------------------


@ANY_PAIR
@pytest.mark.parametrize("position", ["learned", "sincos2d"])
def test_a_check_allocates_nothing(
    position: str, regime: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[MaskedImageModel] = []
    init = MaskedImageModel.__init__

    def spy(self: MaskedImageModel, *args: Any) -> None:
        init(self, *args)
        built.append(self)

    monkeypatch.setattr(MaskedImageModel, "__init__", spy)
    check_config(make_config(regime, decoder, position_embedding=position))
    heavy = [n for n, p in built[0].named_parameters() if p.ndim == 2 and not p.is_meta]
    assert not heavy


def test_a_check_and_a_build_refuse_alike() -> None:
    config = replace(make_config(), mask=MaskConfig(ratio=0.01))
    messages = []
    for what in (check_config, build_model):
        with pytest.raises(UserError) as error:
            what(config)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
