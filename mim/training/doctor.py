"""Checks whether a machine is fit for training, and advises what to set."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch import Tensor

from mim.core.config import Config
from mim.core.cpu.linear import has_onednn, onednn_linear, takes_onednn
from mim.core.errors import UserError
from mim.data import open_source, train_loader
from mim.training.runtime.cost import wait_for

_OPTIONAL = {
    "transformers": "mim export --to hf",
    "onnx": "mim export --to onnx",
    "shtab": "mim completion",
}
_MIB = 16  # written to time the disk
_SECONDS = 1.0  # of timing for each number of workers


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    state: str
    """``ok``, ``warning`` or ``problem``."""
    found: str
    advice: str = ""


def _warn_if(advice: str, name: str, found: str) -> Check:
    """A check that warns if there is any advice."""
    return Check(name, "warning" if advice else "ok", found, advice)


def examine(config: Config, output: Path, quick: bool = False) -> list[Check]:
    """Runs all checks, which takes some seconds.

    Args:
        config: names images, precision and device.
        output: where runs are to be written.
        quick: leaves out what is timed.
    """
    checks = [*_versions(), *_devices(config), *_threads(), _disk(output)]
    if not quick:
        checks += [*_products(config), *_loader(config)]
    return checks


def as_rows(checks: list[Check]) -> list[dict[str, Any]]:
    """Returns the checks as JSON can hold them."""
    return [asdict(check) for check in checks]


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", platform.python_version())
    for text in metadata.requires("mim-compare") or []:
        required = Requirement(text)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(required.name)
        except metadata.PackageNotFoundError:
            yield Check(required.name, "problem", "not installed", f"pip install '{text}'")
            continue
        fits = required.specifier.contains(version, prereleases=True)
        advice = "" if fits else f"pip install '{required.name}{required.specifier}'"
        yield Check(required.name, "ok" if fits else "problem", version, advice)
    for name, use in _OPTIONAL.items():
        try:
            yield Check(name, "ok", f"{metadata.version(name)} (optional)")
        except metadata.PackageNotFoundError:
            yield Check(name, "ok", f"not installed; optional, for {use}")


def _devices(config: Config) -> Iterator[Check]:
    if not torch.cuda.is_available():
        found = f"CPU, {platform.processor() or platform.machine()}; no GPU that torch can use"
        built = "" if torch.version.cuda else "this torch was built without CUDA"
        yield Check("device", "ok", found, built)
        if config.train.precision == "fp16":
            yield Check(
                "train.precision", "problem", "fp16 needs a GPU", "train.precision: bf16 or fp32"
            )
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"{facts.name}, compute {facts.major}.{facts.minor}, "
            f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        )
        advice = "another process holds most of its memory" if free < 0.5 * total else ""
        yield _warn_if(advice, f"cuda:{index}", found)
    if torch.cuda.is_bf16_supported():
        slow = config.train.precision == "fp32"
        advice = "train.precision: bf16 is faster on a GPU" if slow else ""
        yield Check("bfloat16", "ok", "supported", advice)
    else:
        advice = "train.precision: fp16" if config.train.precision == "bf16" else ""
        state = "problem" if advice else "ok"
        yield Check("bfloat16", state, "not supported by this GPU", advice)


def _threads() -> Iterator[Check]:
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    threads = torch.get_num_threads()
    found = f"{threads} threads of torch, {cores} cores for this process"
    yield _warn_if(f"OMP_NUM_THREADS={cores}" if threads > cores else "", "threads", found)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    advice = "other work is running: timings will not hold" if load > 0.75 * cores else ""
    yield _warn_if(advice, "load", f"{load:.1f} in the last minute")


def _disk(output: Path) -> Check:
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            block, began = os.urandom(2**20), time.perf_counter()
            for _ in range(_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = _MIB / (time.perf_counter() - began)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return Check("disk", "problem", f"{folder}: {reason}", "choose another output")
    advice = "train.keep_checkpoints: 1, or another output" if free < 2 else ""
    return _warn_if(advice, "disk", f"{folder}: {free:.0f} GiB free, writes {speed:.0f} MiB/s")


def _products(config: Config) -> Iterator[Check]:
    """Times matrix products by their kinds; they take most of a step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 4096 if device.type == "cuda" else 512
    one = torch.ones(side, side, device=device)
    plain = _seconds(lambda: F.linear(one, one), device)
    if device.type == "cpu" and has_onednn():
        other = _seconds(lambda: onednn_linear(one, one), device)
        yield _linear(config, plain / other)
        if takes_onednn(config.train.linear):
            plain = other
    half = one.bfloat16()
    gain = plain / _seconds(lambda: F.linear(half, half), device)
    found = f"products of matrices are {gain:.1f} times as fast in bfloat16 as in float32"
    advice, own = "", config.train.precision
    if gain > 1.3 and own == "fp32":
        advice = "try train.precision: bf16, and time it with mim bench step"
    elif gain < 0.9 and own == "bf16":
        advice = "train.precision: fp32 is likely faster here"
    yield Check("precision", "warning" if gain < 0.9 and own == "bf16" else "ok", found, advice)


def _linear(config: Config, gain: float) -> Check:
    own, other = "torch", "onednn"
    if takes_onednn(config.train.linear):
        own, other = other, own
    found = f"linear layers in float32 are {gain:.1f} times as fast by oneDNN as by torch's choice"
    found += f"; train.linear: {config.train.linear} takes {own}"
    is_slow = (gain if own == "torch" else 1 / gain) >= 1.3 and config.train.precision == "fp32"
    advice = f"train.linear: {other}, and time it with mim bench step" if is_slow else ""
    return _warn_if(advice, "linear", found)


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Returns the median time of a call."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[2]  # the first two warm up


def _loader(config: Config) -> Iterator[Check]:
    try:
        source = open_source(config.data, "train")
    except UserError as error:
        yield Check("images", "problem", str(error))
        return
    yield Check("images", "ok", f"{source.name}: {len(source)} for training")
    cores = os.cpu_count() or 1
    rates = {}
    for workers in dict.fromkeys((config.data.workers, 0, min(cores, 8))):
        rates[workers] = _images_per_second(source, replace(config.data, workers=workers))
    found = ", ".join(f"{rate:,.0f} images/s with {n} workers" for n, rate in rates.items())
    best = max(rates, key=lambda n: rates[n])
    is_slow = rates[best] > 1.3 * rates[config.data.workers]
    yield _warn_if(f"data.workers: {best}" if is_slow else "", "loader", found)


def _images_per_second(source: Any, data: Any) -> float:
    batches = iter(train_loader(source, data.as_square(), 0, start_step=0, total_steps=10**6))
    next(batches)  # workers start
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SECONDS:
        count += len(next(batches))
    seconds = time.perf_counter() - began
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return count / seconds
