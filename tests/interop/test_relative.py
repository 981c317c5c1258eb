"""Weights with relative position bias: SimMIM's ViT and Swin, BEiT and timm's Swin."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from layouts_by_hand import encoder_shapes, fill, simmim, simmim_swin, swin_shapes
from torch import Tensor

from mim.core.errors import UserError
from mim.core.patches import unpatchify
from mim.core.recipes import recipe_file
from mim.core.settings import read_mapping
from mim.interop import convert, import_model, import_run
from mim.masks import sample_masks
from mim.model import build_model
from mim.training import checkpoint
from mim.training.optim import build_optimizer, build_schedule
from mim.training.settings import load_config

Store = Callable[..., Path]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
TABLE = "relative_position_bias_table"


def vit_state(shared: bool, prefix: str = "encoder.") -> dict[str, Tensor]:
    """SimMIM's ViT: one bias for all blocks when it is pre-trained, one for each afterwards."""
    shapes = encoder_shapes() | {"mask_token": (1, 1, 24)}
    del shapes["pos_embed"]
    if shared:
        shapes[f"rel_pos_bias.{TABLE}"] = (52, 3)
    for i in range(2):
        del shapes[f"blocks.{i}.attn.qkv.bias"]
        shapes |= {f"blocks.{i}.attn.{x}_bias": (24,) for x in "qv"}
        shapes |= {f"blocks.{i}.gamma_{x}": (24,) for x in "12"}
        if not shared:
            shapes[f"blocks.{i}.attn.{TABLE}"] = (52, 3)
    shapes = {f"{prefix}{key}": shape for key, shape in shapes.items()}
    return fill(shapes | {"decoder.0.weight": (48, 24, 1, 1), "decoder.0.bias": (48,)})


def compare(imported: Any, wanted: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> None:
    """Loss and drawn image, under a mask that hides what ``wanted`` is told."""
    model = imported.model.double()
    mask = sample_masks(imported.config.mask, model.grid, seed=5, epoch=0, sample_ids=[0, 1, 2])
    found = wanted(mask.is_masked)
    output = model(images, mask)
    drawn = unpatchify(output.prediction, model.grid, model.patch_size)
    torch.testing.assert_close(drawn, found["image"], **EXACT)
    torch.testing.assert_close(output.loss, found["loss"], **EXACT)


@pytest.mark.parametrize("shared", [True, False])
def test_simmim_s_vit(shared: bool, store: Store, images: Tensor) -> None:
    state = vit_state(shared)
    index = {"encoder.rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    imported = import_model(store({"model": state | index, "epoch": 3}))
    assert not imported.account.initial and imported.account.family == "SimMIM"
    assert set(imported.account.left_out) == {*index, "epoch"}
    assert imported.config.model.backbone_args["num_heads"] == 3
    assert imported.config.data.image_size == 16
    double = {key: value.double() for key, value in state.items()}
    compare(imported, lambda hidden: simmim(double, images, hidden, 3), images)


def swin_file() -> dict[str, Tensor]:
    """With the buffers that SimMIM stores, which show the size of the images: four windows."""
    state = fill(swin_shapes())
    state["encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    state["encoder.layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16).long()
    return state


def test_simmim_s_swin(store: Store, images: Tensor) -> None:
    state = swin_file()
    imported = import_model(store({"model": state}))
    assert not imported.account.initial and imported.account.family == "SimMIM"
    assert len(imported.account.left_out) == 2
    assert imported.config.model.backbone.startswith("swin_")
    assert imported.config.model.backbone_args["window_size"] == 4
    assert imported.config.data.image_size == 16
    double = {key: value.double() for key, value in state.items()}
    compare(imported, lambda hidden: simmim_swin(double, images, hidden), images)


def test_its_own_config_is_read_and_not_run(store: Store, monkeypatch: Any) -> None:
    """SimMIM's checkpoints hold a node of yacs, a mapping."""

    class CfgNode(dict[str, Any]):
        """As yacs's: a mapping with attributes."""

        def __init__(self, values: dict[str, Any]) -> None:
            super().__init__(values)
            self.__dict__["__immutable__"] = True

    module = types.ModuleType("yacs.config")
    monkeypatch.setattr(module, "CfgNode", CfgNode, raising=False)
    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    state = {k: v for k, v in swin_file().items() if "attn_mask" not in k}
    config = CfgNode({"DATA": CfgNode({"IMG_SIZE": 32, "MASK_RATIO": 0.6})})
    path = store({"model": state, "config": config, "epoch": 99})
    monkeypatch.delitem(sys.modules, "yacs.config")
    monkeypatch.delitem(sys.modules, "yacs")
    imported = import_model(path)
    assert imported.config.data.image_size == 32 and imported.config.mask.ratio == 0.6
    assert set(imported.account.left_out) >= {"config", "epoch"}


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm_s_own(name: str, store: Store) -> None:
    size: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4}
    if "swin" in name:
        size = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "patch_size": 2}
        size["window_size"] = 4
    original = shaken(timm.create_model(name, num_classes=7, img_size=16, **size))
    imported = import_model(store(original.state_dict()), {"data.image_size": 16})
    assert all("head." in key for key in imported.account.left_out)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        mine, theirs = imported.model.encode(pixels), original.forward_features(pixels)
    assert torch.equal(mine, theirs if "beit" in name else theirs.flatten(1, 2))


def test_tables_are_resampled_to_another_grid(store: Store) -> None:
    """As timm resamples them; a constant bias stays what it is."""
    state = vit_state(shared=True)
    table = state[f"encoder.rel_pos_bias.{TABLE}"]
    table[:] = torch.tensor([1.0, 2.0, 3.0])
    imported = import_model(store(state), {"data.image_size": 32})
    found = imported.model.backbone.rel_pos_bias.relative_position_bias_table
    torch.testing.assert_close(found.detach(), table[:1].expand(15 * 15 + 3, 3))
    assert [e.key for e in imported.account.of("adapted")] == [f"encoder.rel_pos_bias.{TABLE}"]
    windows = import_model(store(swin_file()), {"model.backbone_args.window_size": 2})
    assert {e.target.split(".")[-1] for e in windows.account.of("adapted")} == {TABLE}


def test_what_is_not_whole_is_refused(store: Store) -> None:
    state = swin_file()
    reasons = {
        "layers.1.blocks.0.": r"not whole: its blocks are 0\.0, 0\.1, 1\.1",
        f"layers.0.blocks.0.attn.{TABLE}": "it lacks backbone",
        "patch_embed.norm.bias": "it lacks backbone",
    }
    for part, reason in reasons.items():
        lacking = {k: v for k, v in state.items() if not k.startswith(f"encoder.{part}")}
        with pytest.raises(UserError, match=reason):
            import_model(store(lacking))
    lacking = {k: v for k, v in state.items() if not ("layers.1." in k and TABLE in k)}
    with pytest.raises(UserError, match="it lacks each"):
        import_model(store(lacking))
    beit = vit_state(shared=False)
    del beit[f"encoder.blocks.1.attn.{TABLE}"]
    with pytest.raises(UserError, match="it lacks"):
        import_model(store(beit))


def test_an_imported_run_goes_on(tmp_path: Path, store: Store, mim: Any) -> None:
    for name, state in (("vit", vit_state(shared=True)), ("swin", swin_file())):
        run = tmp_path / name
        given = {"data.source": "photos", "data.batch_size": 64, "train.max_steps": 2}
        import_run(store({"model": state}), run, given)
        before = checkpoint.encoder_weights(run)
        outcome = mim("pretrain", "--config", run / "config.yaml", "--resume", "auto")
        assert outcome.code == 0, outcome.err
        after = checkpoint.encoder_weights(run)
        assert 0 < max((after[k] - before[k]).abs().max() for k in before) < 0.1
        outcome = mim("evaluate", "knn", run, "--set", "k=[5]", "few_shot=[]", "pool=mean")
        assert outcome.code == 0, outcome.err


def simmim_rate(step: int, multistep: bool) -> float:
    """For 2,048 images and one step an epoch, by SimMIM's two schedules."""
    if multistep:  # 1e-4 for 512 images from 5e-7, a tenth from epoch 700 on
        first, peak = 2e-6, 4e-4
        after = peak if step < 700 else peak / 10
    else:  # 2e-4 from 1e-6, and a cosine of 100 epochs to 1e-5, which counts the warm-up
        first, peak = 4e-6, 8e-4
        after = 4e-5 + (peak - 4e-5) * 0.5 * (1 + math.cos(math.pi * step / 100))
    return first + (peak - first) * step / 10 if step < 10 else after


@pytest.mark.parametrize("recipe", ["simmim-vit-b", "simmim-swin-b"])
def test_three_steps_of_the_recipe_are_simmim_s(recipe: str) -> None:
    """Loss, clipping, decay and rate, with weights in SimMIM's own layout on the other side."""
    is_vit = recipe == "simmim-vit-b"
    args = read_mapping(recipe_file(recipe))["model"]["backbone_args"]
    sizes = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    if not is_vit:
        sizes = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4]}
        sizes["window_size"] = 4
    given = {
        "data.source": "photos",
        "data.image_size": 16,
        "mask.aligned.unit": 8 if is_vit else 4,
        "model.backbone_args": {**args, **sizes, "drop_path_rate": 0.0},
    }
    config = load_config(recipe_file(recipe), given)
    state = vit_state(shared=True) if is_vit else fill(swin_shapes())
    model = build_model(config).double().train()
    model.load_state_dict(convert(state).state)
    theirs = {key: value.double().requires_grad_() for key, value in state.items()}
    kept = ("cls_token",) if is_vit else ("mask_token", TABLE)
    free = [v for k, v in theirs.items() if v.ndim == 1 or k.endswith((".bias", *kept))]
    groups: list[dict[str, Any]] = [
        {"params": [v for v in theirs.values() if all(v is not f for f in free)]},
        {"params": free, "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.05)
    optimizer = build_optimizer(config.optim, model, 1.0)
    schedule = build_schedule(config.optim, 2048, config.train.epochs, 1)
    generator = torch.Generator().manual_seed(4)
    for step in (9, 10, 90 if not is_vit else 750):
        pixels = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
        where = {"seed": 0, "epoch": step, "sample_ids": [0, 1, 2, 3]}
        mask = sample_masks(config.mask, model.grid, **where, patch_size=model.patch_size)
        loss = model(pixels, mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad or 0.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        hidden = mask.is_masked
        found = simmim(theirs, pixels, hidden, 3) if is_vit else simmim_swin(theirs, pixels, hidden)
        torch.testing.assert_close(loss, found["loss"], **EXACT)
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 5.0)
        for group in reference.param_groups:
            group["lr"] = simmim_rate(step, is_vit)
        reference.step()
        reference.zero_grad()
    own = dict(model.named_parameters())
    for name, value in convert({k: v.detach() for k, v in theirs.items()}).state.items():
        torch.testing.assert_close(own[name].detach(), value, **EXACT, msg=name)
        assert not torch.equal(value, convert(state).state[name].double())
