"""What a step costs: floating-point operations, memory, and the machine it was measured on."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mim.core.patches import Images
from mim.core.rng import image_keys
from mim.model import MaskedImageModel


def count_flops(
    model: MaskedImageModel,
    images: Images,
    sample_ids: Tensor,
    epoch: int = -1,
    repeats: int = 1,
) -> tuple[int, int]:
    """Counts (forward, backward) floating-point operations an image in training.

    The forward count holds everything that a step computes, a teacher and a mask generator that
    reads the image included. Attention is counted in its plain form, since torch's counter does
    not know every fused kernel.
    """

    def loss() -> Tensor:
        keys = image_keys(0, epoch, sample_ids, purpose="mask")
        mask = model.draw_mask(images, keys, epoch=epoch, sample_ids=sample_ids, repeats=repeats)
        return model(images, mask).loss

    checkpointing, model.regime.checkpointing = model.regime.checkpointing, False
    training = model.training
    found = flops_of(model.train(), loss)
    model.regime.checkpointing = checkpointing
    model.train(training)
    return found[0] // len(images), found[1] // len(images)


def flops_of(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Counts (forward, backward) operations of a loss; drops the gradients."""
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        with forward:
            value = loss()
        with backward:
            value.backward()
    model.zero_grad(set_to_none=True)
    return forward.get_total_flops(), backward.get_total_flops()


def wait_for(device: torch.device) -> None:
    """Waits until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes() -> int:
    """Returns the process's largest resident memory so far."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # on Linux only
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(
    device: torch.device, processes: int = 1, plugins: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns hardware, versions and digests of the code, as results record them."""
    package = Path(__file__).parents[2]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processes": processes,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "code": _digest(sorted(package.rglob("*.py"))),
        **{f"plugin {name}": _digest([_file_of(name)]) for name in plugins},
    }


def _file_of(plugin: str) -> Path:
    """Returns the file of a plug-in that is named as a file or a module."""
    if plugin.endswith(".py"):
        return Path(plugin)
    spec = find_spec(plugin)
    return Path(spec.origin if spec is not None and spec.origin else plugin)


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()[:12]
