"""What develops the project and no user calls; run from a clone: ``python -m benchmarks NAME``.

Predictions of steps on many GPUs (``scale.py``, checked by ``ranks.py``), the cost of many runs
and images (``many.py``), and masked autoencoders of other codebases (``peers.py``), which
``mim bench step --peer`` loads. What was measured stands in ``README.md`` and ``scaling.md``.
"""
