"""On a CPU a step reuses the memory that the last one freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from mim.core.cpu.process import tune_process
if sys.argv[1] == "kept":
    tune_process()
def step():
    tensors = [torch.ones(10, 2**20) for _ in range(3)]  # 40 MiB each
for _ in range(10):
    step()  # the heap grows
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kind: str) -> int:
    """Page faults of four steps."""
    command = [sys.executable, "-c", FAULTS, kind]
    # With pages of 2 MB there are few faults either way.
    env = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=env)
    return int(told.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's allocator")
def test_freed_memory_is_used_again() -> None:
    pages = 4 * 3 * 40 * 2**20 // 4096
    assert faults("kept") < pages / 20
    assert faults("not") > pages / 2, "what this is for: otherwise it can go"
