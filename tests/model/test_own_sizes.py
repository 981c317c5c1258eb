"""Images of several sizes: alone, padded and packed are one; the oracle is timm's NaFlexVit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm import create_model
from torch import Tensor

from mim.core.config import Config
from mim.core.errors import UserError
from mim.core.patches import Patches, patchify
from mim.core.rng import image_keys
from mim.evaluate.features import image_tokens, pool_tokens
from mim.masks import PatchMask
from mim.model import MaskedImageModel, Output, build_model, check_config
from mim.model.backbones import family_of, sincos_position_embedding
from mim.model.decoders.base import positions
from mim.model.regimes import Latents

GRIDS = [(3, 5), (6, 2), (4, 4), (2, 3)]
EQUAL = [(3, 4), (2, 6), (4, 3), (6, 2)]  # equally many patches, other shapes
SAMPLES = torch.tensor([11, 22, 33, 44])
NAFLEX: dict[str, Any] = {"reg_tokens": 1, "init_values": None}  # 1e-5 would hide what blocks do
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("naflexvit_base_patch16_gap", NAFLEX),
    "factorised": ("naflexvit_base_patch16_parfac_gap", NAFLEX),
    "sampled": ("naflexvit_base_patch16_gap", {**NAFLEX, "pos_embed_use_grid_sample": True}),
    "rotary": (
        "naflexvit_base_patch16_gap",
        {**NAFLEX, "rope_type": "axial", "pos_embed": "none", "class_token": True},
    ),
    "mixed": ("naflexvit_base_patch16_gap", {**NAFLEX, "rope_type": "mixed", "pos_embed": "none"}),
    "vit": ("vit_tiny_patch16_224", {"reg_tokens": 1}),
}
REGIMES: dict[str, dict[str, Any]] = {
    "drop": {"model.regime.name": "drop"},
    "split": {"model.regime.name": "zero"},
    "dense": {"model.regime.name": "zero", "model.regime.zero.attention": "dense"},
    "attended": {"model.regime.name": "zero", "model.regime.zero.attend_mask": False},
    "embedding": {"model.regime.name": "zero", "model.regime.zero.at": "embedding"},
    "token": {"model.regime.name": "token"},
    "causal": {"model.regime.name": "drop", "model.regime.order": "causal"},
}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def settings(
    regime: str = "drop", decoder: str = "transformer", backbone: str = "learned", **changes: Any
) -> dict[str, Any]:
    name, args = BACKBONES[backbone]
    return {
        "data.aspect": "keep",
        "data.image_size": 16,
        "mask.ratio": 0.5,
        "model.backbone": name,
        "model.backbone_args": {
            **{"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
            **args,
        },
        "model.decoder.name": decoder,
        "model.decoder.cross_attention.share": 1.0,
        **{
            f"model.decoder.{kind}.{key}": value
            for kind in ("transformer", "cross_attention")
            for key, value in {"width": 16, "depth": 1, "heads": 2}.items()
        },
        "model.decoder.mlp.width": 16,
        **REGIMES[regime],
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


def changed(block: Any, changes: dict[str, Any]) -> Any:
    """A block of settings with dotted keys set; reading a config as the CLI does is slow."""
    own = {key: value for key, value in changes.items() if "." not in key}
    for name in {key.partition(".")[0] for key in changes if "." in key}:
        inner = {k.partition(".")[2]: v for k, v in changes.items() if k.startswith(f"{name}.")}
        own[name] = changed(getattr(block, name), inner)
    return replace(block, **own)


def build(**given: Any) -> MaskedImageModel:
    model = build_model(changed(Config(), settings(**given))).double()
    with torch.no_grad():  # positions that matter
        for name, value in model.named_parameters():
            if "pos_embed" in name and value.requires_grad:
                value.mul_(20)
    return model


def photos(grids: list[tuple[int, int]] = GRIDS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, r * 4, c * 4, generator=generator, dtype=torch.float64) for r, c in grids
    ]


def batch(which: list[int], grids: list[tuple[int, int]] = GRIDS) -> Patches:
    images = photos(grids)
    cut = [patchify(images[i][None], (4, 4))[0] for i in which]
    return Patches.pad(cut, [grids[i] for i in which])


def run(model: MaskedImageModel, images: Patches, which: list[int]) -> tuple[PatchMask, Output]:
    keys = image_keys(0, 0, SAMPLES[which], purpose="mask")
    mask = model.draw_mask(images, keys, epoch=0, sample_ids=SAMPLES[which])
    return mask, model(images, mask)


def patch_latents(output: Output, row: int, mask: PatchMask) -> Tensor:
    """The prefix and the patches of an image that have a latent, in order of the patches."""
    latents = output.latents
    valid = latents.valid
    patches = latents.patches[row] if valid is None else latents.patches[row][valid[row]]
    return torch.cat([latents.prefix[row], patches])


@pytest.mark.parametrize("grids", [GRIDS, EQUAL], ids=["unequal", "equal"])
@pytest.mark.parametrize(
    ("regime", "decoder"),
    [
        ("drop", "transformer"),
        ("drop", "cross_attention"),
        ("split", "transformer"),
        ("split", "linear"),
        ("dense", "cross_attention"),
        ("attended", "mlp"),
        ("embedding", "transformer"),
        ("token", "cross_attention"),
        ("token", "linear"),
        ("causal", "transformer"),
    ],
)
def test_alone_padded_and_packed_are_one(
    regime: str, decoder: str, grids: list[tuple[int, int]]
) -> None:
    padded = build(regime=regime, decoder=decoder)
    packed = build(regime=regime, decoder=decoder, data__batching="packed")
    everyone = list(range(4))
    mask, together = run(padded, batch(everyone, grids), everyone)
    _, in_rows = run(packed, batch(everyone, grids), everyone)
    torch.testing.assert_close(in_rows.loss, together.loss, **CLOSE)
    for row in everyone:
        alone_mask, alone = run(padded, batch([row], grids), [row])
        count = alone_mask.num_patches
        assert torch.equal(alone_mask.is_masked[0], mask.is_masked[row, :count])
        assert not mask.is_masked[row, count:].any()
        expected = patch_latents(alone, 0, alone_mask)
        assert alone.latents.patches.abs().max() > 0.1
        for output in (together, in_rows):
            torch.testing.assert_close(output.loss_per_image[row], alone.loss, **CLOSE)
            torch.testing.assert_close(patch_latents(output, row, mask), expected, **CLOSE)
            torch.testing.assert_close(output.prediction[row, :count], alone.prediction[0], **CLOSE)


@pytest.mark.parametrize("backbone", ["factorised", "sampled", "rotary", "mixed", "vit"])
@pytest.mark.parametrize("regime", ["drop", "split", "token"])
def test_every_kind_of_position_is_the_images_own(backbone: str, regime: str) -> None:
    model = build(regime=regime, backbone=backbone)
    mask, together = run(model, batch([0, 1, 2, 3]), [0, 1, 2, 3])
    for row in range(4):
        alone_mask, alone = run(model, batch([row]), [row])
        torch.testing.assert_close(together.loss_per_image[row], alone.loss, **CLOSE)
        expected = patch_latents(alone, 0, alone_mask)
        torch.testing.assert_close(patch_latents(together, row, mask), expected, **CLOSE)


@pytest.mark.parametrize("backbone", [*BACKBONES])
def test_zero_is_drop_at_visible_patches(backbone: str) -> None:
    images = batch([0, 1, 2, 3])
    (mask, drop), (_, split), (_, dense) = (
        run(build(regime=regime, backbone=backbone), images, [0, 1, 2, 3])
        for regime in ("drop", "split", "dense")
    )
    for row in range(4):
        visible = mask.is_visible[row]
        expected = patch_latents(drop, row, mask)
        for output in (split, dense):
            latents = output.latents
            found = torch.cat([latents.prefix[row], latents.patches[row][visible]])
            torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("decoder", ["transformer", "cross_attention"])
@pytest.mark.parametrize("regime", ["drop", "split", "dense", "token"])
@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_padding_reaches_nothing(batching: str, regime: str, decoder: str) -> None:
    """Neither the loss nor a gradient changes with what padding holds."""
    model = build(regime=regime, decoder=decoder, data__batching=batching)
    images, results = batch([0, 1, 2, 3]), []
    for fill in (0.0, 1e3):
        values = images.values.masked_fill(~images.valid[..., None], fill)
        filled = Patches(values, images.grids, images.valid, images.coords)
        model.zero_grad()
        _, output = run(model, filled, [0, 1, 2, 3])
        output.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((output.loss, grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backbone", ["learned", "factorised", "sampled", "rotary", "mixed"])
def test_features_are_those_of_timm(backbone: str) -> None:
    model, images = build(backbone=backbone), batch([0, 1, 2, 3])
    vit = model.backbone.eval()
    given = {"patches": images.values, "patch_coord": images.coords, "patch_valid": images.valid}
    expected = vit.forward_features(**given)["patches"]
    tokens = image_tokens(vit, images)
    prefix = family_of(vit).num_prefix
    keep = torch.cat([images.valid.new_ones(4, prefix), images.valid], dim=1)
    torch.testing.assert_close(tokens[keep], expected[keep], **CLOSE)
    torch.testing.assert_close(model.encode(images)[keep], expected[keep], **CLOSE)
    pooled = pool_tokens(vit, tokens, "mean", images.valid)
    torch.testing.assert_close(pooled, vit(given), **CLOSE)


@pytest.mark.parametrize("backbone", ["learned", "rotary", "vit"])
def test_equal_squares_are_a_plain_batch(backbone: str) -> None:
    """Images that all have the model's size: as patches or as pixels, the same."""
    model = build(backbone=backbone)
    square = torch.stack(photos([(4, 4)] * 3))
    cut = Patches.of(patchify(square, (4, 4)), [(4, 4)] * 3)
    keys = image_keys(0, 0, SAMPLES[:3], purpose="mask")
    mask, other = model.draw_mask(cut, keys), model.draw_mask(square, keys)
    assert torch.equal(mask.is_masked, other.is_masked)
    torch.testing.assert_close(model(cut, mask).loss, model(square, other).loss, **CLOSE)
    expected = family_of(model.backbone).features(square)
    torch.testing.assert_close(image_tokens(model.backbone, cut), expected, **CLOSE)


def test_positions_of_decoders_follow_row_and_column() -> None:
    images = batch([0, 1])
    latents = Latents(torch.zeros(2, 16, 8), 1, 15, coords=images.coords)
    table = torch.zeros(1, 17, 8, dtype=torch.float64)
    found = positions(table, latents, num_prefix=1)
    for row, grid in enumerate(images.grids):
        expected = sincos_position_embedding(grid, 8, 1)[0].double()
        torch.testing.assert_close(found[row, : len(expected)], expected, rtol=0, atol=1e-6)


def test_a_left_out_image_of_another_size() -> None:
    """NaN in an image of weight 0 changes no gradient of the others."""
    model, images, results = build(), batch([0, 1, 2, 3]), []
    keys = image_keys(0, 0, SAMPLES, purpose="mask")
    for broken in (0.5, float("nan")):
        values = images.values.clone()
        values[1, :12] = broken
        given = Patches(values, images.grids, images.valid, images.coords)
        model.zero_grad()
        loss = model(given, model.draw_mask(images, keys), torch.tensor([1.0, 0, 2, 1])).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_parameter_learns() -> None:
    for backbone in BACKBONES:
        model = build(backbone=backbone)
        run(model, batch([0, 1, 2, 3]), [0, 1, 2, 3])[1].loss.backward()
        lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not [n for n in lacking if "fc_norm" not in n], backbone


def test_the_state_dict_stays_timms() -> None:
    name, args = BACKBONES["learned"]
    state = build().backbone.state_dict()
    again = create_model(
        name, num_classes=0, patch_size=4, embed_dim=16, depth=2, num_heads=2, **args
    )
    assert again.state_dict().keys() == state.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "eva"}, "model.backbone: .* takes images of one size"),
        ({"model__target__name": "low_pass"}, "model.target.name: .* choose normalized_pixels"),
        ({"mask__name": "attention"}, "mask.name: 'attention' looks at images of one size"),
        ({"mask__name": "aligned", "mask__aligned__unit": 8}, "mask.aligned.unit: 8 does not"),
        (
            {"backbone": "rotary", "data__batching": "packed"},
            "data.batching: 'packed' packs plain timm blocks",
        ),
        (
            {"data__aspect": "square", "data__batching": "packed"},
            "data.batching: 'packed' needs data.aspect=keep",
        ),
    ],
)
def test_what_takes_one_size_is_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "eva", ("eva02_tiny_patch14_224", {}))
    with pytest.raises(UserError, match=message):
        check_config(changed(Config(), settings(**changes)))


def test_a_grid_that_the_ratio_cannot_divide_is_refused() -> None:
    model, lone = build(), Patches.pad([torch.zeros(1, 48).double()], [(1, 1)])
    with pytest.raises(UserError, match=r"mask.ratio: 0.5 hides every patch of a grid of 1 x 1"):
        run(model, lone, [0])
