"""What several tests of training share."""

from __future__ import annotations

import pytest

STOP = """
import os, signal
import mim.training.pretrain

real = mim.training.pretrain.image_keys
calls = 0

def stop(*args, **kwargs):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **kwargs)

mim.training.pretrain.image_keys = stop
"""


@pytest.fixture
def stop() -> str:
    """A plug-in that sends SIGTERM to its process in the third step."""
    return STOP
