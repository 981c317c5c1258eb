"""The regimes: what the encoder sees, that they agree where they must, and that nothing leaks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import timm
import torch
from torch import Tensor, nn

from mim.core.config import ModelConfig, RegimeConfig, ZeroConfig
from mim.core.errors import UserError
from mim.core.patches import patchify, unpatchify
from mim.masks import PatchMask
from mim.model.backbones import build_backbone, grid_of, patch_size_of, supports_split
from mim.model.regimes import Latents, Regime, build_regime, scatter_tokens

REGIMES = {
    "drop": RegimeConfig("drop"),
    **{
        f"zero {at} {attention}": RegimeConfig("zero", zero=ZeroConfig(at, attention=attention))
        for at in ("pixels", "embedding")
        for attention in ("split", "dense")
    },
    **{
        f"zero {at} attended": RegimeConfig("zero", zero=ZeroConfig(at, attend_mask=False))
        for at in ("pixels", "embedding")
    },
    "token": RegimeConfig("token"),
}
MASKING_ZEROS = [name for name in REGIMES if name.endswith(("split", "dense"))]
ANY_REGIME = pytest.mark.parametrize("regime", REGIMES)

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
NO_PREFIX: dict[str, Any] = {"class_token": False, "global_pool": "avg"}


@dataclass(frozen=True)
class Variant:
    args: dict[str, Any] = field(default_factory=dict)
    backbone: str = "vit_tiny_patch16_224"
    size: tuple[int, int] = (16, 16)
    channels: int = 3
    position: Literal["learned", "sincos2d"] = "learned"


VARIANTS = {
    "class token": Variant(),
    "no prefix": Variant(NO_PREFIX),
    "registers": Variant({"reg_tokens": 3}),
    "registers only": Variant({"reg_tokens": 2, **NO_PREFIX}),
    "no_embed_class": Variant({"no_embed_class": True, "reg_tokens": 1}),
    "pre-norm": Variant({"pre_norm": True}),
    "CLIP": Variant({}, "vit_xsmall_patch16_clip_224"),
    "LayerScale": Variant({"init_values": 0.1}),
    "QK norm": Variant({"qk_norm": True}),
    "no qkv bias": Variant({"qkv_bias": False}),
    "fc_norm": Variant({"global_pool": "avg"}),
    "non-square": Variant({"patch_size": (4, 8)}, size=(12, 32)),
    "1 channel": Variant(channels=1),
    "5 channels": Variant(channels=5),
    "sincos2d": Variant({"reg_tokens": 1}, size=(8, 24), position="sincos2d"),
    # Rotary position embeddings: on top of learned ones, alone with registers, learned for each
    # block and head, with queries that share keys, and none.
    "EVA-02": Variant({}, "eva02_tiny_patch14_224"),
    "DINOv3": Variant({"init_values": 0.1}, "vit_small_patch16_dinov3", (8, 24)),
    "RoPE mixed": Variant({}, "vit_small_patch16_rope_mixed_224"),
    "RoPE, shared keys": Variant(
        {"qkv_fused": False, "num_kv_heads": 1, "qk_norm": True, "scale_attn_inner": True},
        "vit_small_patch16_rope_224",
        (12, 16),
    ),
    "EVA, no rotation": Variant(
        {"use_rot_pos_emb": False, "qkv_fused": False},
        "eva02_tiny_patch14_224",
        position="sincos2d",
    ),
}
ROTARY = ["EVA-02", "DINOv3", "RoPE mixed", "RoPE, shared keys"]
ANY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
SOME_VARIANTS = pytest.mark.parametrize(
    "variant",
    ["class token", "no prefix", "registers", "pre-norm", "QK norm", "non-square", *ROTARY],
)


def stir(module: nn.Module) -> None:
    """Give every parameter a value of its own: at their initial 0 and 1 some would go unnoticed."""
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter.dtype)


def make_vit(variant: str = "class token", dtype: torch.dtype = torch.float64) -> Any:
    chosen = VARIANTS[variant]
    args = {**SMALL, **chosen.args}
    config = ModelConfig(chosen.backbone, args, position_embedding=chosen.position)
    vit = build_backbone(config, chosen.size, chosen.channels)
    stir(vit)
    return vit.to(dtype)


def make_regime(name: str, vit: Any, checkpointing: bool = False) -> Regime:
    regime = build_regime(REGIMES[name], vit).to(next(vit.parameters()).dtype)
    regime.checkpointing = checkpointing
    return regime


def make_images(vit: Any, count: int = 4, seed: int = 0) -> Tensor:
    rows, columns = grid_of(vit)
    height, width = patch_size_of(vit)
    channels = vit.patch_embed.proj.in_channels
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, rows * height, columns * width)
    images = torch.randn(shape, generator=generator, dtype=torch.float64)
    return images.to(next(vit.parameters()).dtype)


def make_mask(vit: Any, hidden: list[int]) -> PatchMask:
    """Hide as many patches of each image as the list says."""
    rows, columns = grid_of(vit)
    patches = rows * columns
    generator = torch.Generator().manual_seed(1)
    ranks = torch.stack([torch.randperm(patches, generator=generator) for _ in hidden])
    return PatchMask(ranks < torch.tensor(hidden)[:, None])


COUNTS: dict[str, Callable[[int], list[int]]] = {
    "equal": lambda n: [n // 2] * 4,
    "unequal": lambda n: [1, n // 2, n - 1, 0],
}
ANY_COUNTS = pytest.mark.parametrize("counts", COUNTS)


def mask_of(vit: Any, counts: str) -> PatchMask:
    rows, columns = grid_of(vit)
    return make_mask(vit, COUNTS[counts](rows * columns))


def at_visible(latents: Latents, mask: PatchMask) -> Tensor:
    """Prefix and visible tokens (B, P + K, D), zeros for padding, whatever the regime."""
    patches = latents.patches
    if latents.patch_ids is None:
        index = mask.visible_ids[..., None].expand(-1, -1, patches.shape[-1])
        patches = patches.gather(1, index)
    else:
        assert torch.equal(latents.patch_ids, mask.visible_ids)
    if mask.visible_valid is not None:
        patches = patches * mask.visible_valid[..., None]
    return torch.cat([latents.prefix, patches], dim=1)


def gradients(vit: Any, output: Tensor) -> dict[str, Tensor]:
    """Of an arbitrary fixed function of the output, for every parameter of the backbone."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    vit.zero_grad()
    (output * weights.to(output.dtype)).sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in vit.named_parameters()
        if p.requires_grad
    }


def assert_same(a: Any, b: Any, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            scale = float(b[name].abs().max()) + 1.0
            error = float((a[name] - b[name]).abs().max()) / scale
            assert error <= tolerance, (name, error)
    else:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- An empty mask --------------------------------------------------------------------------------


@ANY_VARIANT
@ANY_REGIME
def test_without_a_mask_each_regime_is_timms_forward(regime: str, variant: str) -> None:
    chosen, vit = VARIANTS[variant], make_vit(variant).eval()
    # A model that timm built itself and that loads our weights: the state dict stays timm's.
    oracle = timm.create_model(
        chosen.backbone,
        img_size=chosen.size,
        in_chans=chosen.channels,
        num_classes=0,
        **SMALL | chosen.args,
    )
    oracle.load_state_dict(vit.state_dict(), strict=True)
    oracle = oracle.double().eval()
    images = make_images(vit, 2)
    with torch.no_grad():
        expected = oracle.forward_features(images)
        empty = PatchMask.empty(2, vit.patch_embed.num_patches)
        latents = make_regime(regime, vit)(vit, images, empty)
    assert expected.std() > 0.05
    torch.testing.assert_close(latents.tokens, expected, rtol=1e-12, atol=1e-12)
    assert latents.num_prefix == oracle.num_prefix_tokens
    assert latents.num_patches == oracle.patch_embed.num_patches


# --- What enters the first block -----------------------------------------------------------------


def tokens_entering(vit: Any, regime: Regime, mask: PatchMask) -> Tensor:
    seen: list[Tensor] = []
    hook = vit.blocks[0].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        regime(vit, make_images(vit), mask)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("variant", ["class token", "registers", "no_embed_class", "no prefix"])
def test_tokens_in_the_encoder(variant: str) -> None:
    vit = make_vit(variant)
    mask = mask_of(vit, "equal")
    prefix = vit.num_prefix_tokens
    with torch.no_grad():
        whole = vit._pos_embed(vit.patch_embed(make_images(vit)))  # timm's own (B, P + N, D)
    positions = vit.pos_embed[:, 0 if vit.no_embed_class else prefix :].expand(len(mask), -1, -1)
    hidden = mask.is_masked
    for name in REGIMES:
        regime = make_regime(name, vit)
        tokens = tokens_entering(vit, regime, mask)
        if name == "drop":
            assert tokens.shape[1] == prefix + mask.num_visible
            index = mask.visible_ids[..., None].expand(-1, -1, whole.shape[-1])
            expected = whole[:, prefix:].gather(1, index)  # by a convolution, not by products
            torch.testing.assert_close(tokens[:, prefix:], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(tokens[:, :prefix], whole[:, :prefix])
            assert regime.encoder_tokens(vit, mask.num_visible) == tokens.shape[1]
            continue
        assert tokens.shape == whole.shape
        assert regime.encoder_tokens(vit, mask.num_visible) == tokens.shape[1]
        patches = tokens[:, prefix:]
        if name.endswith("split"):  # stand as visible, then masked
            ids = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
            index = ids[..., None].expand_as(patches)
            patches = torch.zeros_like(patches).scatter(1, index, patches)
        assert torch.equal(patches[~hidden], whole[:, prefix:][~hidden])
        fill = torch.zeros(vit.embed_dim, dtype=torch.float64)
        if name == "token":
            fill = regime.mask_token[0, 0]  # type: ignore[union-attr,index]
        elif "pixels" in name:
            fill = vit.patch_embed.proj.bias  # what pixels of 0 embed to
        torch.testing.assert_close(patches[hidden], (positions + fill)[hidden], rtol=0, atol=1e-14)


# --- zero is drop where drop has tokens ----------------------------------------------------------


@ANY_COUNTS
@SOME_VARIANTS
@pytest.mark.parametrize("regime", MASKING_ZEROS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_zero_agrees_with_drop(dtype: torch.dtype, regime: str, variant: str, counts: str) -> None:
    vit = make_vit(variant, dtype)
    mask = mask_of(vit, counts)
    images = make_images(vit)
    dropped = at_visible(make_regime("drop", vit)(vit, images, mask), mask)
    expected = gradients(vit, dropped)
    zeroed = at_visible(make_regime(regime, vit)(vit, images, mask), mask)
    assert_same(zeroed, dropped, dtype)
    assert_same(gradients(vit, zeroed), expected, dtype)


@ANY_COUNTS
@SOME_VARIANTS
@pytest.mark.parametrize("at", ["pixels", "embedding"])
def test_dense_and_split_agree_everywhere(at: str, variant: str, counts: str) -> None:
    vit = make_vit(variant)
    mask = mask_of(vit, counts)
    images = make_images(vit)
    dense = make_regime(f"zero {at} dense", vit)(vit, images, mask).tokens
    expected = gradients(vit, dense)
    split = make_regime(f"zero {at} split", vit)(vit, images, mask).tokens
    assert_same(split, dense, torch.float64)
    assert_same(gradients(vit, split), expected, torch.float64)


@ANY_COUNTS
@ANY_REGIME
def test_checkpointing_changes_nothing_and_is_done(regime: str, counts: str) -> None:
    vit = make_vit("registers").train()
    mask = mask_of(vit, counts)
    images = make_images(vit)
    calls = [0]
    vit.blocks[0].norm1.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    plain = make_regime(regime, vit)(vit, images, mask).tokens
    expected = gradients(vit, plain)
    assert calls[0] == 1
    again = make_regime(regime, vit, checkpointing=True)(vit, images, mask).tokens
    assert_same(again, plain, torch.float64)
    assert_same(gradients(vit, again), expected, torch.float64)
    assert calls[0] == 3  # the block ran again in the backward pass


def test_the_ablation_is_not_drop() -> None:
    vit = make_vit()
    mask = mask_of(vit, "equal")
    images = make_images(vit)
    dropped = at_visible(make_regime("drop", vit)(vit, images, mask), mask)
    for at in ("pixels", "embedding"):
        attended = at_visible(make_regime(f"zero {at} attended", vit)(vit, images, mask), mask)
        assert (attended - dropped).abs().max() > 1e-3


def test_without_the_key_mask_masked_places_are_read() -> None:
    """The ablation lets visible tokens see position embeddings of masked patches, -inf does not."""
    vit = make_vit()
    mask = mask_of(vit, "equal")
    images = make_images(vit)
    moved = copy.deepcopy(vit)
    patch = int(mask.masked_ids[0, 0])
    # Not the same number throughout: norms would take it out again.
    moved.pos_embed.data[:, vit.num_prefix_tokens + patch, ::2] += 1.0
    for name in REGIMES:
        if name == "drop":
            continue
        regime = make_regime(name, vit)
        with torch.no_grad():
            before = regime(vit, images, mask).tokens[0]
            after = regime(moved, images, mask).tokens[0]
        changed = (before - after).abs().amax(-1) > 1e-9  # (P + N,)
        if name in MASKING_ZEROS:  # a masked patch is read by its own query alone
            assert changed.nonzero().flatten().tolist() == [vit.num_prefix_tokens + patch]
        else:
            assert changed.all()


# --- No leak -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [7.0, float("nan"), float("inf")])
@ANY_COUNTS
@ANY_REGIME
@pytest.mark.parametrize("variant", ["class token", "no prefix", "non-square", "RoPE mixed"])
def test_masked_pixels_change_no_latent(
    variant: str, regime: str, counts: str, value: float
) -> None:
    vit = make_vit(variant, torch.float32)
    mask = mask_of(vit, counts)
    images = make_images(vit)
    size = patch_size_of(vit)
    patches = patchify(images, size).masked_fill(mask.is_masked[..., None], value)
    altered = unpatchify(patches, size, grid_of(vit))
    assert not torch.equal(altered, images)
    module = make_regime(regime, vit)
    with torch.no_grad():
        before, after = (module(vit, x, mask).tokens for x in (images, altered))
    assert before.isfinite().all()
    assert torch.equal(before, after)  # bit for bit


@ANY_REGIME
def test_visible_pixels_do_change_the_latents(regime: str) -> None:
    vit = make_vit()
    mask = mask_of(vit, "equal")
    images = make_images(vit)
    module = make_regime(regime, vit)
    with torch.no_grad():
        before = module(vit, images, mask).tokens
        after = module(vit, make_images(vit, seed=1), mask).tokens
    assert ((before - after).abs().amax(-1) > 1e-6).all()


@ANY_REGIME
def test_an_image_does_not_depend_on_its_batch(regime: str) -> None:
    vit = make_vit()
    mask = mask_of(vit, "unequal")
    images = make_images(vit)
    module = make_regime(regime, vit)
    whole = at_visible(module(vit, images, mask), mask)
    for row in range(len(mask)):
        part = mask[row : row + 1]
        alone = at_visible(module(vit, images[row : row + 1], part), part)
        torch.testing.assert_close(
            whole[row : row + 1, : alone.shape[1]], alone, rtol=1e-10, atol=1e-10
        )


# --- Rows with every patch masked ----------------------------------------------------------------


@pytest.mark.parametrize("hidden", [[16, 16], [16, 3]], ids=["all rows", "one row"])
@ANY_REGIME
def test_a_fully_masked_row_is_finite_with_a_class_token(regime: str, hidden: list[int]) -> None:
    vit = make_vit()
    mask = make_mask(vit, hidden)
    tokens = make_regime(regime, vit)(vit, make_images(vit, 2), mask).tokens
    assert tokens.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(vit, tokens).values())


@pytest.mark.parametrize("hidden", [[16, 16], [16, 3]], ids=["all rows", "one row"])
@pytest.mark.parametrize("regime", ["drop", *MASKING_ZEROS])
def test_a_fully_masked_row_without_prefix_is_refused(regime: str, hidden: list[int]) -> None:
    vit = make_vit("no prefix")
    with pytest.raises(UserError, match=r"mask.*every patch.*masked.*no prefix token"):
        make_regime(regime, vit)(vit, make_images(vit, 2), make_mask(vit, hidden))


# --- The rest ------------------------------------------------------------------------------------


def test_place_tokens_by_hand() -> None:
    tokens = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    ids = torch.tensor([[2, 0], [1, 0]])
    fill = torch.tensor([[[-1.0], [-2.0], [-3.0]]]).expand(2, -1, -1)
    placed = scatter_tokens(tokens, ids, None, fill)
    assert placed[..., 0].tolist() == [[2, -2, 1], [4, 3, -3]]
    valid = torch.tensor([[True, True], [True, False]])  # padding goes nowhere
    placed = scatter_tokens(tokens, ids, valid, fill)
    assert placed[..., 0].tolist() == [[2, -2, 1], [-1, 3, -3]]


@pytest.mark.parametrize("variant", ROTARY)
def test_each_patch_keeps_its_own_rotation(variant: str) -> None:
    """Without learned positions only rotation tells places apart: a swap must be seen."""
    vit = make_vit(variant)
    if vit.pos_embed is not None:
        vit.pos_embed.data.zero_()
    (rows, columns), mask = grid_of(vit), mask_of(vit, "equal")
    images = make_images(vit)
    drop = make_regime("drop", vit)
    expected = drop(vit, images, mask)
    # The same visible patches at other places: the image and its mask turned upside down.
    size = patch_size_of(vit)
    turned = torch.arange(rows * columns).flip(0)
    moved = unpatchify(patchify(images, size)[:, turned], size, (rows, columns))
    got = drop(vit, moved, PatchMask(mask.is_masked[:, turned]))
    assert torch.equal(got.patch_ids.flip(1), rows * columns - 1 - expected.patch_ids)
    assert (got.patches.flip(1) - expected.patches).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("backbone", "args", "kind"),
    [
        ("eva02_tiny_patch14_224", {"use_post_norm": True}, "EvaBlockPostNorm"),
        ("vit_small_patch16_18x2_224", {}, "ParallelThingsBlock"),
    ],
)
def test_split_needs_plain_blocks(backbone: str, args: dict[str, Any], kind: str) -> None:
    vit = build_backbone(ModelConfig(backbone, {**SMALL, **args}), (16, 16), 3).double()
    assert not supports_split(vit)
    with pytest.raises(UserError, match=rf"zero\.attention: 'split'.*{kind}.*choose dense"):
        make_regime("zero pixels split", vit)
    mask, images = mask_of(vit, "unequal"), make_images(vit)
    dropped = at_visible(make_regime("drop", vit)(vit, images, mask), mask)
    zeroed = at_visible(make_regime("zero pixels dense", vit)(vit, images, mask), mask)
    assert_same(zeroed, dropped, torch.float64)


def test_the_mask_token_follows_from_the_seed() -> None:
    vit = make_vit()
    tokens = [build_regime(REGIMES["token"], vit, seed).mask_token for seed in (0, 0, 1)]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])  # type: ignore[arg-type]


def test_an_unknown_regime_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model\.regime\.name: 'mask' is not one of drop, token, zero"
    ):
        build_regime(RegimeConfig("mask"), make_vit())
