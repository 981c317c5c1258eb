"""One-line errors for what a machine cannot do: devices, precisions, memory, determinism."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mim.core.config import Config
from mim.core.errors import TrainingError, UserError, WorkerError, setting_error

_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_OPERATION = re.compile(r"(\S+(?: with \S+)?) does not have a deterministic implementation")


def pick_device(name: str | None, setting: str = "--device") -> str:
    """Checks that a device can be used; None and auto take a GPU where there is one.

    Raises:
        UserError: if it cannot.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None or name == "auto":
        return "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise setting_error(
            setting, name, "is no device; choose auto, cpu, cuda, cuda:1 or mps"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        there = f"torch {torch.__version__} sees {gpus} GPUs here" if gpus else "torch sees no GPU"
        raise setting_error(setting, name, f"is not there: {there}; choose cpu")
    try:
        torch.empty(1, device=device).add(1).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise setting_error(setting, name, f"cannot be used: {reason}; choose cpu") from error
    return name


def settle(device: torch.device | str) -> torch.device:
    """Makes a GPU that is named by its number the one that Accelerate takes.

    Accelerate takes the current one, where no launcher gives each process its own.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is not None and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(device)
    return device


def refused_precision(precision: str, error: Exception) -> UserError:
    """Builds the error for a precision that Accelerate refuses on this device."""
    reason = " ".join(str(error).split())[:160]
    return setting_error("train.precision", precision, f"is not for this device: {reason}")


@contextmanager
def memory(config: Config, processes: int) -> Iterator[None]:
    """Turns torch's errors for want of memory into a TrainingError that says what to set."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        text = " ".join(str(error).split())
        kind = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, (TrainingError, WorkerError)) or not (kind or _NO_MEMORY.search(text)):
            raise
        reason = re.sub(r"^\[enforce fail.*?\] err == 0\. ", "", text).partition(". ")[0][:160]
        problem = f"out of memory ({reason})" if reason else "out of memory"
        raise TrainingError(f"{problem}: {_advice(config, processes)}") from error


def _advice(config: Config, processes: int) -> str:
    batch, parts = config.data.batch_size, config.train.accumulate
    at_once = math.ceil(batch / (processes * parts))
    over = f" over {processes} processes" if processes > 1 else ""
    advice = "Choose a smaller model or smaller images"
    if at_once > 1:
        advice = (
            f"Set train.accumulate to {parts * 2} ({math.ceil(at_once / 2)} at once, the same "
            f"batch; resume with --resume auto), or data.batch_size to {batch // 2} (another run)"
        )
    if not config.train.gradient_checkpointing:
        advice += ", or train.gradient_checkpointing to true"
    return (
        f"data.batch_size {batch}{over} and train.accumulate {parts} are {at_once} images at once. "
        f"{advice}"
    )


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Restricts torch to deterministic operations; see ``train.deterministic``.

    Raises:
        UserError: naming an operation that has no deterministic form on this device.
    """
    if not enabled:
        yield
        return
    # cuBLAS reads it at its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        found = _OPERATION.search(str(error))
        if found is None:
            raise
        reason = (
            f"cannot be held: {found[1]} has no deterministic implementation here. Set it to "
            "false, or choose parts that do without this operation"
        )
        raise setting_error("train.deterministic", True, reason) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
