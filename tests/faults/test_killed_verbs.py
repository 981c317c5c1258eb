"""Verbs that write are killed at instants drawn by seed and called again: the same files, no more.

Half of the kills come just before a call that changes a file, the others at any time. For
``pretrain`` see ``test_kills.py``. ``MIM_FAULT_TRIALS=60`` tries twenty of each verb.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch.utils._pytree import tree_flatten_with_path

from mim.cli.main import main
from mim.compare.runner import SERVER_MODULES

TRIALS = max(1, int(os.environ.get("MIM_FAULT_TRIALS", "3")) // 3)

CHILD = """
import os
import signal
import sys
import time
from pathlib import Path

import mim.report.figures
from mim.cli.main import main

mim.report.figures.FORMATS = ("svg",)  # fewer pictures are drawn, and written in the same way
place, number, seconds, log, home, calls = {place!r}, {number}, {seconds}, {log!r}, os.getpid(), 0
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def watch(event, args):
    global calls
    if event not in CHANGES and not (event == "open" and args[2] & WRITES):
        return
    path = args[0] if isinstance(args[0], (str, bytes, os.PathLike)) else ""
    path = os.fsdecode(path)
    if not path or (os.path.isabs(path) and not path.startswith(place)):
        return
    calls += 1
    if calls == number:
        os.kill(home, signal.SIGKILL)  # home: the verb itself, not its worker
        time.sleep(10)


sys.addaudithook(watch)
if seconds:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which kills at once, as SIGKILL does
    signal.setitimer(signal.ITIMER_REAL, seconds)
began = time.monotonic()
code = main({argv!r})
signal.setitimer(signal.ITIMER_REAL, 0)
if os.getpid() == home:
    Path(log).write_text(f"{{calls}} {{time.monotonic() - began}}")
sys.exit(code)
"""

SEGMENT = ["classes=[sky, road]", "image_size=[8, 8]", "epochs=2", "batch_size=2", "head=linear"]
TRAINED = ["epochs=2", "batch_size=4", "held_out=0.25"]
COMPARE = ["--axes", '{"seed": [0, 1]}', "--evaluations", '{"knn": {"k": [1], "few_shot": []}}']
VERBS: dict[str, list[str]] = {
    "evaluate knn": ["evaluate", "knn", "run", "--set", "few_shot=[]"],
    "evaluate linear": ["evaluate", "linear", "run", "--set", "few_shot=[]"],
    "evaluate finetune": ["evaluate", "finetune", "run", "--set", *TRAINED],
    "evaluate attentive": ["evaluate", "attentive", "run", "--set", *TRAINED],
    "evaluate segment": ["evaluate", "segment", "run", "--set", "path=scenes", *SEGMENT],
    "compare": ["compare", "--config", "compare.yaml", *COMPARE],
    "predict": ["predict", "tuned", "photos", "--output", "out/classes.csv"],
    "embed": ["embed", "run", "photos", "--output", "out/features.npy"],
    "export": ["export", "run", "--output", "out/timm"],
    "import": ["import", "vit.safetensors", "--output", "out/imported"],
    "report": ["report", "compared"],
    "visualize": ["visualize", "reconstruct", "run"],
    "data pack": ["data", "pack", "photos", "out/packed", "--workers", "1"],
    "data stats": ["data", "stats", "--config", "run/config.yaml", "--output", "stats.yaml"],
    "data inspect": ["data", "inspect", "photos", "--output", "out/sheet.png"],
    "new": ["new", "mask", "rings", "--output", "out/rings.py"],
}
REFUSED_WHEN_WHOLE = ("import", "new")
"""Verbs that write over nothing."""


def run_killed(
    place: Path, argv: list[str], log: Path, number: int = 0, seconds: float = 0.0
) -> int:
    """The exit code of the verb in a process of its own, below 0 where it was killed."""
    script = log.with_suffix(".py")
    made = {"place": str(place), "argv": argv, "log": str(log)}
    script.write_text(CHILD.format(**made, number=number, seconds=seconds))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    process = context.Process(target=runpy.run_path, args=(str(script),))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def images(place: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(6):
            for label, kind in enumerate(("cat", "dog")):
                pixels = rng.integers(60 * label, 120 + 60 * label, (8, 8, 3), dtype=np.uint8)
                path = place / "photos" / split / kind / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            for folder in ("images", "masks"):
                path = place / "scenes" / folder / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shape = (8, 8) if folder == "masks" else (8, 8, 3)
                high = 2 if folder == "masks" else 255
                Image.fromarray(rng.integers(0, high, shape, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_tree: Any) -> Iterator[Path]:
    """A folder with all that the verbs need; ``place.whole`` beside it is a copy."""
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("verbs")
    patch.setenv("MIM_CACHE", str(root / "cache"))
    patch.setattr("mim.report.figures.FORMATS", ("svg",))
    place = root / "place"
    images(place)
    patch.chdir(place)
    data = {"data.source": "imagefolder", "data.path": str(place / "photos")}
    sizes = {"data.channels": 3, "data.batch_size": 4, "train.max_steps": 2}
    tree = tiny_tree({**data, **sizes, "data.mean": [0.4] * 3, "data.std": [0.2] * 3})
    Path("tiny.yaml").write_text(yaml.safe_dump(tree))
    Path("compare.yaml").write_text(yaml.safe_dump({"output": str(place / "new"), "base": tree}))
    assert main(["pretrain", "--config", "tiny.yaml", "--output", str(place / "run")]) == 0
    shutil.copytree("run", "tuned")
    assert main(["evaluate", "finetune", "tuned", "--set", *TRAINED]) == 0
    assert main(["export", "run", "--output", "vit.safetensors"]) == 0
    compared = ["--output", str(place / "compared"), "--show", "quiet"]
    assert main(["compare", "--config", "compare.yaml", *COMPARE, *compared]) == 0
    shutil.copytree(place, place.with_suffix(".whole"))
    yield place
    patch.undo()


def fresh(place: Path) -> None:
    """Everything as before the verb."""
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(place.with_suffix(".whole"), place, dirs_exist_ok=True)


# A comparison draws how long its runs took; that they are drawn again is seen by their names.
DRAWN = re.compile(r"new/(figures/|tables/|report\.|results\.csv)")
CLOCK = re.compile(r"seconds|per_second|time|began|ended|since|elapsed|environment|memory|speed")


def timeless(value: Any) -> Any:
    """A JSON value without what a clock says, and without digests of files of safetensors."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not CLOCK.search(k) and k != "encoder"}
        return {k: timeless(v) for k, v in kept.items()}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def content(path: Path) -> str:
    """What a file says, whenever it was written."""
    if path.suffix == ".json":
        return json.dumps(timeless(json.loads(path.read_text())), sort_keys=True)
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps(timeless(lines))
    if path.suffix == ".pt":  # torch writes the name of its temporary file into it
        leaves = tree_flatten_with_path(torch.load(path, weights_only=True))[0]
        values = [(str(key), v.tolist() if torch.is_tensor(v) else v) for key, v in leaves]
        return repr([pair for pair in values if not CLOCK.search(pair[0])])
    if path.suffix == ".safetensors":  # whose header has its entries in any order
        with safe_open(path, "pt") as file:
            values = {key: file.get_tensor(key).tolist() for key in sorted(file.keys())}
            return repr((values, sorted((file.metadata() or {}).items())))
    if path.suffix == ".sha256":
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(place: Path) -> dict[str, str]:
    """All files, hidden ones too."""
    files = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
    return {str(path.relative_to(place)): content(path) for path in sorted(files)}


@pytest.fixture(scope="module")
def straight() -> dict[str, Any]:
    """Verb -> its files where nothing happens, calls that change a file, and seconds."""
    return {}


@pytest.mark.parametrize("trial", range(TRIALS))
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_killed_anywhere_ends_the_same(
    verb: str,
    trial: int,
    place: Path,
    straight: dict[str, Any],
    tmp_path: Path,
    outcomes: list[tuple[str, str, str]],
) -> None:
    log, argv = tmp_path / "log", VERBS[verb]
    if verb not in straight:
        fresh(place)
        assert run_killed(place, argv, log) == 0
        calls, seconds = log.read_text().split()
        straight[verb] = tree(place), int(calls), float(seconds)
        log.unlink()
    whole, calls, seconds = straight[verb]
    draw = random.Random(f"{verb} {trial}")
    at_call = trial % 2 == 0
    number, after = draw.randint(1, calls), draw.uniform(0, seconds)
    when = f"call {number} of {calls}" if at_call else f"{after:.2f} of {seconds:.2f} s"
    fresh(place)
    code = run_killed(place, argv, log, number * at_call, after * (not at_call))
    when += " never came" if code == 0 else ""
    outcomes.append((f"kill {verb}", when, "differs"))
    assert code in (-signal.SIGKILL, 0) if at_call else code in (-signal.SIGALRM, 0)
    if code:
        refuses = verb in REFUSED_WHEN_WHOLE and tree(place).keys() >= whole.keys()
        assert run_killed(place, argv, log) == (2 if refuses else 0)
    found = tree(place)
    assert found.keys() == whole.keys()
    differing = [name for name in whole if found[name] != whole[name]]
    assert [name for name in differing if not DRAWN.match(name)] == []
    outcomes[-1] = (*outcomes[-1][:2], "identical")
