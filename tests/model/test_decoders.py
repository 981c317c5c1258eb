"""What decoders read: latents alone, each query by itself, a stated share of the hidden patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
    ZeroConfig,
)
from mim.core.errors import UserError
from mim.core.rng import image_keys
from mim.masks import PatchMask, sample_masks
from mim.model import MaskedImageModel, build_model
from mim.model.decoders import ConvolutionalSettings

REGIMES = {
    "drop": RegimeConfig("drop"),
    "zero split": RegimeConfig("zero"),
    "zero dense": RegimeConfig("zero", zero=ZeroConfig(attention="dense")),
    "token": RegimeConfig("token"),
}
ANY_REGIME = pytest.mark.parametrize("regime", REGIMES)


def cross_model(
    regime: str = "drop", target: TargetConfig | None = None, **settings: Any
) -> MaskedImageModel:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(
            backbone_args={"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2},
            regime=REGIMES[regime],
            target=target or TargetConfig(),
            decoder=DecoderConfig(
                "cross_attention", cross_attention=CrossDecoderConfig(16, 2, 2, **settings)
            ),
        ),
    )
    return build_model(config)


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)


def masks(count: int = 3, ratio: Any = 0.75, epoch: int = 0) -> PatchMask:
    ids = list(range(count))
    return sample_masks(MaskConfig(ratio=ratio), (8, 8), seed=0, epoch=epoch, sample_ids=ids)


# --- The share -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.99])
def test_a_share_of_the_hidden_patches_exact_and_among_them(share: float) -> None:
    mask = masks(50)
    ids, valid = mask.masked_share(share)
    assert valid is None
    assert ids.shape == (50, round(48 * share))
    assert (ids.diff(dim=1) > 0).all()  # ascending, none twice
    assert mask.is_masked.gather(1, ids).all()


def test_a_share_of_unequal_rows_is_padded() -> None:
    mask = masks(40, (0.1, 0.9))
    ids, valid = mask.masked_share(0.3)
    hidden = mask.is_masked.sum(1)
    assert valid is not None
    assert (valid.sum(1) == (hidden * 0.3 + 0.5).floor().clamp(min=1)).all()
    for row, keep, flags in zip(ids, valid, mask.is_masked, strict=True):
        assert flags[row[keep]].all()
        assert len(row[keep].unique()) == keep.sum()


def test_the_share_of_an_image_does_not_depend_on_its_neighbours() -> None:
    """150 hidden patches at 0.21 are 31.5, hence 32: in single precision they would be 31."""
    flags = torch.zeros(2, 256, dtype=torch.bool)
    flags[0, :150] = True
    flags[1, :40] = True
    _, valid = PatchMask(flags).masked_share(0.21)
    alone, _ = PatchMask(flags[:1]).masked_share(0.21)
    assert valid is not None
    assert int(valid[0].sum()) == alone.shape[1] == 32


def test_a_share_needs_a_loss_on_masked_patches() -> None:
    with pytest.raises(UserError, match=r"model\.decoder\.cross_attention\.share: 0\.5 must be 1"):
        cross_model(target=TargetConfig(loss_on="all"), share=0.5)
    cross_model(target=TargetConfig(loss_on="all"), share=1.0)


def test_every_hidden_patch_is_drawn_equally_often_over_epochs() -> None:
    flags = torch.zeros(1, 64, dtype=torch.bool)
    flags[:, ::2] = True
    counts = torch.zeros(64)
    for epoch in range(400):
        mask = PatchMask(flags, keys=image_keys(0, epoch, [7]))
        ids, _ = mask.masked_share(0.25)  # 8 of 32
        counts[ids[0]] += 1
    assert (counts[1::2] == 0).all()
    # Binomial(400, 1/4): 100 +- 8.7; five deviations.
    assert ((counts[::2] - 100).abs() < 44).all()


def test_the_share_does_not_depend_on_the_batch() -> None:
    mask = masks(6)
    whole, _ = mask.masked_share(0.5)
    for row in range(6):
        alone, _ = mask[row : row + 1].masked_share(0.5)
        assert torch.equal(alone[0], whole[row])
    handmade = PatchMask(mask.is_masked)  # no keys: hashed from the mask
    assert not torch.equal(handmade.masked_share(0.5)[0], whole)
    assert torch.equal(handmade.masked_share(0.5)[0][2], handmade[2:3].masked_share(0.5)[0][0])


def test_all_of_it_is_the_mask_itself() -> None:
    mask = masks(4, (0.2, 0.8))
    ids, valid = mask.masked_share(1.0)
    assert ids is mask.masked_ids and valid is mask.masked_valid


@ANY_REGIME
def test_training_decodes_the_share_and_evaluation_all(regime: str) -> None:
    model = cross_model(regime, share=0.25)
    rows: list[int] = []
    model.decoder.head.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, args: rows.append(args[0].shape[1])
    )
    model.train()(images(), masks())
    model.eval()(images(), masks())
    assert rows == [12, 48]


def test_the_shares_loss_is_unbiased() -> None:
    model = cross_model(share=0.25)
    with torch.no_grad():
        flags = masks(1).is_masked
        whole = model.eval()(images(1), PatchMask(flags)).loss
        model.train()
        drawn = torch.stack(
            [
                model(images(1), PatchMask(flags, keys=image_keys(0, epoch, [0]))).loss
                for epoch in range(300)
            ]
        )
    error = drawn.std() / len(drawn) ** 0.5
    assert error > 0
    assert (drawn.mean() - whole).abs() < 4 * error


# --- Cross-attention -----------------------------------------------------------------------------


@ANY_REGIME
@pytest.mark.parametrize("layers", ["last", "weighted"])
@pytest.mark.parametrize("ratio", [0.75, (0.3, 0.9)], ids=["equal", "unequal"])
def test_any_subset_is_computed_alone_exactly(regime: str, layers: str, ratio: Any) -> None:
    model = cross_model(regime, layers=layers).double().eval()
    mask = masks(3, ratio)
    with torch.no_grad():
        latents = model.latents(images(3, torch.float64), mask)
        whole = model.decoder(latents)
        ids = torch.tensor([[3, 60], [0, 17], [8, 9]])
        some = model.decoder(latents, ids)
    expected = torch.stack([whole[row, ids[row]] for row in range(3)])
    torch.testing.assert_close(some, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers", ["last", "weighted"])
def test_padding_of_shorter_rows_is_not_read(layers: str) -> None:
    model = cross_model("drop", layers=layers).double().eval()
    mask = masks(4, (0.2, 0.9))
    batch = images(4, torch.float64)
    with torch.no_grad():
        together = model(batch, mask).prediction
        for row in range(4):
            one = slice(row, row + 1)
            alone = model(batch[one], PatchMask(mask.is_masked[one])).prediction
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ratio", [0.75, (0.3, 0.9)], ids=["equal", "unequal"])
def test_weighted_layers_agree_between_split_and_dense(ratio: Any) -> None:
    outputs = []
    for regime in ("zero split", "zero dense"):
        model = cross_model(regime, layers="weighted").double().eval()
        weights: Tensor = model.decoder.layer_weights  # type: ignore[assignment]
        with torch.no_grad():
            weights.copy_(torch.tensor([[0.5, -1.0, 2.0], [1.0, 1.0, 0.3]]))
            outputs.append(model(images(3, torch.float64), masks(3, ratio)).prediction)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-10)


def test_weighted_layers_read_what_their_weights_say() -> None:
    model = cross_model("drop", layers="weighted").eval()
    seen: list[Tensor] = []
    model.decoder.layer_norms[1].register_forward_pre_hook(  # type: ignore[index,union-attr]
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model.decoder.layer_weights[1] = torch.tensor([2.0, 0.0, -1.0])  # type: ignore[index]
        latents = model.latents(images(), masks())
        model.decoder(latents)
    assert len(latents.layers) == 3
    expected = 2 * latents.layers[0] - latents.tokens  # the last one with the final norm
    torch.testing.assert_close(seen[0], expected)


def test_weighted_layers_start_at_the_last() -> None:
    model = cross_model("drop", layers="weighted")
    weights: Any = model.decoder.layer_weights
    assert weights.tolist() == [[0.0, 0.0, 1.0]] * 2


@pytest.mark.parametrize("args", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_the_prediction_of_drop_equals_that_of_zero_at_visible_keys(args: dict[str, Any]) -> None:
    """A cross-attention decoder under ``zero`` reads more keys: the masked latents differ."""
    drop, zero = cross_model("drop").double().eval(), cross_model("zero split").double().eval()
    mask = masks(2)
    batch = images(2, torch.float64)
    with torch.no_grad():
        a, b = drop(batch, mask), zero(batch, mask)
        # With the visible latents alone both decoders say the same: same weights, same positions.
        index = mask.visible_ids[..., None].expand(-1, -1, 24)
        same = b.latents.patches.gather(1, index)
        torch.testing.assert_close(same, a.latents.patches, rtol=0, atol=1e-10)
    assert (a.prediction - b.prediction).abs().max() > 1e-6


# --- MLP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_the_mlp_by_hand(depth: int) -> None:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(
            backbone_args={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
            regime=RegimeConfig("token"),
            decoder=DecoderConfig("mlp", mlp=MlpDecoderConfig(12, depth)),
        ),
    )
    model = build_model(config).eval()
    mask = sample_masks(config.mask, (4, 4), seed=0, epoch=0, sample_ids=[0, 1])
    with torch.no_grad():
        output = model(images(2), mask)
        x = output.latents.patches
        state = model.decoder.state_dict()
        for layer in range(depth):
            x = x @ state[f"layers.{2 * layer}.weight"].T + state[f"layers.{2 * layer}.bias"]
            x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        x = x @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(output.prediction, x, rtol=1e-4, atol=1e-5)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"share": 0.0}, ["model.decoder.cross_attention.share: 0.0", "above 0"]),
        ({"share": 1.5}, ["model.decoder.cross_attention.share: 1.5", "at most 1"]),
        (
            {"layers": "first"},
            ["model.decoder.cross_attention.layers: 'first'", "last, maps, weighted"],
        ),
        ({"heads": 3}, ["model.decoder.cross_attention.width: 512", "heads=3"]),
        ({"depth": 0}, ["model.decoder.cross_attention.depth: 0"]),
        ({"mlp_ratio": 0.0}, ["model.decoder.cross_attention.mlp_ratio: 0.0"]),
    ],
    ids=str,
)
def test_bad_settings_are_named(settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        CrossDecoderConfig(**settings)
    for part in parts:
        assert part in str(caught.value)


# --- CrossMAE's own form -------------------------------------------------------------------------


@ANY_REGIME
def test_maps_are_crossmaes(regime: str) -> None:
    """Each block reads its own sum of the embedded patches and all outputs, after its own norm."""
    model = cross_model(regime, layers="maps", share=1.0).double().eval()
    decoder, mask = model.decoder, masks()
    latents = model.latents(images(dtype=torch.float64), mask)
    assert len(latents.layers) == 4 and decoder.map_weights.shape == (2, 4)
    x = decoder.mask_token + decoder.pos_embed
    for block, norm, row in zip(
        decoder.blocks, decoder.layer_norms, decoder.map_weights, strict=True
    ):
        x = block(x, norm(torch.stack(latents.layers, dim=-1) @ row), None)
    torch.testing.assert_close(decoder(latents), decoder.norm(x), rtol=0, atol=1e-12)
    assert block.kv.in_features == 24 and not hasattr(decoder, "embed")  # the encoder's width


def test_the_first_map_is_what_enters_the_encoder() -> None:
    model = cross_model("drop", layers="maps", share=1.0).double().eval()
    mask, vit = masks(), model.backbone
    latents = model.latents(images(dtype=torch.float64), mask)
    placed = vit._pos_embed(vit.patch_embed(images(dtype=torch.float64)))
    visible = mask.visible_ids[..., None].expand(-1, -1, 24)
    expected = torch.cat([placed[:, :1], placed[:, 1:].gather(1, visible)], dim=1)
    torch.testing.assert_close(latents.layers[0], expected, rtol=0, atol=1e-12)


def test_every_weight_of_the_maps_learns_and_decays() -> None:
    from mim.training.optim import build_optimizer

    model = cross_model("drop", layers="maps").train()
    model(images(), masks()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for p in model.backbone.norm.parameters())  # nobody reads it
    optimizer = build_optimizer(Config().optim, model, 1e-3)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[id(model.decoder.map_weights)] > 0


@pytest.mark.parametrize(
    ("share_of", "expected"), [("masked", 12), ("all", 16)]
)  # of 64 patches 48 are hidden
def test_a_share_of_all_patches(share_of: str, expected: int) -> None:
    model = cross_model("drop", layers="maps", share=0.25, share_of=share_of)
    ids, _ = masks().masked_share(model.decoder.share_at(masks()))
    assert ids.shape[1] == expected
    few = masks(ratio=0.1)  # fewer hidden than a quarter of all: all of them
    assert few.masked_share(model.decoder.share_at(few))[0].shape[1] == (2 if expected == 12 else 6)


# --- data2vec 2.0's convolutions -----------------------------------------------------------------


def conv_model(regime: str, **settings: Any) -> MaskedImageModel:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(
            backbone_args={"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
            regime=REGIMES[regime],
            decoder=DecoderConfig("convolutional", convolutional=ConvolutionalSettings(**settings)),
        ),
    )
    return build_model(config).double()


def test_convolutions_by_hand() -> None:
    model = conv_model("token", width=24, depth=2, groups=4).eval()
    latents = model.latents(images(dtype=torch.float64), masks())
    x = latents.patches.transpose(1, 2).reshape(3, 24, 8, 8)
    for conv in model.decoder.blocks:
        assert conv.groups == 4 and conv.kernel_size == (3, 3)
        y = conv(x)
        mean, var = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
        x = x + torch.nn.functional.gelu((y - mean) / (var + 1e-5).sqrt())
    expected = x.reshape(3, 24, 64).transpose(1, 2)
    torch.testing.assert_close(model.decoder(latents), expected, rtol=0, atol=1e-12)


def test_noise_stands_where_patches_are_dropped_in_training_only() -> None:
    model = conv_model("drop", width=24, depth=1, groups=4, noise=0.5)
    latents = model.latents(images(dtype=torch.float64), masks())
    one, two = model.train().decoder(latents), model.decoder(latents)
    assert not torch.equal(one, two)
    model.eval()
    assert torch.equal(model.decoder(latents), model.decoder(latents))


def test_groups_must_divide_both_widths() -> None:
    with pytest.raises(UserError, match=r"convolutional\.groups: 5 does not divide .*width=24"):
        conv_model("drop", width=24, groups=5)
    with pytest.raises(UserError, match=r"convolutional\.groups: 16 does not divide the 24 of"):
        conv_model("drop")
