"""What is written loads elsewhere, with the same outputs, and says what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from layouts_by_hand import encoder_shapes, fill, mae_shapes
from torch import Tensor

import mim as package
from mim.interop import FORMATS, export_run, import_run

Store = Callable[..., Path]
HEADS = {"model.backbone_args.num_heads": 3, "model.decoder.transformer.heads": 4}


@pytest.fixture
def run(tmp_path: Path, store: Store) -> Path:
    """A run folder with weights of which none is 0 or 1."""
    path = tmp_path / "run"
    data = {"data.source": "photos", "data.mean": [0.5, 0.4, 0.3], "data.std": [0.2, 0.3, 0.2]}
    import_run(store(fill(mae_shapes())), path, {**HEADS, **data})
    return path


def tokens_of(run: Path, images: Tensor) -> Tensor:
    with torch.no_grad():
        return package.load(run).encode(images)


def test_timm_loads_it(run: Path, tmp_path: Path, images: Tensor, mim: Any) -> None:
    """By the line that is printed."""
    path = tmp_path / "new" / "encoder.safetensors"
    outcome = mim("export", run, "--to", "timm", "--output", path)
    assert outcome.code == 0
    scope: dict[str, Any] = {}
    call = next(line for line in outcome.out.splitlines() if line.startswith("timm.create_model"))
    exec("import timm\nmodel = " + call, scope)
    model = scope["model"].eval()
    with torch.no_grad():
        found = model.forward_features(images.float())
    assert torch.equal(found, tokens_of(run, images.float()))
    assert isinstance(model, timm.models.VisionTransformer)


@pytest.mark.parametrize("part", ["encoder", "model", None])
def test_hugging_face_loads_it(part: str | None, run: Path, tmp_path: Path, images: Tensor) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    folder = tmp_path / "hf"
    export_run(run, "hf", folder, part)
    wanted = package.load(run).double()
    more: dict[str, Any] = {"attn_implementation": "sdpa", "output_loading_info": True}
    if part == "encoder":
        kind = transformers.ViTModel
        oracle, info = kind.from_pretrained(folder, add_pooling_layer=False, **more)
        found = oracle.double()(images).last_hidden_state
        torch.testing.assert_close(found, wanted.encode(images), rtol=1e-10, atol=1e-10)
    else:
        oracle, info = transformers.ViTMAEForPreTraining.from_pretrained(folder, **more)
        config = package.load_config(None, {"mask.ratio": 0.75}).mask
        mask = package.sample_masks(config, wanted.grid, seed=0, epoch=0, sample_ids=[0, 1, 2])
        order = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
        found = oracle.double()(images, noise=order.argsort(dim=1).double())
        output = wanted(images, mask)
        torch.testing.assert_close(found.logits, output.prediction, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.loss, output.loss, rtol=1e-10, atol=1e-10)
        # The encoder alone is in there too.
        both = transformers.ViTMAEModel.from_pretrained(folder, attn_implementation="sdpa")
        assert torch.equal(both.layernorm.weight, wanted.backbone.norm.weight.float())
    for what, keys in info.items():
        assert not keys, f"{what}: {keys}"
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    pixels = np.full((20, 20, 3), 255, np.uint8)
    ready = processor(pixels, return_tensors="pt")["pixel_values"]
    assert ready.shape == (1, 3, 16, 16)
    white = torch.tensor([0.5 / 0.2, 0.6 / 0.3, 0.7 / 0.2])
    torch.testing.assert_close(ready[0, :, 8, 8], white)


def test_onnxruntime_loads_it(run: Path, tmp_path: Path, images: Tensor) -> None:
    """At other batch sizes than it was traced with."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    path = tmp_path / "encoder.onnx"
    exported = export_run(run, "onnx", path)
    assert "onnxruntime" in exported.usage and exported.card.is_file()
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        given = images[:count].float()
        tokens, features = session.run(None, {"images": given.numpy()})
        model = package.load(run)
        wanted = package.encode(model, given).numpy()
        np.testing.assert_allclose(tokens, tokens_of(run, given).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(features, wanted, rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir() if "onnx" in path.name] == ["encoder.onnx"]


@pytest.mark.parametrize("to", ["timm", "hf", "safetensors", "mae"])
def test_the_card(to: str, run: Path, tmp_path: Path) -> None:
    """Config, data fingerprint and results, in words and without paths of this machine."""
    result = json.loads((run / "result.json").read_text())
    result["data"] = {"source": "photos", "train_images": 9, "fingerprint": "abc-def"}
    result["evaluations"] = {"knn": {"accuracy": 0.8125}}
    (run / "result.json").write_text(json.dumps(result))
    exported = export_run(run, to, tmp_path / f"out{FORMATS[to].suffix}")
    text = exported.card.read_text()
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(front)["library_name"] == {"hf": "transformers", "timm": "timm"}.get(
        to, "mim"
    )
    for word in ("abc-def", "knn accuracy | 0.8125", "photos", "drop", "0.75", "0.5"):
        assert word in body, word
    config = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert config["model"]["backbone_args"]["embed_dim"] == 24
    assert str(tmp_path) not in text


def test_what_a_format_cannot_hold(tmp_path: Path, store: Store, mim: Any) -> None:
    """Refused, since the outputs would be others; timm's layout holds all."""
    cases = {
        "class token": ({"class_token": False, "global_pool": "avg"}, "class token"),
        "registers": ({"reg_tokens": 2}, "class token"),
        "layer scale": ({"init_values": 0.1}, "ls1.gamma"),
        "norm behind the pooling": ({"global_pool": "avg"}, "norm after"),
        "no query bias": ({"qkv_bias": False}, "queries without bias"),
        "positions": ({"no_embed_class": True}, "position"),
    }
    for name, (more, words) in cases.items():
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3,
            num_classes=0, **more,
        )  # fmt: skip
        run = tmp_path / name
        import_run(store(vit.state_dict()), run, HEADS)
        line = mim("export", run, "--to", "hf", "--output", tmp_path / f"hf {name}").line
        assert words in line, line
        assert not (tmp_path / f"hf {name}").exists()
        assert mim("export", run, "--output", tmp_path / f"{name}.safetensors").code == 0


def test_other_models_than_mae_keep_their_decoder(tmp_path: Path, run: Path, mim: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["target"]["loss"] = "l1"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    out = ("--output", tmp_path / "hf")
    line = mim("export", run, "--to", "hf", "--part", "model", *out).line
    assert "--part encoder" in line and "l1" in line
    assert "ViTModel" in mim("export", run, "--to", "hf", *out).out


def test_arguments(tmp_path: Path, run: Path, mim: Any) -> None:
    def line(*args: object) -> str:
        return mim("export", run, *args).line

    assert ".onnx" in line("--to", "onnx", "--output", tmp_path / "a.safetensors")
    assert "must be a folder" in line("--to", "hf", "--output", tmp_path / "a.safetensors")
    assert "--part" in line(
        "--to", "timm", "--part", "model", "--output", tmp_path / "a.safetensors"
    )
    assert "--part" in line("--to", "onnx", "--part", "model", "--output", tmp_path / "a.onnx")
    assert "holds a run" in line("--to", "hf", "--output", run)
    assert "invalid choice" in line("--to", "jax", "--output", tmp_path / "a")


def test_a_norm_epsilon_travels(tmp_path: Path, store: Store, images: Tensor, mim: Any) -> None:
    run = tmp_path / "run"
    state = fill(encoder_shapes())
    import_run(store(state), run, {**HEADS, "model.norm_eps": 0.1})
    plain = tmp_path / "plain"
    import_run(store(state), plain, HEADS)
    given = images.float()
    assert (tokens_of(run, given) - tokens_of(plain, given)).abs().max() > 1e-3
    outcome = mim("export", run, "--output", tmp_path / "e.safetensors")
    scope: dict[str, Any] = {}
    lines = [x for x in outcome.out.splitlines() if not x.startswith("model card")]
    exec("\n".join(lines).replace("timm.create_model", "model = timm.create_model"), scope)
    with torch.no_grad():
        found = scope["model"].eval().forward_features(given)
    assert torch.equal(found, tokens_of(run, given))
    assert mim("export", run, "--to", "hf", "--output", tmp_path / "hf").code == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["layer_norm_eps"] == 0.1
