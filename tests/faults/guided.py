"""Readers under atheris, which alters files towards code that none has reached yet.

    python tests/faults/guided.py FOLDER SECONDS [TARGET ...]

Each target has a process of its own, because atheris ends the one it runs in, and a folder with its
files, its log, and the file that broke it. A line of JSON says what came of each.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import yaml

# By the names of top-level packages; torch and numpy are too large to be instrumented whole.
INSTRUMENTED = ["mim", "PIL", "tarfile", "yaml"]
LONGEST, SLOWEST = 8192, 20  # bytes of a file, seconds for one
LEAST = 20  # files, however long they take
YAML = b"""a: 2001-01-31 12:30:00
b: [0x1f, 0b11, 017, 1_000, 1:30, -.inf, 1e-3, ~, yes]
c: &x {d: !!str 1, ? e : "f\\u0041"}
g: {<<: *x, h: !!set {i}}
j: |
  k
"""


def load() -> Any:
    """test_fuzz.py, which has sound files of all kinds, and knows what a refusal looks like."""
    for name in [name for name in sys.modules if name.partition(".")[0] in INSTRUMENTED]:
        del sys.modules[name]
    with atheris.instrument_imports(include=INSTRUMENTED):
        path = Path(__file__).with_name("test_fuzz.py")
        spec = importlib.util.spec_from_file_location("test_fuzz", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["test_fuzz"] = module
        spec.loader.exec_module(module)
    import numpy.lib._format_impl as npy
    import torch._weights_only_unpickler as unpickler
    import torch.serialization as serialization
    import yaml as package

    for owner in (npy, serialization, unpickler.Unpickler, package.scanner.Scanner):
        for function in list(vars(owner).values()):
            own = inspect.getsourcefile(owner)
            if inspect.isfunction(function) and function.__code__.co_filename == own:
                atheris.instrument_func(function)
    return module


def targets(fuzz: Any, folder: Path) -> dict[str, tuple[dict[str, bytes], Callable[[bytes], bool]]]:
    """For each its sound files, and what reads one and tells whether it refuses it."""
    sections = {key: yaml.safe_dump({key: value}).encode() for key, value in fuzz.DEFAULTS.items()}
    few = {key: sections[key] for key in ("mask", "model", "train", "log")}  # each takes its time
    sound = {name: data for name, data in fuzz.masks().items() if name != "objects"}
    safetensors = {"safetensors": fuzz.weights()["safetensors"]}

    def mask(data: bytes) -> bool:
        ending = "npy" if data.startswith(b"\x93NUMPY") else "png"
        return fuzz.refuses_mask(folder / f"mask.{ending}", data)

    return {
        "yaml": ({**sections, "all kinds": YAML}, fuzz.refuses_yaml),
        "configs": (few, lambda data: fuzz.refuses_config(folder / "config.yaml", data)),
        "masks": (sound, mask),
        "checkpoints": (
            fuzz.checkpoints(),
            lambda data: fuzz.refuses_checkpoint(folder / "step_00000003.pt", data),
        ),
        "weights": (
            safetensors,
            lambda data: fuzz.refuses_weights(folder / "weights.safetensors", data),
        ),
        "images": (fuzz.images(), fuzz.refuses_image),
        "shards": (fuzz.tars(), lambda data: fuzz.refuses_shard(folder / "x.tar", data)),
    }


def attack(
    sound: dict[str, bytes], refuses: Callable[[bytes], bool], folder: Path, seconds: int
) -> None:
    """Does not return."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for name, data in sound.items():
        assert not refuses(data), f"the sound file {name!r} is refused"
        assert len(data) <= LONGEST, f"the sound file {name!r} is too long"
        (corpus / name.replace(" ", "_")).write_bytes(data)
    options = {
        "max_len": LONGEST,
        "timeout": SLOWEST,
        "rss_limit_mb": 4096,
        "seed": 1,
        "artifact_prefix": f"{folder}/",
    }
    given = [f"-{name}={value}" for name, value in options.items()]

    began, executed = time.monotonic(), 0

    def one(data: bytes) -> None:
        nonlocal executed
        refuses(data)
        executed += 1
        # Its own limit of time would leave a busy machine with hardly any.
        if executed >= LEAST and time.monotonic() - began >= seconds:
            os.write(2, f"number_of_executed_units: {executed}\n".encode())
            os._exit(0)

    atheris.Setup([sys.argv[0], *given, str(corpus)], one)
    atheris.Fuzz()


def main(folder: Path, seconds: int, chosen: list[str]) -> None:
    fuzz = load()
    folder.mkdir(parents=True)
    found = targets(fuzz, folder)
    for name in chosen or list(found):
        place = folder / name
        place.mkdir()
        log, began = place / "log.txt", time.monotonic()
        child = os.fork()
        if not child:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            try:
                attack(*found[name], place, seconds)
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        _, status = os.waitpid(child, 0)
        text = log.read_text(errors="replace")
        executed = re.search(r"number_of_executed_units: (\d+)", text)
        reached = re.findall(r"cov: (\d+)", text)
        told = {
            "target": name,
            "code": os.waitstatus_to_exitcode(status),
            "executions": int(executed[1]) if executed else 0,
            "seconds": round(time.monotonic() - began, 1),
            "reached": [int(reached[0]), int(reached[-1])] if reached else [0, 0],
            "end": text[-3000:],
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3:])
