"""Whether a machine is fit to train here, and what to set."""

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
from packaging.requirements import InvalidRequirement, Requirement
from torch import Tensor

from mim.core.config import Config
from mim.core.cpu.linear import has_onednn, onednn_linear, takes_onednn
from mim.core.errors import UserError
from mim.data import open_source, train_loader

_OPTIONAL = {
    "transformers": "mim export --to hf",
    "onnx": "mim export --to onnx",
    "shtab": "mim completion",
}
_MIB = 16
"""What is written to try a disk."""
_SECONDS = 1.0
"""How long each way to load images is timed."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: str
    """``ok``, ``warning`` or ``problem``."""
    found: str
    advice: str = ""


def examine(config: Config, output: Path, quick: bool = False) -> list[Check]:
    """All checks; takes some seconds.

    Args:
        config: its images are loaded, its precision and device looked at.
        output: where runs shall go.
        quick: leaves out what is timed.
    """
    checks = [*_versions(), *_devices(config), *_threads(), _disk(output)]
    if not quick:
        checks += [*_products(config), *_loader(config)]
    return checks


def as_rows(checks: list[Check]) -> list[dict[str, Any]]:
    """The checks as JSON can hold them."""
    return [asdict(check) for check in checks]


def _versions() -> Iterator[Check]:
    yield Check("python", "ok", platform.python_version())
    for text in metadata.requires("mim") or []:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            yield Check(text, "warning", "cannot be read as a requirement")
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Check(wanted.name, "problem", "not installed", f"pip install '{text}'")
            continue
        fits = wanted.specifier.contains(version, prereleases=True)
        advice = "" if fits else f"pip install '{wanted.name}{wanted.specifier}'"
        yield Check(wanted.name, "ok" if fits else "problem", version, advice)
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
        busy = free < 0.5 * total
        advice = "another process holds most of its memory" if busy else ""
        yield Check(f"cuda:{index}", "warning" if busy else "ok", found, advice)
    if not torch.cuda.is_bf16_supported():
        advice = "train.precision: fp16" if config.train.precision == "bf16" else ""
        state = "problem" if advice else "ok"
        yield Check("bfloat16", state, "not supported by this GPU", advice)
    elif config.train.precision == "fp32":
        yield Check("bfloat16", "ok", "supported", "train.precision: bf16 is faster on a GPU")
    else:
        yield Check("bfloat16", "ok", "supported")


def _threads() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    found = f"{threads} threads of torch, {cores} cores for this process"
    over = cores is not None and threads > cores
    yield Check(
        "threads", "warning" if over else "ok", found, f"OMP_NUM_THREADS={cores}" if over else ""
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = bool(cores) and load > 0.75 * (cores or 1)
    advice = "other work is running: timings will not hold" if busy else ""
    yield Check("load", "warning" if busy else "ok", f"{load:.1f} in the last minute", advice)


def _disk(output: Path) -> Check:
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            block, began = os.urandom(2**20), time.perf_counter()
            for _ in range(_MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = _MIB / (time.perf_counter() - began)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return Check("disk", "problem", f"{place}: {reason}", "choose another output")
    found = f"{place}: {free:.0f} GiB free, writes {speed:.0f} MiB/s"
    if free < 2:
        return Check("disk", "warning", found, "train.keep_checkpoints: 1, or another output")
    return Check("disk", "ok", found)


def _products(config: Config) -> Iterator[Check]:
    """Half the layers' time is matrix products: what makes them faster."""
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
    own = "onednn" if takes_onednn(config.train.linear) else "torch"
    found = f"linear layers in float32 are {gain:.1f} times as fast by oneDNN as by torch's choice"
    found += f"; train.linear: {config.train.linear} takes {own}"
    loss = gain if own == "torch" else 1 / gain
    if loss < 1.3 or config.train.precision != "fp32":
        return Check("linear", "ok", found)
    other = "torch" if own == "onednn" else "onednn"
    return Check(
        "linear", "warning", found, f"train.linear: {other}, and time it with mim bench step"
    )


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Median of some calls."""
    times = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
    slow = rates[best] > 1.3 * rates[config.data.workers]
    advice = f"data.workers: {best}" if slow else ""
    yield Check("loader", "warning" if slow else "ok", found, advice)


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
