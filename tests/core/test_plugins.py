"""Plug-ins are part of a run: their settings, their code, and whose code may run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mim as package
from mim.core.errors import UserError
from mim.core.plugins import identity
from mim.core.settings import leaves
from mim.training import checkpoint
from mim.training.settings import Config, load_config

MASK = '''
from dataclasses import dataclass
from mim.core.fields import Count, Settings
from mim.masks.generators import MASKS, RandomMask

@dataclass(frozen=True)
class Own(Settings):
    """Settings of {name}."""

    twist: Count = {default}
    """How much it is twisted."""

@MASKS.register("{name}", Own)
class Mask(RandomMask):
    """Says {says}."""
'''

Tiny = Callable[..., Path]
Mim = Callable[..., Any]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, name: str, says: str = "one", default: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(MASK.format(name=name, says=says, default=default))
    return path


def test_its_settings_are_settings_like_others(
    tmp_path: Path, mim: Mim, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "own.py", "twisted")
    before = Config()
    config = load_config(None, {"plugins": [str(file)], "mask.name": "twisted", "mask.twisted": {}})
    assert config.mask.twisted.twist == 3 and before.mask.twisted.twist == 3
    assert "mask.twisted.twist" in leaves(Config)
    assert pickle.loads(pickle.dumps(config)) == config
    for value, said in (("0", "0 must be at least 1"), ("a", "'a' must be a whole number")):
        with pytest.raises(UserError, match=f"mask.twisted.twist: {said}"):
            load_config(None, {"plugins": [str(file)], "mask.twisted.twist": value})
    with pytest.raises(SystemExit):
        mim("pretrain", "--plugins", f"[{file}]", "--help")
    shown = capfd.readouterr().out
    assert "--mask.twisted.twist" in shown and "How much it is twisted." in shown


def test_two_of_one_name_both_load(tmp_path: Path) -> None:
    one = write(tmp_path / "a" / "own.py", "first_of_two")
    two = write(tmp_path / "b" / "own.py", "second_of_two")
    config = load_config(None, {"plugins": [str(one), str(two)], "mask.name": "second_of_two"})
    assert config.mask.first_of_two.twist == config.mask.second_of_two.twist == 3
    run = tmp_path / "run"
    run.mkdir()
    checkpoint.write_config(run, config)
    kept = yaml.safe_load((run / "config.yaml").read_text())["plugins"]
    assert kept == ["plugins/own.py", "plugins/own_2.py"]
    assert [(run / name).read_bytes() for name in kept] == [one.read_bytes(), two.read_bytes()]
    again = load_config(run / "config.yaml")  # whose copy of the second has another name
    assert again.mask.name == "second_of_two"
    with pytest.raises(UserError, match="'first_of_two' is taken"):
        load_config(None, {"plugins": [str(write(tmp_path / "c.py", "first_of_two", "other"))]})


def test_a_run_keeps_its_code(
    tmp_path: Path, tiny: Tiny, mim: Mim, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = write(tmp_path / "keep.py", "kept_one"), tmp_path / "run"
    changes = {"mask.name": "kept_one", "plugins": [str(file)], "train.max_steps": 2}
    args = ("--config", tiny(changes), "--output", run)
    assert mim("pretrain", *args).code == 0
    assert (run / "plugins" / "keep.py").read_bytes() == file.read_bytes()
    state, _ = checkpoint.newest_checkpoint(run)
    assert state is not None
    assert json.loads(state["fingerprint"])["plugins"] == [identity(str(file))]
    # Neither the file nor the folder in which it was called is needed any more.
    file.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert package.load(run).mask_generator.settings.twist == 3
    again = ("pretrain", "--config", run / "config.yaml", "--output", run, "--resume", "auto")
    assert mim(*again).code == 0
    # An edited file is another run.
    text = MASK.format(name="kept_one", says="another thing", default=3)
    file.write_text(text.replace('register("kept_one"', 'register("kept_two"'))
    outcome = mim("pretrain", *args, "--resume", "auto", "--mask.name", "kept_two")
    assert outcome.code == 2 and "other code: plug-in keep was edited" in outcome.line
    outcome = mim("evaluate", "knn", run, "--set", "few_shot=[]", "--plugins", file)
    assert outcome.code == 0, outcome.err


def test_code_of_a_run_from_elsewhere_is_asked_for(
    tmp_path: Path, tiny: Tiny, mim: Mim, cache: Path
) -> None:
    file, run = write(tmp_path / "theirs.py", "theirs"), tmp_path / "run"
    changes = {"mask.name": "theirs", "plugins": [str(file)], "train.max_steps": 1}
    assert mim("pretrain", "--config", tiny(changes), "--output", run).code == 0
    shutil.rmtree(cache)
    for call in (package.load, checkpoint.read_config):
        with pytest.raises(UserError, match=r"plugins/theirs\.py.*--trust.*trust=True"):
            call(run)
    knn = ("evaluate", "knn", run, "--set", "few_shot=[]")
    for args in (knn, ("pretrain", "--config", run / "config.yaml", "--output", tmp_path / "x")):
        outcome = mim(*args)
        assert outcome.code == 2 and "theirs.py" in outcome.line and "--trust" in outcome.line
    assert package.load(run, trust=True) is not None


def test_an_edit_between_two_runs_of_a_comparison_is_refused(
    tmp_path: Path, tiny_tree: Callable[..., Any], mim: Mim
) -> None:
    file, folder = write(tmp_path / "edited.py", "edited"), tmp_path / "cmp"
    base = tiny_tree({"plugins": [str(file)], "train.max_steps": 1})
    config = tmp_path / "compare.yaml"

    def call(seeds: list[int]) -> Any:
        axes = {"mask.name": ["random"], "seed": seeds}
        tree = {"output": str(folder), "axes": axes, "evaluations": {}, "base": base}
        config.write_text(yaml.safe_dump(tree))
        return mim("compare", "--config", config, "--show", "quiet")

    assert call([0]).code == 0
    assert (folder / "plugins" / "edited.py").is_file()
    write(file, "edited_since")
    outcome = call([0, 1])
    assert outcome.code == 2 and "edited.py' is not what it was when" in outcome.line
    write(file, "edited")
    assert call([0, 1]).code == 0


@pytest.mark.parametrize("default", [4, 5])
def test_a_name_is_free_again_in_the_next_test(tmp_path: Path, default: int) -> None:
    file = write(tmp_path / "own.py", "passing", default=default)
    config = load_config(None, {"plugins": [str(file)], "mask.name": "passing"})
    assert config.mask.passing.twist == default
