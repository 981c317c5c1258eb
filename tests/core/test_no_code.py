"""Settings are values: nothing that is read as a setting is built, imported or called."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from timm import create_model

import mim as package
from mim.compare.runner import CompareConfig
from mim.core.errors import UserError
from mim.core.settings import leaves, read_args
from mim.evaluate import EVALUATIONS, build_evaluation
from mim.training.settings import Config, load_config

SETTINGS = sorted(leaves(Config))
SPEC = {"class_path": "evil.Evil", "init_args": {"command": "touch"}}
SHAPES: list[Any] = [SPEC, [SPEC], {"inner": SPEC}, {"inner": [{"deep": SPEC}]}]
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mark = tmp_path / "built"
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nEvil = print\n")
    monkeypatch.syspath_prepend(str(folder))
    yield
    assert not mark.exists() and "evil" not in sys.modules


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("shape", SHAPES, ids=["itself", "listed", "inside", "deep"])
def test_no_setting_takes_one(shape: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for key in SETTINGS:
        file.write_text(yaml.safe_dump(nested(key, shape)))
        refused(lambda: load_config(file))
        refused(lambda key=key: load_config(None, {key: shape}))
        file.write_text(yaml.safe_dump({"base": nested(key, shape)}))
        refused(lambda: read_args(CompareConfig, ["--config", str(file)]))
        for varied in ({"axes": {key: [shape]}}, {"variants": {"one": {key: shape}}}):
            file.write_text(yaml.safe_dump(varied))
            refused(lambda: read_args(CompareConfig, ["--config", str(file)]))
        # On the command line it may be a text; it is not looked into either.
        try:
            read_args(Config, [f"--{key}={json.dumps(shape)}"])
        except UserError:
            continue


@pytest.mark.parametrize("shape", SHAPES, ids=["itself", "listed", "inside", "deep"])
def test_no_setting_of_python_takes_one(shape: Any) -> None:
    for owner, name in leaves(Config).values():
        refused(lambda owner=owner, name=name: owner(**{name: shape}))


@pytest.mark.parametrize("shape", SHAPES, ids=["itself", "listed", "inside", "deep"])
def test_no_evaluation_takes_one(shape: Any) -> None:
    for name in EVALUATIONS:
        for setting in ("seed", "pool", "path", "few_shot"):
            refused(lambda n=name, s=setting: build_evaluation(n, {s: shape}))
        asked = {"evaluations": {name: {"seed": shape}}}
        refused(lambda a=asked: read_args(CompareConfig, [f"--evaluations={json.dumps(a)}"]))


@pytest.mark.parametrize(
    "args",
    [
        {"fix_init": [SPEC]},
        {"pretrained_cfg": {"file": "weights.pt"}},
        {"pretrained_cfg_overlay": {"file": "weights.pt"}},
        {"checkpoint_path": "weights.pt"},
        {"cache_dir": "elsewhere"},
    ],
    ids=lambda args: next(iter(args)),
)
def test_a_config_beside_weights_is_not_trusted(args: dict[str, Any], tmp_path: Path) -> None:
    vit = create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **TINY)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    beside = {"architecture": "vit_tiny_patch16_224", "model_args": {**TINY, **args}}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    message = refused(lambda: package.import_model(tmp_path / "model.safetensors"))
    assert "class_path" in message or next(iter(args)) in message
    refused(lambda: load_config(None, {f"model.backbone_args.{k}": v for k, v in args.items()}))


@pytest.mark.parametrize("layout", ["safetensors", "checkpoint"])
def test_a_config_inside_weights_is_not_trusted(layout: str, tmp_path: Path) -> None:
    vit = create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **TINY)
    inside = json.dumps({"model": {"backbone_args": {**TINY, "fix_init": [SPEC]}}})
    file = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pt")
    if layout == "safetensors":
        save_file(vit.state_dict(), file, metadata={"mim_config": inside})
    else:
        state = {f"backbone.{key}": value for key, value in vit.state_dict().items()}
        torch.save({"model": state, "fingerprint": inside}, file)
    assert "class_path" in refused(lambda: package.import_model(file))


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "1e-04", ".0001", "0.0001"])
def test_a_number_is_one_wherever_it_stands(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"optim: {{base_lr: {text}}}\n")
    rates = [
        load_config(file).optim.base_lr,
        load_config(None, {"optim.base_lr": text}).optim.base_lr,
        load_config(None, [f"optim.base_lr={text}"]).optim.base_lr,
        read_args(Config, ["--optim.base_lr", text]).optim.base_lr,
    ]
    file.write_text(f"axes: {{optim.base_lr: [{text}]}}\n")
    rates += read_args(CompareConfig, ["--config", str(file)]).axes["optim.base_lr"]
    assert rates == [1e-4] * 5


def test_a_digest_that_looks_like_a_number_stays_a_text(tmp_path: Path) -> None:
    from mim.core.settings import to_yaml

    config = load_config(None, {"log.project": "12e45"})
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file).log.project == "12e45"
