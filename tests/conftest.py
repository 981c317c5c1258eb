"""What several tests share: one thread, a tiny config, and the command line in this process."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported, and for child processes: tests are small, threads only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # exact equality is promised for the CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read where it is imported; nothing is asked

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "data": {"source": "digits", "image_size": 8, "channels": 1, "batch_size": 64},
    "model": {
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": {"patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2},
        "decoder": {"transformer": {"width": 16, "depth": 1, "heads": 2}},
    },
    "optim": {"base_lr": 4.0e-3, "warmup_epochs": 0.1},
    "train": {"epochs": 2, "max_steps": 6, "log_every": 2, "validate_every": 0},
    "log": {"tensorboard": False},
}
"""1,617 training images of 8x8 pixels, 25 steps an epoch, 16 patches, some milliseconds a step."""


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with dotted keys set."""
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(base)))
    for key, value in changes.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


@pytest.fixture(autouse=True)
def forget_what_was_said() -> Iterator[None]:
    """What a process says once, each test may hear."""
    yield
    from mim.core.progress import note_once

    note_once.cache_clear()


@pytest.fixture(autouse=True)
def figures_in_one_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports draw the pictures of the page alone: PNG and PDF take most of their time."""
    monkeypatch.setattr("mim.report.figures.FORMATS", ("svg",))


@pytest.fixture(autouse=True)
def forget_plugins() -> Iterator[None]:
    """What a test's plug-ins register, and their settings, are gone after it."""
    yield
    loaded = {name for name in sys.modules if name.startswith("mim_plugin_")}
    if not loaded:
        return
    from mim.core.registry import Registry

    modules = [module for name, module in sys.modules.items() if name.startswith("mim.")]
    found = [value for module in modules for value in vars(module).values()]
    for registry in {id(value): value for value in found if isinstance(value, Registry)}.values():
        for name, entry in list(registry._entries.items()):
            if entry.__module__ in loaded:
                del registry._entries[name]
                if registry.block is not None and name in registry.block.__annotations__:
                    remove_block(registry.block, name)
    for name in loaded:
        del sys.modules[name]


def remove_block(parent: type, name: str) -> None:
    """Undo :func:`mim.core.fields.add_block`."""
    from mim.core import fields

    kept = {key: hint for key, hint in parent.__annotations__.items() if key != name}
    defaults = {key: vars(parent)["__dataclass_fields__"][key] for key in kept}
    for key in [name, *(key for key in vars(parent) if key in fields._MADE_BY_DATACLASS)]:
        delattr(parent, key)
    for key, field in defaults.items():
        setattr(parent, key, field)
    parent.__annotations__ = kept
    dataclass(frozen=True)(parent)
    fields._hints.cache_clear()


@pytest.fixture(scope="session")
def tiny_tree() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A config of some steps as a mapping, with dotted keys set."""
    return lambda changes: merged(TINY, changes)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Writes a config of some steps: ``tiny({"mask.ratio": 0.5}) -> config.yaml``."""

    def write(changes: Mapping[str, Any] | None = None, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(TINY, changes or {})))
        return path

    return write


@dataclass(frozen=True)
class Outcome:
    """What a call of the command line left."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr; fails where there are more, or none."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture(scope="session")
def losses_of() -> Callable[..., list[float]]:
    """Those of 20 steps of a model on the same 8 images of 8 x 8 under new masks."""
    from mim import Config
    from mim.core.rng import image_keys
    from mim.model import MaskedImageModel
    from mim.training.optim import build_optimizer
    from mim.training.runtime.precision import autocast

    def train(model: MaskedImageModel, config: Config, precision: str = "fp32") -> list[float]:
        optimizer = build_optimizer(config.optim, model, 1e-3)
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        ids, found = torch.arange(8), []
        for step in range(20):
            mask = model.draw_mask(images, image_keys(0, step, ids), epoch=step, sample_ids=ids)
            with autocast(precision, images.device):
                loss = model(images, mask).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    return train


@pytest.fixture
def mim(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls the command line in this process: ``mim("pretrain", "--seed", 1)``."""
    from mim.cli.main import main

    def call(*args: object) -> Outcome:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return Outcome(code, *capfd.readouterr())

    return call


# What torchrun tells its processes, then what a test adds, and the command line.
RANK = """
import os

os.dup2(os.open({stderr!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
rank = {rank}
os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="{world}")
os.environ |= dict(LOCAL_WORLD_SIZE="{world}", ACCELERATE_USE_CPU="true")
os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
"""
START = """
import runpy
import sys

sys.argv = {argv}
runpy.run_module("mim", None, "__main__")
"""


@dataclass(frozen=True)
class Ranks:
    """Processes of one run, without a launcher that would end them.

    Attributes:
        processes: one a rank.
        stderr: the file of each.
    """

    processes: list[Any]
    stderr: list[Path]

    def wait(self, seconds: float = 120, ranks: list[int] | None = None) -> list[int | None]:
        """The exit codes; fails where a process has not ended by then."""
        end = time.monotonic() + seconds
        chosen = [self.processes[r] for r in ranks] if ranks else self.processes
        for process in chosen:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [rank for rank, process in enumerate(chosen) if process.is_alive()]
        assert not hanging, f"these wait: {hanging}; {self.texts()}"
        return [process.exitcode for process in chosen]

    def texts(self) -> list[str]:
        """What each rank wrote on stderr."""
        return [path.read_text() if path.is_file() else "" for path in self.stderr]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Starts the command line in several processes that have the libraries loaded.

    ``ranks(args, world=2, of={1: "code"}, all="code")``: Python that one or all ranks run first.
    """
    from mim.compare.runner import SERVER_MODULES

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER_MODULES)
    started: list[Ranks] = []

    def start(
        args: Sequence[object], world: int = 2, of: Mapping[int, str] | None = None, all: str = ""
    ) -> Ranks:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = int(place.getsockname()[1])
        found = Ranks([], [])
        for rank in range(world):
            plugin = tmp_path / f"rank_{rank}_{port}.py"
            stderr = plugin.with_suffix(".err")
            given = {"rank": rank, "world": world, "port": port, "stderr": str(stderr)}
            call = START.format(argv=["mim", *map(str, args)])
            plugin.write_text(RANK.format(**given) + all + (of or {}).get(rank, "") + call)
            process = context.Process(target=runpy.run_path, args=(str(plugin),))
            process.start()
            found.processes.append(process)
            found.stderr.append(stderr)
        started.append(found)
        return found

    yield start
    for process in (process for found in started for process in found.processes):
        process.kill()
        process.join()


SIZES = [(8, 12), (12, 8), (10, 10), (6, 16), (16, 6), (12, 12)]


@pytest.fixture
def own_sizes(tmp_path: Path) -> dict[str, Any]:
    """A folder of 48 images of six sizes in two classes; the changes of a config that reads it."""
    generator = np.random.default_rng(0)
    for label, name in enumerate("ab"):
        for number in range(24):
            path = tmp_path / "images" / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = SIZES[number % 6]
            pixels = generator.normal(90 + 60 * label, 30, (height, width)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return {
        "data.source": "imagefolder",
        "data.path": str(tmp_path / "images"),
        "data.aspect": "keep",
        "data.max_patches": 24,
        "data.batch_size": 8,
        "mask.ratio": [0.4, 0.7],
        "model.backbone": "naflexvit_base_patch16_gap",
        "model.backbone_args": {
            "patch_size": 2,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "reg_tokens": 1,
        },
        "train.log_every": 1,
    }
