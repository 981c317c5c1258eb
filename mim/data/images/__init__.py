"""One image or one batch of them: decoding, cropping, resizing, augmentation.

Nothing here knows where an image comes from. Start reading in ``transforms.py``.
"""
