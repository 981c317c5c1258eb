"""CPU tuning: it changes speed and, beyond rounding, no numbers.

``tune_process`` (``process.py``) sets up a process, ``tune`` (``kernels.py``) a model. Nothing here
is needed for correctness.
"""
