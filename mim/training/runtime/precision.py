"""Training in fewer bits than float32.

Autocast (bf16, fp16) computes products in 16 bits and keeps weights in float32. Two options go
further: float8 products of the blocks' linear layers, by torchao, and weights in bfloat16, whose
updates :class:`mim.training.optim.CompensatedAdamW` keeps from being rounded away.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mim.core.config import Config, TrainConfig
from mim.core.cpu.kernels import tune
from mim.core.errors import setting_error
from mim.model import MaskedImageModel, build_model
from mim.model.backbones import family_of

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
_FLOAT8_SIDES = 16  # a float8 product's sides are multiples of it
_FLOAT8_GPU = (8, 9)  # Ada and Hopper are the first that have one


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Returns the dtype of autocast; None in fp32."""
    return _DTYPES.get(precision)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Returns the context of a forward pass in a ``train.precision``."""
    dtype = autocast_dtype(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def model_on(config: Config, device: torch.device) -> MaskedImageModel:
    """Builds the model of a config, in float32, with the kernels that ``train`` sets.

    Raises:
        UserError: as :func:`mim.build_model`, and if the device has no such kernels.
    """
    model = build_model(config).to(device)
    train = config.train
    tune(model, device, train.precision, attention=train.attention, linear=train.linear)
    if train.precision == "fp8":
        _use_float8(model, device)
    return model


def blocks_of(model: MaskedImageModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns the blocks of the encoder, and those of the decoder if it has any."""
    return family_of(model.backbone).blocks, list(getattr(model.decoder, "blocks", []))


def is_emulated(precision: str, device: torch.device) -> bool:
    """Tells whether a device imitates a precision without gaining time by it."""
    return precision == "fp8" and device.type != "cuda"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings of Python and of logging."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _use_float8(model: MaskedImageModel, device: torch.device) -> None:
    """Makes the blocks' linear layers multiply in float8 (Micikevicius et al., arXiv:2209.05433).

    Weights, activations (e4m3) and gradients (e5m2) are each scaled by their largest value at every
    step. Embedding, prediction head and attention stay as they are, and so do queries, keys and
    values of a block that computes them for only some of its tokens.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FLOAT8_GPU:
        name = torch.cuda.get_device_name(device)
        reason = f"needs a GPU of compute capability 8.9 or more, which {name} is not; choose bf16"
        raise setting_error("train.precision", "fp8", reason)
    with _quiet():  # of torchao's own use of torch
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = Float8LinearConfig(emulate=is_emulated("fp8", device), pad_inner_dim=True)

    def fits(module: nn.Module, name: str) -> bool:
        sides = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
        return all(side % _FLOAT8_SIDES == 0 for side in sides)

    for block in itertools.chain(*blocks_of(model)):
        convert_to_float8_training(block, module_filter_fn=fits, config=config)


def narrow_weights(model: MaskedImageModel, train: TrainConfig) -> None:
    """Casts weights to ``train.weights``; an EMA teacher, whose steps are small, stays float32."""
    if train.weights == "bf16":
        for part in (model.backbone, model.regime, model.decoder):
            part.to(torch.bfloat16)
