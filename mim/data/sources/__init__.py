"""Where images come from: each source is one file and its registration.

A source lists images, labels and ids and reads one image; it neither crops nor batches. Start
reading in ``base.py``, then ``folder.py``.
"""
