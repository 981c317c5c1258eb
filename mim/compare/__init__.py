"""Comparisons: many runs from one base config and the axes that vary.

A comparison starts runs and evaluations and reads their results; it trains nothing itself, and
``mim.api.compare`` puts the report above it. Start reading in ``plan.py``, then ``runner.py``.
"""

from typing import Any

from mim import moved
from mim.compare.launchers import Launch
from mim.compare.plan import CompareConfig, read_compare_config
from mim.compare.runner import run_comparison

__all__ = ["CompareConfig", "Launch", "read_compare_config", "run_comparison"]


def __getattr__(name: str) -> Any:
    return moved.attribute(__name__, name)
