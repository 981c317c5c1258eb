"""Evaluations of frozen encoders: each probe is one file and its registration.

Start reading in ``knn.py``.
"""
