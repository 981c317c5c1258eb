"""Memory and threads of a process that computes on a CPU. Loads without torch."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

SPINS = "10000"
_LOOKS, _LOOK = 3, 0.2  # how often the cores are watched, and for how many seconds each time
_SPARE = 0.5  # of a core, for what every system does now and then
# glibc's names in malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_ALL = 2**31 - 1
_MOST = 2**25  # glibc takes no higher threshold


def tune_process(device: object = "cpu", kept: int = _ALL) -> None:
    """Let the C library keep what this process frees, as torch does on an accelerator.

    By default glibc asks the system for each large tensor and gives it back at once, and the
    system clears its pages one by one: tens of thousands of page faults a training step, up to a
    quarter of its time (benchmarks/README.md). A process then stays as large as it ever was.
    Nothing happens with another C library, or where the process computes on an accelerator.

    ``kept`` is the number of bytes that are kept; with fewer than all, blocks of 32 MiB and more
    are still given back one by one.
    """
    if str(device).startswith("cpu"):
        _keep_freed_memory(kept)


@cache
def _keep_freed_memory(kept: int) -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    settings = {_TRIM_THRESHOLD: kept}
    if kept == _ALL:
        settings |= {_MMAP_MAX: 0, _TOP_PAD: 2**26}
    else:
        settings |= {_MMAP_THRESHOLD: _MOST}
    for name, value in settings.items():
        ctypes.CDLL(None).mallopt(name, value)


def choose_waiting() -> None:
    """Let torch's threads watch for work before they sleep, where no one else needs the cores.

    Waking a thread takes longer than much of what it is woken for, and a training step does so a
    thousand times; but a thread that watches keeps its core from others. So threads sleep at once
    where the cores are busy, and watch for some microseconds where they are free
    (benchmarks/README.md). ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT`` are obeyed where set.

    It holds for this process and those it starts, if torch is not loaded yet.
    """
    if "OMP_WAIT_POLICY" in os.environ or "torch" in sys.modules:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if "GOMP_SPINCOUNT" in os.environ or _asked() == 1:  # a lone thread waits for nobody
        return
    if any(_are_free() for _ in range(_LOOKS)):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def _are_free() -> bool:
    """Whether there is a core for each thread that torch will start."""
    import psutil

    busy = psutil.cpu_percent(_LOOK, percpu=True)
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    free = sum(1 - busy[core] / 100 for core in ours if core < len(busy))
    return free > (_asked() or len(ours)) - _SPARE


def _asked() -> int | None:
    """Threads that the environment asks for."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(asked) if asked.isdigit() else None
