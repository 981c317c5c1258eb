"""The way to an accelerator, on which nothing waits."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Movable = TypeVar("Movable", bound=Any)  # a tensor, or what moves as one: Patches, PatchMask


def to_device(values: Movable, device: torch.device | str) -> Movable:
    """Moves values to a device; the host does not wait until they are there.

    From ordinary memory CUDA would wait: only from page-locked memory does it copy in the
    background.
    """
    device = torch.device(device)
    if values.device == device:
        return values
    if values.device.type == "cpu" and device.type not in ("cpu", "mps", "meta"):
        values = values.pin_memory()
    moved: Movable = values.to(device, non_blocking=values.device.type == "cpu")
    return moved
