"""Files that must not be loaded, and those that are with something said: each its outcome."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from layouts_by_hand import encoder_shapes, fill, mae_shapes
from safetensors.torch import save_file
from torch import Tensor

from mim.core.errors import UserError
from mim.interop import import_model, import_run, read_weights

Store = Callable[..., Path]
Small = dict[str, Any]


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "beside"])
def test_a_malicious_pickle_does_not_run(kind: str, tmp_path: Path, mim: Any) -> None:
    mark, path, run = tmp_path / "ran", tmp_path / "evil.pth", tmp_path / "run"
    content: Any = {"model": fill(encoder_shapes()), "args": Malicious(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif kind == "beside":  # a folder as Hugging Face writes it
        path = tmp_path / "hf"
        path.mkdir()
        torch.save(content, path / "pytorch_model.bin")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    outcome = mim("import", path, "--output", run)
    assert outcome.code == 2
    assert "was not loaded" in outcome.line
    if kind in ("zip", "beside"):
        assert "system" in outcome.line, "it says what the file asked for"
    assert not mark.exists() and not run.exists()
    # The file is what it is said to be: loaded without care it does run.
    loaded = path / "pytorch_model.bin" if path.is_dir() else path
    if kind == "pickle":
        pickle.loads(loaded.read_bytes())
    else:
        torch.load(loaded, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file(suffix: str, share: float, tmp_path: Path, mim: Any) -> None:
    path = tmp_path / f"weights{suffix}"
    state = fill(encoder_shapes())
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    outcome = mim("import", path, "--output", tmp_path / "run")
    assert outcome.code == 2 and path.name in outcome.line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_weights_at_all(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    for content in (b"", b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="weights"):
            read_weights(path)
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(UserError, match="holds none of"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {"a": 1}, {}, {"model": {}}, 3])
def test_other_content(content: Any, store: Store) -> None:
    with pytest.raises(UserError, match=r"weights\.pth"):
        import_model(store(content))


def test_another_architecture(store: Store, small: Small) -> None:
    for name in ("resnet18", "swinv2_tiny_window8_256", "convnext_atto"):
        path = store(timm.create_model(name, num_classes=3).state_dict())
        with pytest.raises(UserError, match=r"no ViT|no part of a ViT"):
            import_model(path, small)


def test_another_size_than_was_named(store: Store) -> None:
    state = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    with pytest.raises(UserError, match=r"no such model: it lacks|\(192,\)|192"):
        import_model(store(state), backbone="vit_small_patch16_224")
    with pytest.raises(UserError, match="lacks"):
        import_model(store(state), {"model.backbone_args.depth": 13})
    with pytest.raises(UserError, match="has unknown"):
        import_model(store(state), {"model.backbone_args.depth": 11})
    with pytest.raises(UserError, match="not one of"):
        import_model(store(state), backbone="vit_tyni_patch16_224")


def test_mixed_key_styles(store: Store, small: Small) -> None:
    state = fill(encoder_shapes())
    with_two = state | {"encoder.patch_embed.proj.weight": state["patch_embed.proj.weight"]}
    with pytest.raises(UserError, match=r"mixed key styles: .* each belong to another layout"):
        import_model(store(with_two), small)
    renamed = {
        key.replace("blocks.1.", "encoder.layer.1.") if "blocks.1" in key else key: value
        for key, value in state.items()
    }
    with pytest.raises(UserError, match=r"mixed key styles: encoder\.layer\.1"):
        import_model(store(renamed), small)
    half = {f"module.{k}" if "blocks" in k else k: v for k, v in state.items()}
    with pytest.raises(UserError, match="no part of a ViT takes"):
        import_model(store(half), small)
    twice = state | {"blocks.0.gamma_1": torch.ones(24), "blocks.0.ls1.gamma": torch.ones(24)}
    with pytest.raises(UserError, match="same weight"):
        import_model(store(twice), small)
    with pytest.raises(UserError, match="--from"):
        import_model(store(state), small, style="hf")
    with pytest.raises(UserError, match="is not one of"):
        import_model(store(state), small, style="jax")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_training_leaves_among_weights_is_left_out(
    prefix: str, tmp_path: Path, small: Small
) -> None:
    weights = {prefix + key: value for key, value in fill(encoder_shapes()).items()}
    others = {
        "n_averaged": torch.tensor(5),
        f"{prefix}criterion.weight": torch.ones(3),
        "train_acc.total": torch.tensor(0),
        "queue_ptr": torch.zeros(1),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    }
    torch.save({**weights, **others}, tmp_path / "w.pth")
    account = import_model(tmp_path / "w.pth", small).account
    left_out = {entry.key for entry in account.entries if entry.outcome == "left out"}
    assert set(others) <= left_out and len(account.entries) == len(weights) + len(others)


def test_keys_are_loaded_whole_or_not_at_all(store: Store, small: Small) -> None:
    state = fill(mae_shapes())
    extra = state | {"projector.weight": torch.ones(3)}
    with pytest.raises(UserError, match="no part of a ViT takes: projector"):
        import_model(store(extra), small)
    for key in [*list(state)[::6], "cls_token", "blocks.0.attn.qkv.bias", "decoder_pred.bias"]:
        lacking = {k: v for k, v in state.items() if k != key}
        with pytest.raises(UserError):
            import_model(store(lacking), small)
    no_block = {k: v for k, v in state.items() if not k.startswith("blocks.0.")}
    with pytest.raises(UserError, match="not whole: its blocks are 1"):
        import_model(store(no_block), small)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(kind: torch.dtype, store: Store, small: Small) -> None:
    """Loaded in float32 and said so; the values of half precision are exact in it."""
    state = {key: value.to(kind) for key, value in fill(encoder_shapes()).items()}
    imported = import_model(store(state), small)
    word = str(kind).removeprefix("torch.")
    assert any(f"{len(state)} entries were {word}" in note for note in imported.account.notes)
    for key, value in state.items():
        mine = imported.model.backbone.state_dict()[key]
        assert mine.dtype == torch.float32
        assert torch.equal(mine, value.float())
        assert torch.equal(mine.to(kind), value) or kind == torch.float64


def test_precisions_that_are_refused(store: Store, small: Small) -> None:
    state = fill(encoder_shapes())
    state["norm.weight"] = state["norm.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match="float8"):
        import_model(store(state), small)
    state["norm.weight"] = torch.ones(24, dtype=torch.int8)
    with pytest.raises(UserError, match=r"norm\.weight"):
        import_model(store(state), small)
    state["norm.weight"] = torch.full((24,), torch.nan)
    with pytest.raises(UserError, match="not finite"):
        import_model(store(state), small)


# --- adaptation -----------------------------------------------------------------------------------


def gray(count: int) -> Tensor:
    """(2, count, 16, 16), the same in every channel."""
    plane = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return plane.repeat(1, count, 1, 1)


@pytest.mark.parametrize("had, wanted", [(1, 3), (3, 1), (1, 4)])
def test_channels_are_adapted(had: int, wanted: int, store: Store, small: Small) -> None:
    """On images whose channels are alike, the tokens stay what they were."""
    state = fill(encoder_shapes(channels=had))
    small |= {"data.image_size": 16}
    before = import_model(store(state), small)
    after = import_model(store(state), {**small, "data.channels": wanted})
    (entry,) = after.account.of("adapted")
    assert entry.key == "patch_embed.proj.weight" and "channels" in entry.note
    tokens = before.model.encode(gray(had))
    torch.testing.assert_close(after.model.encode(gray(wanted)), tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("had, wanted", [(3, 4), (3, 2), (4, 3)])
def test_channels_that_nothing_is_known_of(
    had: int, wanted: int, store: Store, small: Small
) -> None:
    path = store(fill(encoder_shapes(channels=had)))
    with pytest.raises(UserError, match=r"data\.channels"):
        import_model(path, {**small, "data.channels": wanted})


def test_positions_of_another_size(store: Store, small: Small) -> None:
    """A slope stays the slope it is; the class token's position is not touched."""
    state = fill(encoder_shapes(grid=8))
    rows = torch.arange(8.0)[:, None, None].expand(8, 8, 24)
    state["pos_embed"][:, 1:] = rows.reshape(1, 64, 24)
    imported = import_model(store(state), {**small, "data.image_size": [64, 32]})
    positions = imported.model.backbone.pos_embed
    assert positions.shape == (1, 1 + 16 * 8, 24)
    assert torch.equal(positions[:, :1], state["pos_embed"][:, :1])
    grid = positions[0, 1:].view(16, 8, 24)
    # Row i of 16 lies at (i + 1/2) / 2 - 1/2 of 8.
    torch.testing.assert_close(grid[6:10, 0, 0], torch.tensor([2.75, 3.25, 3.75, 4.25]))
    assert torch.allclose(grid[:, :1].expand_as(grid), grid, atol=1e-5), "columns alike"
    (entry,) = imported.account.of("adapted")
    assert entry.note == "bicubic from a grid of 8 x 8 to 16 x 8"


def test_another_patch_size(store: Store, small: Small) -> None:
    """Enlarged images under enlarged patches have the tokens they had (FlexiViT)."""
    state = fill(encoder_shapes(patch=4))
    before = import_model(store(state), small)
    given = {**small, "model.backbone_args.patch_size": 8, "data.image_size": 32}
    after = import_model(store(state), given)
    (entry,) = after.account.of("adapted")
    assert entry.key == "patch_embed.proj.weight" and "4 x 4 to 8 x 8" in entry.note
    # Each patch is enlarged by itself, as the resampling of the kernel supposes.
    images, large = torch.randn(2, 3, 16, 16), torch.zeros(2, 3, 32, 32)
    for row in range(4):
        for column in range(4):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            large[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = F.interpolate(
                patch, (8, 8), mode="bicubic", antialias=True, align_corners=False
            )
    tokens = before.model.encode(images)
    torch.testing.assert_close(after.model.encode(large), tokens, rtol=1e-3, atol=1e-3)


def test_a_decoder_cannot_be_adapted(store: Store, small: Small) -> None:
    path = store(fill(mae_shapes()))
    for change in ({"data.channels": 1}, {"model.backbone_args.patch_size": 8}):
        with pytest.raises(UserError, match="--part encoder"):
            import_model(path, {**small, **change})
        encoder = import_model(path, {**small, **change}, part="encoder")
        assert all(
            key.startswith("decoder") or key == "mask_token" for key in encoder.account.left_out
        )
        assert len(encoder.account.left_out) == 2 * 12 + 8
    # Positions of encoder and decoder both follow the image size.
    larger = import_model(path, {**small, "data.image_size": 32})
    assert {e.key for e in larger.account.of("adapted")} == {"pos_embed", "decoder_pos_embed"}
    with pytest.raises(UserError, match=r"has unknown decoder\.mask_token"):
        import_model(path, {**small, "model.regime.name": "zero"})


def test_a_grid_that_cannot_be_known(store: Store, small: Small) -> None:
    state = fill(encoder_shapes())
    state["pos_embed"] = torch.randn(1, 1 + 13, 24)
    with pytest.raises(UserError, match="no square grid"):
        import_model(store(state), small)


def test_arguments(store: Store, small: Small, tmp_path: Path, mim: Any) -> None:
    path = store(fill(encoder_shapes()))
    out = ("--output", tmp_path / "run")
    assert "unrecognized" in mim("import", path, *out, "--no-such", 1).line
    assert "needs a value" in mim("import", path, *out, "--data.source").line
    assert "--output" in mim("import", path).line
    heads = "--model.backbone_args.num_heads=3"
    assert "maks" in mim("import", path, *out, heads, "--maks.ratio", 0.5).line
    assert "--key" in mim("import", path, *out, "--key", "nothing").line
    assert not (tmp_path / "run").exists()
    run = tmp_path / "run"
    import_run(path, run, small)
    assert "is a run folder already" in mim("import", run, "--output", tmp_path / "other").line
