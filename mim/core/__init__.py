"""What everything else stands on: errors, registries, random keys, patches, files, settings.

Nothing here knows of masks, models or images on disk. Start reading in ``settings.py`` (a config in
and out) and ``registry.py``.
"""
