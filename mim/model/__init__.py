"""What is trained: backbone, regime, decoder and target, and the loss they give together.

Nothing here reads images from disk or knows of an optimiser. Start reading in ``model.py``;
``regimes.py`` says how hidden patches meet the encoder.
"""

from mim.model.encode import encode
from mim.model.model import MaskedImageModel, Output, build_model, check_config

__all__ = ["MaskedImageModel", "Output", "build_model", "check_config", "encode"]
