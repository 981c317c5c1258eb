"""Files on disk and behind URLs: names, patterns, listings, downloads, ranges.

Nothing here knows of labels or splits. Start reading in ``places.py``.
"""
