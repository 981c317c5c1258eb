"""CPU tuning: threads, memory and kernels of the processor. It changes speed and no numbers.

Nothing here is needed for correctness. Start reading in ``kernels.py``.
"""
