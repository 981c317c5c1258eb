"""The memory of one step, counted by torch's allocator, so that it is the same every time.

The resident size of a process tells something else: what the C library keeps, and everything that
the process ever did before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# What the profiler says of itself on stderr, and of blocks that are older than it.
_PROFILER_TALK = ("USDT:", "unknown size was allocated before the profiling", "DeviceProperties")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' memory, each piece once."""
    pieces = {
        (str(tensor.device), storage.data_ptr()): storage.nbytes()
        for tensor in tensors
        if (storage := tensor.untyped_storage()).nbytes()
    }
    return sum(pieces.values())


def bytes_added(step: Callable[[], Any], device: torch.device) -> int:
    """How far a step raises the bytes that torch's allocator has given out, at its highest.

    Buffers that a library takes from the system itself, not from torch, are not in it.

    Args:
        step: is called once.
        device: whose memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with without_talk(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as on:
            step()
        with without_talk():
            on.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    # Counted from the beginning of the profile; device type 0 is the CPU.
    totals = (
        event["args"]["Total Allocated"]
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    return max(totals, default=0)


@contextlib.contextmanager
def without_talk() -> Iterator[None]:
    """Hold back what C++ writes to stderr, and pass on all but the profiler's own lines."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines(keepends=True):
                if not any(word in line for word in _PROFILER_TALK):
                    sys.stderr.write(line)
