"""Opening encoders: what is loaded is what was saved, and every misfit is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from mim.core.config import Config, DataConfig, ModelConfig
from mim.core.errors import UserError
from mim.evaluate import open_encoder, timm_encoder
from mim.model.backbones import build_backbone

NAME = "vit_tiny_patch16_224"
ARGS = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
DATA = DataConfig(source="digits", image_size=8, channels=1, batch_size=32)
# What a run folder means that was written before these settings existed.
BEFORE = replace(DATA, range="high_byte", eval_crop=1.0)
CONFIG = Config(seed=3, data=DATA, model=ModelConfig(backbone=NAME, backbone_args=dict(ARGS)))


def trained(classes: int = 0, **args: Any) -> VisionTransformer:
    """A model with weights that no seed gives."""
    sizes = {"img_size": 8, "in_chans": 1, **ARGS, **args}
    vit = timm.create_model(NAME, num_classes=classes, **sizes)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.1)
    assert isinstance(vit, VisionTransformer)
    return vit


def same_weights(vit: VisionTransformer | None, state: dict[str, torch.Tensor]) -> bool:
    assert vit is not None
    own = vit.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], v) for k, v in state.items())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    settings = {
        "seed": 3,
        "data": {"source": "digits", "image_size": 8, "channels": 1, "batch_size": 32},
        "model": {"backbone": NAME, "backbone_args": ARGS},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    save_file(trained().state_dict(), folder / "encoder.safetensors")
    return folder


def test_run(run: Path) -> None:
    encoder = open_encoder(run)
    assert (encoder.kind, encoder.name) == ("run", "run")
    assert encoder.data == BEFORE
    torch.manual_seed(0)
    assert not same_weights(encoder.vit, build_backbone(CONFIG.model, (8, 8), 1, 3).state_dict())
    assert same_weights(encoder.vit, load_file(run / "encoder.safetensors"))


def test_run_of_another_model(run: Path) -> None:
    save_file(trained(depth=3).state_dict(), run / "encoder.safetensors")
    with pytest.raises(UserError, match=r"does not fit the model.*blocks\.2\."):
        open_encoder(run)


def test_untrained_is_the_initial_state_of_the_run(run: Path) -> None:
    initial = build_backbone(CONFIG.model, (8, 8), 1, 3).state_dict()
    for encoder in (open_encoder("untrained", CONFIG), open_encoder(f"untrained:{run}")):
        assert encoder.kind == "untrained"
        assert same_weights(encoder.vit, initial)


def test_pixels(run: Path) -> None:
    for name, config, data in (("pixels", CONFIG, DATA), (f"pixels:{run}", None, BEFORE)):
        encoder = open_encoder(name, config)
        assert (encoder.kind, encoder.vit, encoder.data) == ("pixels", None, data)


@pytest.mark.parametrize("form", ["safetensors", "plain", "mae"])
def test_timm_checkpoint(tmp_path: Path, form: str) -> None:
    vit = trained(classes=5)
    state = dict(vit.state_dict())
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    left_out = ["head.bias", "head.weight"]
    if form == "safetensors":
        save_file(state, file)
    elif form == "plain":
        torch.save({"state_dict": state}, file)
    else:
        extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24)}
        torch.save({"model": {**state, **extra}}, file)
        left_out = sorted([*left_out, *extra])
    encoder = open_encoder(f"{NAME}@{file}", CONFIG)
    assert encoder.kind == "timm"
    assert list(encoder.left_out) == left_out
    kept = {k: v for k, v in state.items() if not k.startswith("head.")}
    assert same_weights(encoder.vit, kept)


def test_timm_checkpoint_of_another_image_size_is_resampled(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(trained(img_size=16).state_dict(), file)
    encoder = timm_encoder(NAME, file, DATA, ARGS)
    assert encoder.vit is not None
    assert encoder.vit.pos_embed.shape == (1, 5, 24)


def test_timm_checkpoint_keys_must_match(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    state = dict(trained().state_dict())
    save_file({k: v for k, v in state.items() if k != "norm.bias"}, file)
    with pytest.raises(UserError, match=r"weights.safetensors.* lacks norm\.bias"):
        timm_encoder(NAME, file, DATA, ARGS)
    save_file({**state, "novel": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="unknown novel"):
        timm_encoder(NAME, file, DATA, ARGS)
    save_file({**state, "norm.bias": torch.zeros(7)}, file)
    with pytest.raises(UserError, match=r"norm\.bias \(7,\)"):
        timm_encoder(NAME, file, DATA, ARGS)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("should_not_exist"),))


@pytest.mark.parametrize("content", ["text", "pickle", "numbers", "empty"])
def test_files_that_are_no_weights(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    if content == "text":
        file.write_text("hello")
    elif content == "pickle":
        torch.save({"model": Evil()}, file)
    elif content == "numbers":
        torch.save({"epoch": 3}, file)
    else:
        file.touch()
    with pytest.raises(UserError, match=r"checkpoint .*weights.pth"):
        timm_encoder(NAME, file, DATA, ARGS)
    assert not Path("should_not_exist").exists()


def test_damaged_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(trained().state_dict(), file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"checkpoint .* cannot be read as weights"):
        timm_encoder(NAME, file, DATA, ARGS)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere", "'nowhere' is no run folder"),
        ("untrained:nowhere", "run folder nowhere does not exist"),
        ("vit_tiny@nowhere.pth", "checkpoint nowhere.pth does not exist"),
    ],
)
def test_unknown_specs(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_encoder(spec, CONFIG)


@pytest.mark.parametrize("spec", ["untrained", "pixels", "vit_tiny_patch16_224@x.pth"])
def test_a_config_is_needed(spec: str) -> None:
    with pytest.raises(UserError, match="needs a config"):
        open_encoder(spec)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml"):
        open_encoder(tmp_path)
