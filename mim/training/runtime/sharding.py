"""Weights, gradients and moments sharded over all processes (PyTorch's FSDP2).

Each block's weights are gathered for its part of a step, and its gradients are scattered after it.
The rest of the model is gathered for the whole step. Checkpoints hold full tensors, so that a run
resumes with any number of processes, sharded or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from mim.core.errors import setting_error
from mim.masks import PatchMask
from mim.model.backbones import UNIT
from mim.model.model import Images, MaskedImageModel
from mim.training.runtime.precision import blocks_of


class Losses(NamedTuple):
    """The losses of a step as a tuple, since FSDP finds output tensors only in tuples."""

    loss: Tensor
    reconstruction: Tensor


class Sharded(nn.Module):
    """Shards the parameters of ``model`` over all processes, in place."""

    def __init__(self, model: MaskedImageModel, accelerator: Accelerator) -> None:
        super().__init__()
        if model.teacher is not None or model.mask_network is not None:
            part = "EMA teacher" if model.teacher is not None else "trained mask generator"
            raise setting_error("train.shard", True, f"does not work with an {part}")
        self.model = model
        self._autocast = accelerator.autocast
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for block in itertools.chain(*blocks_of(model)):
            setattr(block, UNIT, _call)
            fully_shard(block, mesh=mesh)
            register_fsdp_forward_method(block, UNIT)
        fully_shard(self, mesh=mesh)

    def forward(self, images: Images, mask: PatchMask, weight: Tensor | None = None) -> Losses:
        with self._autocast():
            output = self.model(images, mask, weight)
        return Losses(output.loss.float(), output.reconstruction.float())


def _call(work: Callable[..., Tensor], *args: Any) -> Tensor:
    return work(*args)


def gather_full(value: Any) -> Any:
    """Gathers every sharded tensor of a state; all processes call it, in the same order."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: gather_full(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gather_full(part) for part in value)
    return value


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a full state into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({k: _shard(v, own[k]) if k in own else v for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a full state into an optimizer, of sharded parameters or not."""
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = _shard(value, parameter)


def _shard(value: Tensor, like: Tensor) -> Tensor:
    """Returns this process's part of a full tensor if ``like`` is sharded."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
