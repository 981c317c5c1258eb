"""Segmentation and detection, with their data, heads and pictures.

Start reading in ``segment.py``; ``training.py`` is what both share.
"""
