"""Runs are killed at instants drawn by seed, resumed, and must end as if nothing had happened.

``MIM_FAULT_TRIALS`` sets how many trials there are; ``bash scripts/test.sh faults`` runs 60.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils._pytree import keystr, tree_flatten_with_path

from mim.cli.main import main
from mim.compare.runner import SERVER_MODULES
from mim.training import checkpoint

TRIALS = int(os.environ.get("MIM_FAULT_TRIALS", "4"))
KILLS_AT_MOST = 3

# What dies, and how often it is called in the run below, about (in each of its two workers).
INSTANTS = {
    "reading a batch": ("mim.data.loader", "_TrainBatches.gather", 4),
    "drawing a mask": ("mim.training.pretrain", "image_keys", 12),
    "in the forward pass": ("mim.model.model", "MaskedImageModel.forward", 24),
    "before the optimizer": ("torch.optim", "AdamW.step", 12),
    "giving a line of metrics": ("mim.training.metrics", "Metrics.write", 6),
    "writing a line of metrics": ("mim.training.metrics", "Metrics._append", 6),
    "measuring held-out loss": ("mim.training.hooks", "HeldOut.run", 2),
    "drawing a picture": ("mim.training.hooks", "reconstruct", 1),
    "half-way in a checkpoint": ("torch", "save", 5),
    "before a file has its name": ("pathlib", "Path.replace", 12),
    "before a file is on disk": ("os", "fsync", 20),
    "removing an old checkpoint": ("pathlib", "Path.unlink", 20),
    "saving the encoder": ("mim.training.checkpoint", "save_encoder", 1),
}
FORK = """
import multiprocessing

# As in a process that no fork server has started: workers start at once, and notice when their
# parent is killed.
multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
"""
DEADLY = """
import importlib
import os
import signal

module, name, number = {module!r}, {name!r}, {number}
owner = importlib.import_module(module)
*parents, last = name.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real, calls, home = getattr(owner, last), 0, os.getpid()

def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == number:
        if (module, name) == ("torch", "save"):
            with open(args[1], "wb") as file:
                file.write(b"PK" * 500)
        os.kill(home, signal.SIGKILL)  # home: the run itself, not its worker
        if os.getpid() != home:
            os._exit(1)
    return real(*args, **kwargs)

setattr(owner, last, deadly)
"""
EXACT = {
    "model.regime.name": "zero",
    "model.backbone_args.attn_drop_rate": 0.1,
    "data.workers": 2,
    "train.accumulate": 2,
    "train.ema_decay": 0.9,
    "train.max_steps": 12,
    "train.log_every": 3,
    "train.validate_every": 0.3,
    "train.checkpoint_every": 0.12,  # every three steps
}


def in_a_process(*args: object) -> int | None:
    """The command line in a process of its own, which has the libraries loaded.

    Returns:
        0 where it came to its end, whatever it said, else the signal that killed it, below 0.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    process = context.Process(target=main, args=([str(arg) for arg in args],))
    process.start()
    process.join(timeout=240)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def leaves(value: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(value)[0]}


def weights(run: Path) -> dict[str, Any]:
    state, passed_over = checkpoint.newest_checkpoint(run)
    assert state is not None and not passed_over
    del state["state"]["elapsed"], state["state"]["train_seconds"]
    fingerprint = json.loads(state["fingerprint"])
    del fingerprint["plugins"]  # the one that kills is not in the run that goes straight on
    return leaves({**state, "fingerprint": fingerprint})


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


MEASURED = ("train_loss", "val_loss", "steps", "epochs", "evaluations", "flops_forward")


def result(run: Path) -> dict[str, Any]:
    found = checkpoint.read_result(run)
    assert found["status"] == "finished"
    kept = {name: found[name] for name in MEASURED if name in found}
    return {k: v for k, v in leaves(kept).items() if "seconds" not in k}


def assert_same(left: Path, right: Path) -> None:
    ones, others = weights(left), weights(right)
    assert ones.keys() == others.keys()
    for name, one in ones.items():
        equal = torch.equal(one, others[name]) if torch.is_tensor(one) else one == others[name]
        assert equal, name
    assert metrics(left) == metrics(right)
    assert result(left) == result(right)
    first, second = (checkpoint.encoder_weights(run) for run in (left, right))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(right.rglob("*.tmp")), "nothing half-written is left"


def config_file(folder: Path, tiny_tree: Callable[..., dict[str, Any]]) -> Path:
    path = folder / "exact.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(EXACT)))
    return path


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the first trial: the run that nobody kills."""
    return {"folder": tmp_path_factory.mktemp("straight")}


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_run_killed_anywhere_ends_the_same(
    trial: int,
    tmp_path: Path,
    straight: dict[str, Path],
    tiny_tree: Callable[..., dict[str, Any]],
    outcomes: list[tuple[str, str, str]],
) -> None:
    whole, killed = straight["folder"] / "run", tmp_path / "run"
    config, fork = config_file(tmp_path, tiny_tree), tmp_path / "fork.py"
    fork.write_text(FORK)
    train = ("pretrain", "--config", config, "--resume", "auto", "--plugins")
    if not (whole / "result.json").exists():
        assert in_a_process(*train, f"[{fork}]", "--output", whole) == 0
    draw = random.Random(trial)
    names = list(INSTANTS)
    history = []
    for kill in range(draw.randint(1, KILLS_AT_MOST)):
        # The first kill of each trial goes through the list, so that no instant is left out.
        name = names[trial % len(names)] if kill == 0 else draw.choice(names)
        module, attribute, often = INSTANTS[name]
        number = draw.randint(1, often)
        plugin = tmp_path / f"kill_{kill}.py"
        plugin.write_text(DEADLY.format(module=module, name=attribute, number=number))
        beside = str(trial % 2 == 1).lower()  # in half the trials
        more = ("--output", killed, "--train.async_save", beside)
        code = in_a_process(*train, f"[{fork}, {plugin}]", *more)
        history.append(f"{name} ({number})")
        if code == 0:  # it was over before that instant came
            history[-1] += " never came"
            break
        assert code == -signal.SIGKILL, (name, code)
    outcomes.append(("kill", ", ".join(history), "differs"))
    assert in_a_process(*train, f"[{fork}]", "--output", killed) == 0
    assert_same(whole, killed)
    outcomes[-1] = (*outcomes[-1][:2], "identical")
