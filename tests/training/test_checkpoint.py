"""Run folders: nothing half-written, nothing run on loading, and files that others read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import mim as package
from mim.core.config import Config
from mim.core.errors import UserError
from mim.core.settings import flatten, load_config, read_args, to_dict, to_yaml
from mim.training import checkpoint

Mim = Callable[..., Any]
Tiny = Callable[..., Path]
STATE = {"model": {"weight": torch.arange(3.0)}, "ema": {}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save_checkpoint(tmp_path, STATE, 7, keep=2)
    state = checkpoint.read_checkpoint(path)
    assert state["step"] == 7
    assert torch.equal(state["model"]["weight"], torch.arange(3.0))
    assert path.stat().st_mode & 0o777 == 0o644


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 3):  # by number, not by name or time
        checkpoint.save_checkpoint(tmp_path, STATE, step, keep=5)
    (tmp_path / "checkpoints" / "step_mine.pt").touch()
    checkpoint.save_checkpoint(tmp_path, STATE, 11, keep=2)
    kept = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert kept == ["step_00000010.pt", "step_00000011.pt"]
    assert (tmp_path / "checkpoints" / "step_mine.pt").exists(), "what is not ours stays"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_and_nothing_else(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save_checkpoint(tmp_path, STATE, 7, keep=1)
    before = path.read_bytes()

    def torn(content: Any, where: Path) -> None:
        Path(where).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        for step in (7, 8):
            with pytest.raises(type(error)):
                checkpoint.save_checkpoint(tmp_path, STATE, step, keep=1)
    assert names(tmp_path / "checkpoints") == [path.name, f"{path.name}.sha256"]
    assert path.read_bytes() == before
    assert checkpoint.read_checkpoint(path)["step"] == 7


def test_a_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = os.fsync

    def fsync(handle: int) -> None:
        seen.append((tmp_path / "result.json").exists())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.write_json_atomic(tmp_path / "result.json", {"a": 1})
    assert seen == [False, True], "the file first, then the folder that names it"
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, which zip's and torch's own reading may not see."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_the_digest_is_what_sha256sum_checks(tmp_path: Path) -> None:
    for step, milestone in ((1, False), (2, True)):
        path = checkpoint.save_checkpoint(tmp_path, STATE, step, keep=2, milestone=milestone)
        *_, line = checkpoint.digest_file(path).read_text().splitlines()
        assert line == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"


def test_the_newest_sound_checkpoint_is_taken(tmp_path: Path) -> None:
    assert checkpoint.newest_checkpoint(tmp_path) == (None, [])
    one, two, three = (checkpoint.save_checkpoint(tmp_path, STATE, n, keep=9) for n in (1, 2, 3))
    flip(two)
    three.write_bytes(three.read_bytes()[:-100])
    state, passed_over = checkpoint.newest_checkpoint(tmp_path)
    assert state is not None and state["step"] == 1
    assert len(passed_over) == 2
    assert three.name in passed_over[0] and two.name in passed_over[1]
    assert all("SHA-256" in reason and "\n" not in reason for reason in passed_over)
    flip(one)
    with pytest.raises(UserError, match="no sound checkpoint"):
        checkpoint.newest_checkpoint(tmp_path)


def test_a_checkpoint_of_an_older_version_has_no_digest(tmp_path: Path) -> None:
    path = checkpoint.save_checkpoint(tmp_path, STATE, 1, keep=1)
    checkpoint.digest_file(path).unlink()
    assert checkpoint.read_checkpoint(path)["step"] == 1


def test_milestones_stay_and_do_not_count(tmp_path: Path) -> None:
    for step in range(1, 7):
        checkpoint.save_checkpoint(tmp_path, STATE, step, keep=2, milestone=step in (2, 3))
    kept = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert kept == [f"step_{step:08d}.pt" for step in (2, 3, 5, 6)]
    digests = [name for name in names(tmp_path / "checkpoints") if name.endswith(".sha256")]
    assert digests == [f"{name}.sha256" for name in kept]


def test_a_torn_checkpoint_is_one_line(tmp_path: Path) -> None:
    path = checkpoint.save_checkpoint(tmp_path, STATE, 7, keep=1)
    checkpoint.digest_file(path).unlink()  # torch's own reading must do
    content = path.read_bytes()
    for torn in (b"", b"nonsense", content[: len(content) // 2]):
        path.write_bytes(torn)
        with pytest.raises(UserError, match=r"step_00000007.pt.* cannot be read") as caught:
            checkpoint.read_checkpoint(path)
        assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_a_checkpoint_that_would_run_code_does_not(plain_pickle: bool, tmp_path: Path) -> None:
    path, proof = tmp_path / "step_00000001.pt", tmp_path / "executed"
    content = {"format": checkpoint.FORMAT, "step": 1, "model": Malicious(proof)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UserError):
        checkpoint.read_checkpoint(path)
    assert not proof.exists()
    # The file is dangerous indeed.
    if not plain_pickle:
        torch.load(path, weights_only=False)
        assert proof.exists()


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step_00000001.pt"
    for content in ({"format": 99}, {"model": {}}, [1]):
        torch.save(content, path)
        with pytest.raises(UserError, match="format"):
            checkpoint.read_checkpoint(path)


def test_timm_loads_the_encoder_without_conversion(tmp_path: Path, mim: Mim, tiny: Tiny) -> None:
    run = tmp_path / "run"
    config = tiny({"train.ema_decay": 0.5})
    assert mim("pretrain", "--config", config, "--output", run).code == 0
    args = {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    exported = tmp_path / "out" / "encoder.safetensors"
    outcome = mim("export", run, "--output", exported)
    assert outcome.code == 0
    images = torch.randn(2, 1, 8, 8)
    model = package.load(run)
    expected = model.backbone(images)
    model_class = "vit_tiny_patch16_224"
    for file in (run / "encoder.safetensors", exported):
        vit = timm.create_model(
            model_class, checkpoint_path=file, num_classes=0, img_size=8, in_chans=1, **args
        ).eval()
        assert torch.equal(vit(images), expected)
    # The printed line is Python that does this.
    line = outcome.out.strip().splitlines()[-1]
    assert torch.equal(eval(line, {"timm": timm}).eval()(images), expected)
    # It is the average that is exported, not the last weights.
    state = checkpoint.read_checkpoint(checkpoint.checkpoints(run)[-1])
    weights = checkpoint.encoder_weights(run)
    average = checkpoint.backbone_state(state["ema"])
    assert all(torch.equal(weights[name], average[name]) for name in average)
    last = checkpoint.backbone_state(state["model"])
    assert any(not torch.equal(weights[name], last[name]) for name in last)
    # Before the end of a run, the newest checkpoint stands in.
    (run / "encoder.safetensors").unlink()
    weights = checkpoint.encoder_weights(run)
    assert all(torch.equal(weights[name], average[name]) for name in average)


def test_faults_of_a_run_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.model_state(tmp_path)
    with pytest.raises(UserError, match="neither a run folder nor"):
        checkpoint.model_state(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_result(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.encoder_weights(tmp_path)


def test_what_makes_another_run() -> None:
    base = load_config(None)
    same = {
        "output": "elsewhere",
        "resume": "auto",
        "data.workers": 3,
        "data.path": "/moved",
        "log.wandb": "offline",
        "train.log_every": 3,
        "train.checkpoint_every": 2.5,
        "train.accumulate": 2,
    }
    saved = json.loads(json.dumps(checkpoint.fingerprint(base)))
    checkpoint.check_same_run(saved, load_config(None, same), Path("run"))
    other = {
        "seed": 1,
        "mask.ratio": 0.6,
        "data.batch_size": 128,
        "model.backbone_args": {"depth": 3},
        "train.max_steps": 4,
        "optim.clip_grad": 1.0,
    }
    for key, value in other.items():
        with pytest.raises(UserError, match=key):
            checkpoint.check_same_run(saved, load_config(None, {key: value}), Path("run"))
    # A run of a version that had fewer settings is the same run while those stay at their defaults.
    older = {key: value for key, value in saved.items() if not key.startswith("mask.")}
    checkpoint.check_same_run({**older, "mask.ratio": 0.75}, load_config(None, same), Path("run"))
    with pytest.raises(UserError, match=r"mask\.block\.exact"):
        changed = load_config(None, {**same, "mask.block.exact": False})
        checkpoint.check_same_run({**older, "mask.ratio": 0.75}, changed, Path("run"))
    with pytest.raises(UserError, match=r"and \d more"):
        checkpoint.check_same_run(saved, load_config(None, other), Path("run"))


# Configs ------------------------------------------------------------------------------------


def test_a_config_survives_its_yaml(tmp_path: Path) -> None:
    overrides = {
        "mask.ratio": [0.25, 0.75],
        "data.image_size": [32, 64],
        "data.mean": [0.1, 0.2, 0.3],
        "model.backbone_args": {"patch_size": [8, 16], "depth": 2, "init_values": 1e-05},
        "optim.min_lr": 1e-07,
        "optim.clip_grad": 3,
        "train.max_steps": 5,
        "plugins": [],
    }
    config = load_config(None, overrides)
    assert config.mask.ratio == (0.25, 0.75) and config.data.size == (32, 64)
    assert config.model.backbone_args == {"patch_size": [8, 16], "depth": 2, "init_values": 1e-05}
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config
    flat = {key: value for key, value in flatten(to_dict(config)).items() if value is not None}
    assert load_config(None, flat) == config


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    for name, ratio in (("a", 0.5), ("b", 0.6)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"mask": {"ratio": ratio}}))
    (tmp_path / "a.yaml").write_text("seed: 4\nmask: {ratio: 0.5}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = read_args(Config, files)
    assert (config.seed, config.mask.ratio) == (4, 0.6)
    assert load_config(tmp_path / "a.yaml", ["mask.ratio=0.7"]).mask.ratio == 0.7
    assert load_config(tmp_path / "a.yaml", ["--mask.ratio=0.7"]).mask.ratio == 0.7
    assert load_config(tmp_path / "a.yaml", {"mask.ratio": 0.7}).mask.ratio == 0.7
    with pytest.raises(UserError, match="key=value"):
        load_config(None, ["mask.ratio"])


def test_one_argument_of_the_backbone_may_be_set_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {backbone_args: {patch_size: 16, depth: 3}}\n")
    config = load_config(path, {"model.backbone_args.depth": 5})
    assert config.model.backbone_args == {"patch_size": 16, "depth": 5}


def test_a_plugin_adds_a_component(tmp_path: Path) -> None:
    plugin = tmp_path / "left_half.py"
    plugin.write_text(
        "import torch\n"
        "from mim.masks.generators import MASKS, RandomMask\n"
        "@MASKS.register('left_half')\n"
        "class LeftHalf(RandomMask):\n"
        "    pass\n"
    )
    config = load_config(None, {"plugins": [str(plugin)], "mask.name": "left_half"})
    assert config.mask.name == "left_half"
    for missing in ("no_such_module_of_mine", str(tmp_path / "none.py")):
        with pytest.raises(UserError, match="plugins"):
            load_config(None, {"plugins": [missing]})
