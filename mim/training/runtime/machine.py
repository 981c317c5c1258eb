"""What a machine cannot do, said in one line: devices, precisions, memory, determinism."""

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


def pick_device(wanted: str | None, setting: str = "--device") -> str:
    """A device that is there; None takes the GPU where there is one.

    Raises:
        UserError: if it is not, or torch has no such kind.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is None:
        return "cuda" if gpus else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise setting_error(setting, wanted, "is no device; choose cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        there = f"torch {torch.__version__} sees {gpus} GPUs here" if gpus else "torch sees no GPU"
        raise setting_error(setting, wanted, f"is not there: {there}; choose cpu")
    try:
        torch.empty(1, device=device).add(1).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise setting_error(setting, wanted, f"cannot be used: {reason}; choose cpu") from error
    return wanted


def refused_precision(precision: str, error: Exception) -> UserError:
    """The error for a precision that Accelerate refuses on this device."""
    reason = " ".join(str(error).split())[:160]
    return setting_error("train.precision", precision, f"is not for this device: {reason}")


@contextmanager
def memory(config: Config, processes: int) -> Iterator[None]:
    """Says in one line what to set where the memory of a device, or of the machine, is too small.

    Args:
        config: of the run.
        processes: how many share a batch.

    Raises:
        TrainingError: in the place of torch's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's OutOfMemoryError is a RuntimeError
        told = " ".join(str(error).split())
        kind = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if isinstance(error, (TrainingError, WorkerError)) or not (kind or _NO_MEMORY.search(told)):
            raise
        reason = re.sub(r"^\[enforce fail.*?\] err == 0\. ", "", told).partition(". ")[0][:160]
        told = f"out of memory ({reason})" if reason else "out of memory"
        raise TrainingError(f"{told}: {_advice(config, processes)}") from error


def _advice(config: Config, processes: int) -> str:
    batch, parts = config.data.batch_size, config.train.accumulate
    at_once = math.ceil(batch / (processes * parts))
    share = f"data.batch_size {batch}"
    share += f" over {processes} processes" if processes > 1 else ""
    found = f"{share} and train.accumulate {parts} are {at_once} images at once. "
    if at_once > 1:
        half = math.ceil(at_once / 2)
        found += (
            f"Set train.accumulate to {parts * 2} ({half} at once, the same batch; --resume auto "
            f"goes on), or data.batch_size to {batch // 2} (another run)"
        )
    else:
        found += "Choose a smaller model or smaller images"
    if not config.train.gradient_checkpointing:
        found += ", or train.gradient_checkpointing to true"
    return found


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Lets torch use deterministic operations alone; see ``train.deterministic``.

    Raises:
        UserError: naming an operation that has no deterministic form on this device.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads it when it is first used.
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
