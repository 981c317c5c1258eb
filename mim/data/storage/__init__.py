"""Decoded images kept for later: packed sets and caches.

A stored image gives the same bytes as its source. Start reading in ``packed.py``.
"""
