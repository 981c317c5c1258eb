"""Memory that a step frees is kept for the next one, on a CPU."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

# glibc's names in malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_ALL = 2**31 - 1
_MOST = 2**25  # glibc takes no higher threshold


@cache
def keep_freed_memory(most: int = _ALL) -> bool:
    """Let the C library keep what this process frees, as torch does on an accelerator.

    By default glibc asks the system for each large tensor and gives it back at once, and the
    system clears its pages one by one: tens of thousands of page faults a training step, up to a
    quarter of its time (benchmarks/README.md). A process then stays as large as it ever was.

    Args:
        most: bytes that are kept; with fewer than all, blocks of 32 MiB and more are still given
            back one by one.

    Returns:
        Whether the C library could be told; others than glibc cannot.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_TRIM_THRESHOLD: most}
    if most == _ALL:
        settings |= {_MMAP_MAX: 0, _TOP_PAD: 2**26}
    else:
        settings |= {_MMAP_THRESHOLD: _MOST}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
