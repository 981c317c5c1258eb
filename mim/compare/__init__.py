"""Comparisons: many runs from one base config and the axes that vary.

A comparison starts runs and evaluations and reads their results; it trains nothing itself. Start
reading in ``runner.py``.
"""

from mim.compare.runner import CompareConfig, Launch, compare, read_compare_config

__all__ = ["CompareConfig", "Launch", "compare", "read_compare_config"]
