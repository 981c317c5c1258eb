"""Weights of each family: every key accounted for, and the function the original computes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from layouts_by_hand import (
    block,
    embed,
    encoder_shapes,
    fill,
    mae,
    mae_shapes,
    norm,
    simmim,
)
from safetensors.torch import save_file
from torch import Tensor

from mim.interop import convert, export_run, import_model, import_run, to_hf, to_mae, to_timm
from mim.masks import PatchMask, sample_masks
from mim.training import checkpoint

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

Store = Callable[..., Path]
Small = dict[str, Any]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def mask_of(model: Any, count: int = 3) -> PatchMask:
    from mim.core.config import MaskConfig

    config = MaskConfig(ratio=0.75)
    return sample_masks(config, model.grid, seed=5, epoch=0, sample_ids=list(range(count)))


def layers(model: Any, call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What a call returns, and what each block of the encoder gave during it."""
    outputs: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda module, args, out: outputs.append(out))
        for part in model.backbone.blocks
    ]
    try:
        return call(), outputs
    finally:
        for hook in hooks:
            hook.remove()


def accounted(account: Any, keys: set[str]) -> None:
    """Each key of the file stands in the account exactly once."""
    named = [entry.key for entry in account.entries]
    assert sorted(named) == sorted(keys)
    for entry in account.entries:
        assert (entry.outcome == "left out") == (not entry.target), entry
        assert bool(entry.note) == (entry.outcome != "loaded"), entry


# --- facebookresearch/mae -------------------------------------------------------------------------


@pytest.mark.parametrize("normalized", [False, True], ids=["pixels", "normalized"])
def test_mae_with_decoder(normalized: bool, store: Store, small: Small, images: Tensor) -> None:
    state = fill(mae_shapes())
    arguments = argparse.Namespace(norm_pix_loss=normalized, mask_ratio=0.6, input_size=16)
    content = {"model": state, "optimizer": {"step": 3}, "epoch": 7, "args": arguments}
    imported = import_model(store(content), small)
    accounted(imported.account, {*state, "optimizer", "epoch", "args"})
    assert imported.account.left_out == ("optimizer", "epoch", "args")
    assert not imported.account.initial and imported.has_decoder
    assert imported.account.family == "facebookresearch/mae with decoder"
    assert imported.config.mask.ratio == 0.6

    model = imported.model.double()
    mask = mask_of(model)
    leaves = {k: v.double().requires_grad_() for k, v in state.items()}
    wanted = mae(leaves, images, mask.is_masked, 3, 4, normalized)
    output, features = layers(model, lambda: model(images, mask))
    for depth, tokens in enumerate(features):
        torch.testing.assert_close(tokens, wanted[f"layer{depth}"], **EXACT)
    torch.testing.assert_close(output.prediction, wanted["prediction"], **EXACT)
    torch.testing.assert_close(output.loss, wanted["loss"], **EXACT)

    wanted["loss"].backward()
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    compared = 0
    for name, gradient in to_mae(gradients).items():
        torch.testing.assert_close(gradient, leaves[name].grad, **EXACT)
        compared += 1
    assert compared == len(state) - 1, "all but the decoder's fixed positions"


def test_mae_layout_there_and_back(store: Store, small: Small, tmp_path: Path) -> None:
    state = fill(mae_shapes())
    run = tmp_path / "run"
    import_run(store({"model": state}), run, small)
    back = tmp_path / "back.pth"
    export_run(run, "mae", back)
    again = torch.load(back, weights_only=True)["model"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_mae_encoder_only(store: Store, small: Small, images: Tensor) -> None:
    state = fill(encoder_shapes())
    imported = import_model(store({"model": state}), small)
    accounted(imported.account, {*state})
    assert {key.partition(".")[0] for key in imported.account.initial} == {"decoder"}
    assert not imported.has_decoder
    model, double = imported.model.double(), {k: v.double() for k, v in state.items()}
    first = (double["cls_token"] + double["pos_embed"][:, :1]).expand(3, -1, -1)
    x = torch.cat([first, embed(double, images) + double["pos_embed"][:, 1:]], dim=1)
    for i in range(2):
        x = block(double, f"blocks.{i}", x, 3)
    torch.testing.assert_close(model.encode(images), norm(double, "norm", x), **EXACT)


def test_mae_fine_tuned(store: Store, small: Small, images: Tensor) -> None:
    """Its norm stands behind the pooling, and its head is left out by name."""
    shapes = encoder_shapes()
    del shapes["norm.weight"], shapes["norm.bias"]
    shapes |= {"fc_norm.weight": (24,), "fc_norm.bias": (24,)}
    shapes |= {"head.weight": (10, 24), "head.bias": (10,)}
    state = fill(shapes)
    imported = import_model(store({"model": state}), small)
    accounted(imported.account, {*state})
    assert imported.account.left_out == ("head.weight", "head.bias")
    model, double = imported.model.double(), {k: v.double() for k, v in state.items()}
    first = (double["cls_token"] + double["pos_embed"][:, :1]).expand(3, -1, -1)
    x = torch.cat([first, embed(double, images) + double["pos_embed"][:, 1:]], dim=1)
    for i in range(2):
        x = block(double, f"blocks.{i}", x, 3)
    import mim

    features = norm(double, "fc_norm", x[:, 1:].mean(1))
    torch.testing.assert_close(mim.encode(model, images), features, **EXACT)


def test_published_positions_are_seen_as_fixed(store: Store, small: Small) -> None:
    """MAE's sines and cosines, columns first, by their formula; others are learned."""
    state = fill(encoder_shapes())
    assert import_model(store(state), small).config.model.position_embedding == "learned"
    frequency = 10000.0 ** -(torch.arange(6) / 6)
    rows = []
    for row in range(4):
        for column in range(4):
            by_column, by_row = column * frequency, row * frequency
            angles = [by_column.sin(), by_column.cos(), by_row.sin(), by_row.cos()]
            rows.append(torch.cat(angles))
    state["pos_embed"] = torch.cat([torch.zeros(1, 24), torch.stack(rows)])[None]
    imported = import_model(store(state), small)
    assert imported.config.model.position_embedding == "sincos2d"
    assert torch.equal(imported.model.backbone.pos_embed, state["pos_embed"])
    assert not imported.model.backbone.pos_embed.requires_grad


# --- Hugging Face ---------------------------------------------------------------------------------


def vitmae(normalized: bool = True, **changes: Any) -> Any:
    config = transformers.ViTMAEConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        decoder_num_attention_heads=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_intermediate_size=64,
        norm_pix_loss=normalized,
        attn_implementation="sdpa",
        **changes,
    )
    return shaken(transformers.ViTMAEForPreTraining(config))


def shaken(model: Any) -> Any:
    """Random values everywhere: a fresh ViTMAE has zeros for positions and is blind to them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def noise_of(mask: PatchMask) -> Tensor:
    """What their argsort turns into our mask."""
    order = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
    return order.argsort(dim=1).double() / mask.num_patches


@pytest.mark.parametrize("eps", [1e-6, 1e-12, 1e-3])
@pytest.mark.parametrize("normalized", [False, True], ids=["pixels", "normalized"])
def test_vitmae(normalized: bool, eps: float, tmp_path: Path, images: Tensor) -> None:
    oracle = vitmae(normalized, layer_norm_eps=eps)
    oracle.save_pretrained(tmp_path / "hf")
    imported = import_model(tmp_path / "hf")
    assert not imported.account.initial and not imported.account.left_out
    model, oracle = imported.model.double(), oracle.double()
    mask = mask_of(model)
    expected = oracle(images, noise=noise_of(mask), output_hidden_states=True)
    output, features = layers(model, lambda: model(images, mask))
    torch.testing.assert_close(output.loss, expected.loss, **EXACT)
    torch.testing.assert_close(output.prediction, expected.logits, **EXACT)
    for mine, theirs in zip(features, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)
    output.loss.backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    theirs = convert(gradients | _missing(oracle, gradients)).state
    own = dict(model.named_parameters())
    compared = 0
    for name, gradient in theirs.items():
        if own[name].requires_grad and own[name].grad is not None:
            mine = own[name].grad
            if "pos_embed" in name:
                continue
            torch.testing.assert_close(mine, gradient, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared == len(theirs) - 2


def _missing(oracle: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(value)
        for name, value in oracle.state_dict().items()
        if name not in gradients
    }


def test_both_generations_of_names(tmp_path: Path, store: Store, small: Small) -> None:
    """What transformers 4 wrote to the hub, what 5 writes, and what it holds in memory."""
    oracle = vitmae(layer_norm_eps=1e-6)
    oracle.save_pretrained(tmp_path / "hf")
    new = import_model(store(oracle.state_dict()), {**small, "model.norm_eps": 1e-6})
    written = import_model(tmp_path / "hf")
    hub = import_model(store(to_hf(written.model.state_dict(), model=True)), small)
    for other in (written, hub):
        for key, value in new.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[key]), key
    assert any("layer_norm_eps" in note for note in hub.account.notes)
    mixed = to_hf(written.model.state_dict(), model=True)
    for name, value in oracle.state_dict().items():
        if name.startswith("vit.layers.1."):
            mixed[name] = value
    for name in [n for n in mixed if n.startswith("vit.encoder.layer.1.")]:
        del mixed[name]
    from mim.core.errors import UserError

    with pytest.raises(UserError, match="mixed key styles"):
        import_model(store(mixed), small)


def test_vit_for_masked_image_modeling(tmp_path: Path, images: Tensor) -> None:
    """Hugging Face's SimMIM: image, loss and features, under our mask."""
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=16, patch_size=4, encoder_stride=4, attn_implementation="sdpa",
    )  # fmt: skip
    oracle = shaken(transformers.ViTForMaskedImageModeling(config))
    oracle.save_pretrained(tmp_path / "hf")
    imported = import_model(tmp_path / "hf")
    assert imported.config.model.regime.name == "token"
    assert imported.config.model.decoder.name == "linear"
    assert not imported.account.initial and not imported.account.left_out
    model, oracle = imported.model.double(), oracle.double()
    mask = mask_of(model)
    expected = oracle(images, bool_masked_pos=mask.is_masked)
    output = model(images, mask)
    from mim.core.patches import unpatchify

    drawn = unpatchify(output.prediction, (4, 4), (4, 4))
    torch.testing.assert_close(drawn, expected.reconstruction, **EXACT)
    # They divide by the count of hidden pixels and 1e-5 more, which float32 does not hold.
    torch.testing.assert_close(output.loss, expected.loss, **EXACT)


@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_face_dinov2(registers: int, tmp_path: Path, images: Tensor) -> None:
    kind, settings = transformers.Dinov2Model, transformers.Dinov2Config
    more = {}
    if registers:
        kind = transformers.Dinov2WithRegistersModel
        settings = transformers.Dinov2WithRegistersConfig
        more = {"num_register_tokens": registers}
    config = settings(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4,
        attn_implementation="sdpa", **more,
    )  # fmt: skip
    oracle = shaken(kind(config))
    oracle.save_pretrained(tmp_path / "hf")
    imported = import_model(tmp_path / "hf")
    assert imported.account.left_out == ("embeddings.mask_token",)
    expected = oracle.double()(images).last_hidden_state
    tokens = imported.model.double().encode(images)
    torch.testing.assert_close(tokens, expected, **EXACT)
    assert tokens.shape[1] == 1 + registers + 16


@pytest.mark.parametrize("name", ["ViTForImageClassification", "DeiTModel", "ViTModel"])
def test_hugging_face_vit(name: str, tmp_path: Path, images: Tensor) -> None:
    """Its encoder; classifier and pooler are left out by name."""
    settings = transformers.DeiTConfig if name == "DeiTModel" else transformers.ViTConfig
    config = settings(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        image_size=16, patch_size=4, attn_implementation="sdpa",
    )  # fmt: skip
    oracle = shaken(getattr(transformers, name)(config))
    oracle.save_pretrained(tmp_path / "hf")
    imported = import_model(tmp_path / "hf")
    head = "classifier" if "Classification" in name else "pooler.dense"
    assert set(imported.account.left_out) == {f"{head}.weight", f"{head}.bias"}
    encoder = (oracle.vit if "Classification" in name else oracle).double()
    expected = encoder(images).last_hidden_state
    torch.testing.assert_close(imported.model.double().encode(images), expected, **EXACT)


# --- SimMIM, DINOv2, DeiT, timm -------------------------------------------------------------------


def simmim_state(scaled: bool = True) -> dict[str, Tensor]:
    shapes = encoder_shapes() | {"mask_token": (1, 1, 24)}
    for i in range(2):
        del shapes[f"blocks.{i}.attn.qkv.bias"]
        shapes |= {f"blocks.{i}.attn.{x}_bias": (24,) for x in "qv"}
        if scaled:
            shapes |= {f"blocks.{i}.gamma_{x}": (24,) for x in "12"}
    shapes = {f"encoder.{key}": shape for key, shape in shapes.items()}
    return fill(shapes | {"decoder.0.weight": (48, 24, 1, 1), "decoder.0.bias": (48,)})


@pytest.mark.parametrize("scaled", [True, False])
def test_simmim(scaled: bool, store: Store, small: Small, images: Tensor) -> None:
    state = simmim_state(scaled)
    imported = import_model(store({"model": state, "epoch": 3}), small)
    accounted(imported.account, {*state, "epoch"})
    assert not imported.account.initial
    model = imported.model.double()
    mask = mask_of(model)
    leaves = {k: v.double().requires_grad_() for k, v in state.items()}
    wanted = simmim(leaves, images, mask.is_masked, 3)
    output, features = layers(model, lambda: model(images, mask))
    for depth, tokens in enumerate(features):
        torch.testing.assert_close(tokens, wanted[f"layer{depth}"], **EXACT)
    from mim.core.patches import unpatchify

    drawn = unpatchify(output.prediction, (4, 4), (4, 4))
    torch.testing.assert_close(drawn, wanted["image"], **EXACT)
    torch.testing.assert_close(output.loss, wanted["loss"], **EXACT)
    output.loss.backward()
    wanted["loss"].backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    theirs = convert({k: v.grad for k, v in leaves.items()}).state
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        got = mine[name].clone()
        if name.endswith("qkv.bias"):
            got[24:48] = 0  # our keys have a bias, whose gradient is rounding
        torch.testing.assert_close(got, gradient, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def dinov2_layout(state: dict[str, Tensor], chunks: bool) -> dict[str, Tensor]:
    """timm's DINOv2 under facebookresearch/dinov2's keys."""
    found = {"mask_token": torch.ones(1, 24)}
    for key, value in state.items():
        name = key
        if chunks and key.startswith("blocks."):
            name = key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // 2}.")
        found[name] = value
    if "reg_token" in found:
        found["register_tokens"] = found.pop("reg_token")
        found["pos_embed"] = torch.cat([torch.randn(1, 1, 24), found["pos_embed"]], dim=1)
        found["cls_token"] = found["cls_token"] - found["pos_embed"][:, :1]
    return found


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2(name: str, chunks: bool, store: Store, small: Small) -> None:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
    original = shaken(timm.create_model(name, num_classes=0, **size))
    state = dinov2_layout(original.state_dict(), chunks)
    content: dict[str, Any] = state
    if chunks:  # a training file: the teacher, its heads, and nothing else of the run
        teacher = {f"backbone.{key}": value for key, value in state.items()}
        content = {"teacher": teacher | {"dino_head.mlp.0.weight": torch.ones(2, 2)}}
    imported = import_model(store(content), small)
    assert imported.account.family == "DINOv2"
    assert "mask_token" in imported.account.left_out
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        mine, theirs = imported.model.encode(images), original.forward_features(images)
    # Taking a position from the class token and adding it again rounds.
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    if "reg" not in name:
        assert torch.equal(mine, theirs)
        assert not imported.account.of("adapted")
    else:
        assert {e.key for e in imported.account.of("adapted")} == {"pos_embed"}
        # Under timm's own name the class token takes its position in.
        given = {**size_settings(size), **small, "data.image_size": 16}
        named = import_model(store(content), given, backbone=name)
        assert {e.key for e in named.account.of("adapted")} >= {"cls_token", "pos_embed"}
        with torch.no_grad():
            torch.testing.assert_close(named.model.encode(images), theirs, rtol=1e-5, atol=1e-5)


def test_swiglu_keys() -> None:
    """DINOv2's giant: both halves of the gated MLP in one matrix, as in timm."""
    state = fill(encoder_shapes()) | {"mask_token": torch.ones(1, 24)}
    for i in range(2):
        for a, b, shape in (("fc1", "w12", (128, 24)), ("fc2", "w3", (24, 64))):
            del state[f"blocks.{i}.mlp.{a}.weight"], state[f"blocks.{i}.mlp.{a}.bias"]
            state[f"blocks.{i}.mlp.{b}.weight"] = torch.randn(shape)
            state[f"blocks.{i}.mlp.{b}.bias"] = torch.randn(shape[0])
    found = convert(state).state
    assert torch.equal(found["backbone.blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.w12.weight"])
    assert torch.equal(found["backbone.blocks.1.mlp.fc2.bias"], state["blocks.1.mlp.w3.bias"])


TIMM = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_tiny_patch16_224": {"reg_tokens": 2},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_rpn_224": {"class_token": True, "global_pool": "token"},
    "vit_small_patch16_224": {"global_pool": "avg"},
    "vit_base_patch16_224": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "vit_medium_patch16_gap_240": {},
    "vit_giant_patch14_dinov2": {},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, store: Store, small: Small) -> None:
    """Bit for bit what timm computes, told from the weights alone where they can tell."""
    more = TIMM[name]
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    original = shaken(timm.create_model(name, num_classes=7, **size, **more))
    path = store({"state_dict": {f"module.{k}": v for k, v in original.state_dict().items()}})
    if "clip" in name or "rpn" in name:  # weights do not show an activation or an order of norms
        given = {f"model.backbone_args.{key}": value for key, value in more.items()}
        given |= {**size_settings(size), **small}
        imported = import_model(path, given, backbone=name)
    else:
        imported = import_model(path, small)
    accounted(imported.account, {*original.state_dict(), *imported.account.left_out})
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(imported.model.encode(images), original.forward_features(images))


def test_timm_folders_name_their_model(tmp_path: Path) -> None:
    """As timm saves for the hub: name, arguments and normalisation in ``config.json``."""
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    name = "vit_base_patch16_clip_224"
    original = shaken(timm.create_model(name, num_classes=0, **size))
    timm.models.save_for_hf(original, str(tmp_path), model_args=size)
    imported = import_model(tmp_path)
    assert imported.config.model.backbone == name
    assert imported.config.data.mean == original.pretrained_cfg["mean"]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(imported.model.encode(images), original.forward_features(images))


def test_a_config_with_a_byte_order_mark(tmp_path: Path) -> None:
    args = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=8, **args)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    text = json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": args})
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    assert import_model(tmp_path).config.model.backbone_args["num_heads"] == 2


def test_a_teacher_begins_as_the_imported_encoder(store: Store, small: Small) -> None:
    given = {**small, "model.target.name": "ema_features"}
    model = import_model(store(fill(encoder_shapes())), given).model
    mine, theirs = model.backbone.state_dict(), model.teacher.encoder.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_files_in_parts(tmp_path: Path) -> None:
    oracle = vitmae()
    oracle.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    oracle.save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    parts, whole = (import_model(tmp_path / name) for name in ("parts", "whole"))
    wanted = whole.model.state_dict()
    for key, value in parts.model.state_dict().items():
        assert torch.equal(value, wanted[key])
    from mim.core.errors import UserError

    next((tmp_path / "parts").glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match="is not in its folder"):
        import_model(tmp_path / "parts")


def test_a_checkpoint_of_our_own(tmp_path: Path, tiny: Callable[..., Path], mim: Any) -> None:
    """It says all there is to say, the regime too."""
    run, back = tmp_path / "run", tmp_path / "back"
    changes = {"model.regime.name": "token", "model.decoder.name": "linear"}
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    path = checkpoint.checkpoints(run)[-1]
    assert mim("import", path, "--output", back).code == 0
    import mim as package

    first, again = package.load(run).state_dict(), package.load(back).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert checkpoint.read_config(back).model == checkpoint.read_config(run).model


def size_settings(size: dict[str, Any]) -> dict[str, Any]:
    names = ("patch_size", "embed_dim", "depth")
    return {f"model.backbone_args.{key}": size[key] for key in names}


def test_heads_by_size_by_name_or_not_at_all(store: Store) -> None:
    from mim.core.errors import UserError

    plain = store(timm.create_model("vit_small_patch16_224", depth=12).state_dict())
    imported = import_model(plain, {"data.image_size": 32})
    assert imported.config.model.backbone == "vit_small_patch16_224"
    assert not imported.config.model.backbone_args
    with pytest.raises(UserError, match="num_heads"):
        import_model(store(fill(encoder_shapes())))
    with pytest.raises(UserError, match=r"decoder\.transformer\.heads"):
        import_model(store(fill(mae_shapes())), {"model.backbone_args.num_heads": 3})


# --- a run folder that every verb takes -----------------------------------------------------------


def test_round_trip_through_timm_and_hugging_face(
    tmp_path: Path, tiny: Callable[..., Path], mim: Any
) -> None:
    """Ours to others and back: the same bits, and the same features."""
    run = tmp_path / "run"
    changes = {"data.channels": 3, "data.source": "photos", "data.image_size": 8}
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    import mim as package

    first = package.load(run).state_dict()
    for to, name, part in (
        ("timm", "t.safetensors", "encoder"),
        ("safetensors", "s.safetensors", "model"),
        ("hf", "hf", "model"),
        ("hf", "hfe", "encoder"),
        ("mae", "m.pth", "model"),
    ):
        path = tmp_path / name
        assert mim("export", run, "--to", to, "--output", path, *part_of(to, part)).code == 0
        back = tmp_path / f"back_{name.partition('.')[0]}"
        heads = ["--model.backbone_args.num_heads", 2, "--model.decoder.transformer.heads", 2]
        more = heads if to == "mae" else []
        outcome = mim("import", path, "--output", back, *more)
        assert outcome.code == 0, outcome.err
        again = package.load(back).state_dict()
        names = [k for k in first if part == "model" or k.startswith("backbone.")]
        assert all(torch.equal(first[key], again[key]) for key in names), to
        assert part == "encoder" or again.keys() == first.keys()
        initial = json.loads((back / "import.json").read_text())["initial"]
        assert bool(initial) == (part == "encoder")
        if to == "safetensors":
            was, now = checkpoint.read_config(run), checkpoint.read_config(back)
            assert was.model == now.model and was.mask == now.mask
            assert now.data.mean is not None


def part_of(to: str, part: str) -> list[str]:
    return [] if to == "timm" else ["--part", part]


def test_every_verb_takes_an_import(tmp_path: Path, store: Store, small: Small, mim: Any) -> None:
    path, run = store({"model": fill(mae_shapes())}), tmp_path / "run"
    heads = [f"--{key}={value}" for key, value in small.items()]
    data = ["--data.source", "photos", "--data.batch_size", 64, "--log.tensorboard", "false"]
    train = ["--train.max_steps", 2, "--optim.warmup_epochs", 0.01]
    outcome = mim("import", path, "--output", run, *heads, *data, *train)
    assert outcome.code == 0, outcome.err
    assert "62 loaded, 0 adapted, 0 left out" in outcome.out
    assert (
        mim("evaluate", "knn", run, "--set", "k=[5]", "few_shot=[]", "temperature=[0.1]").code == 0
    )
    result = checkpoint.read_result(run)
    assert result["imported"]["family"] == "facebookresearch/mae with decoder"
    assert result["evaluations"]["knn"]
    assert mim("visualize", "masks", run, "--images", 1).code == 0
    assert mim("visualize", "reconstruct", run, "--images", 1).code == 0
    assert mim("export", run, "--output", tmp_path / "e.safetensors").code == 0
    before = checkpoint.encoder_weights(run)
    outcome = mim("pretrain", "--config", run / "config.yaml", "--resume", "auto")
    assert outcome.code == 0, outcome.err
    after = checkpoint.encoder_weights(run)
    moved = [(after[k] - before[k]).abs().max().item() for k in before if "pos_embed" not in k]
    assert 0 < max(moved) < 0.1, "it went on from the imported weights"
    assert "2 steps" in outcome.out
    assert "already holds a run" in mim("import", path, "--output", run, *heads).line


def test_an_encoder_alone_predicts_nothing(
    tmp_path: Path, store: Store, small: Small, mim: Any
) -> None:
    path, run = store(fill(encoder_shapes())), tmp_path / "run"
    import_run(path, run, {**small, "data.source": "photos"})
    assert "without a decoder" in mim("visualize", "reconstruct", run).line
    assert mim("visualize", "masks", run, "--images", 1).code == 0
    assert (
        "--part encoder"
        in mim("export", run, "--to", "hf", "--part", "model", "--output", tmp_path / "hf").line
    )


def test_to_timm_takes_the_encoder_alone() -> None:
    state = {"backbone.norm.weight": torch.ones(2), "decoder.norm.weight": torch.zeros(2)}
    assert to_timm(state).keys() == {"norm.weight"}


def test_an_import_that_was_killed_is_done_again(
    store: Store, tmp_path: Path, mim: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had written, the same call goes on, and an imported run is still refused."""
    file = store(fill(mae_shapes()))
    heads = ["--model.backbone_args.num_heads", "3", "--model.decoder.transformer.heads", "4"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert mim("import", file, "--output", whole, *heads).code == 0

    class Killed(BaseException):
        """What ends a process in a test."""

    for name in ("write_config", "save_checkpoint", "save_encoder"):
        with monkeypatch.context() as patch:

            def die(*_: object) -> None:
                raise Killed

            patch.setattr(f"mim.training.checkpoint.{name}", die)
            with pytest.raises(Killed):
                mim("import", file, "--output", half, *heads)
        assert not (half / "result.json").exists()
    assert mim("import", file, "--output", half, *heads).code == 0
    names = [{p.relative_to(run) for p in run.rglob("*")} for run in (whole, half)]
    assert names[0] == names[1]
    one, other = (checkpoint.encoder_weights(run) for run in (whole, half))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    again = mim("import", file, "--output", half, *heads)
    assert again.code == 2 and "already holds a run" in again.line
