"""Each verb that writes is killed at an instant drawn by seed and called again.

It must leave what an undisturbed call leaves, and nothing else. ``MIM_FAULT_TRIALS`` sets the
trials of each verb: ``bash scripts/test.sh faults`` runs 60 in all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mim.cli.main import main
from mim.compare.runner import SERVER_MODULES

TRIALS = max(1, int(os.environ.get("MIM_FAULT_TRIALS", "4")) // 4)
VERBS: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain", "--config", "{tiny}", "--resume", "auto", "--output", "{out}"),
    "knn": ("evaluate", "knn,linear", "{run}", "--set", "few_shot=[]"),
    "attentive": ("evaluate", "attentive", "{run}", "--set", "epochs=2"),
    "analysis": ("evaluate", "analysis", "{run}", "--set", "train_images=50", "val_images=20"),
    "compare": ("compare", "--config", "{compare}", "--output", "{out}"),
    "report": ("report", "{comparison}"),
    "import": ("import", "{weights}", "--output", "{out}"),
    "export": ("export", "{run}", "--to", "timm", "--output", "{out}/encoder.safetensors"),
    "export-hf": ("export", "{run}", "--to", "mae", "--output", "{out}/model.pth"),
    "visualize": ("visualize", "{run}"),
    "data pack": ("data", "pack", "{images}", "--output", "{out}"),
}
# What differs between two undisturbed calls.
TIMES = ("seconds", "per_second", "memory", "elapsed", "bytes", "date", "output", "wall")


def call(args: list[str], kill_after: float | None = None) -> int | None:
    """The command line in a process that has the libraries loaded; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    process = context.Process(target=main, args=(args,))
    process.start()
    process.join(240 if kill_after is None else kill_after)
    if kill_after is not None and process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def ground(
    tmp_path_factory: pytest.TempPathFactory, tiny_tree: Callable[..., dict[str, Any]]
) -> Path:
    """A run, a comparison, weights and pictures that the verbs work on."""
    folder = tmp_path_factory.mktemp("ground")
    tree = tiny_tree({"train.max_steps": 4, "train.checkpoint_every": 0.05})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    content = {
        "base": tree,
        "axes": {"model.regime.name": ["drop", "token"]},
        "evaluations": {"knn": {"few_shot": [], "k": [3]}},
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(content))
    assert call(["pretrain", "--config", f"{folder}/tiny.yaml", "--output", f"{folder}/run"]) == 0
    compare = ["compare", "--config", f"{folder}/compare.yaml"]
    assert call([*compare, "--output", f"{folder}/comparison"]) == 0
    export = ["export", f"{folder}/run", "--to", "timm"]
    assert call([*export, "--output", f"{folder}/weights.safetensors"]) == 0
    for number in range(20):
        path = folder / "images" / "train" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 9, 50, 90)).save(path)
    return folder


def arguments(verb: str, place: Path) -> list[str]:
    known = {name: place / name for name in ("run", "comparison", "images", "out")}
    known |= {name: place / f"{name}.yaml" for name in ("tiny", "compare")}
    return [arg.format(weights=place / "weights.safetensors", **known) for arg in VERBS[verb]]


def numbers(value: Any, key: str = "") -> Any:
    """JSON without times and places."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(word in k for word in TIMES)}
        return {k: numbers(v, k) for k, v in kept.items()}
    return [numbers(item) for item in value] if isinstance(value, list) else value


def state_of(place: Path) -> dict[str, Any]:
    """File -> what must be the same: the bytes, or the numbers of those with times in them."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_dir():
            continue
        found[name] = None
        if path.suffix == ".json" and path.name in ("result.json", "import.json"):
            text = path.read_text().replace(str(place), "")
            found[name] = numbers(json.loads(text))
        elif path.suffix in (".safetensors", ".npz", ".png"):
            found[name] = path.read_bytes()
        elif path.suffix == ".pth":
            found[name] = {k: v.tolist() for k, v in torch.load(path)["model"].items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_killed_at_any_instant_and_called_again(
    verb: str, ground: Path, tmp_path: Path, outcomes: list[tuple[str, str, str]]
) -> None:
    place = tmp_path / "place"  # one place for all trials: files may hold its name
    shutil.copytree(ground, place)
    began = time.monotonic()
    assert call(arguments(verb, place)) == 0
    seconds = time.monotonic() - began
    wanted = state_of(place)
    for trial in range(TRIALS):
        shutil.rmtree(place)
        shutil.copytree(ground, place)
        draw = random.Random(f"{verb} {trial}")
        instant = draw.uniform(0.2, 1.0) * seconds
        code = call(arguments(verb, place), instant)
        struck = f"{verb} after {instant:.2f} of {seconds:.2f} s"
        if code == 0:
            struck += ", which had ended"
        outcomes.append(("kill", struck, "differs"))
        assert call(arguments(verb, place)) == 0, struck
        found = state_of(place)
        assert found.keys() == wanted.keys(), (struck, found.keys() ^ wanted.keys())
        for name, content in wanted.items():
            assert found[name] == content, (struck, name)
        outcomes[-1] = (*outcomes[-1][:2], "identical")
