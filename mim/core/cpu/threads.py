"""How the threads that compute on a CPU wait for their next piece of work."""

from __future__ import annotations

import os
import sys

SPINS = "10000"
_LOOKS, _LOOK = 3, 0.2  # so often, so many seconds each
_SPARE = 0.5  # of a core, for what every system does now and then


def choose_waiting() -> None:
    """Let torch's threads look out for work before they sleep, where no one else needs the cores.

    Waking a thread takes longer than much of what it is woken for, and a training step does so a
    thousand times; but a thread that looks out keeps its core from others. So threads sleep at once
    where the cores are busy, and look out for some microseconds where they are free
    (benchmarks/README.md). ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT`` are obeyed where set.

    It holds for this process and those it starts, if torch is not loaded yet.
    """
    if "OMP_WAIT_POLICY" in os.environ or "torch" in sys.modules:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if "GOMP_SPINCOUNT" in os.environ or _asked() == 1:  # one alone waits for nobody
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
