"""Batch normalisation without weights, over all processes: what stands before a probe."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _mean_over_processes(values: Tensor) -> Tensor:
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    if together and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values


class Standardize(nn.Module):
    """Brings each feature of frozen tokens to mean 0 and variance 1 over the batch.

    It is ``nn.BatchNorm1d(width, affine=False)`` whose batch is that of all processes, and no
    gradient passes through it. MAE puts it before its linear probe (He et al. 2022), AIM before
    its attentive one: the features of different encoders differ in scale, and one learning rate
    must suit them all. In the first steps the running statistics move further than by
    ``momentum``, so that they are the mean of the batches seen, not of their initial values.
    """

    mean: Tensor
    var: Tensor
    seen: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-6) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("seen", torch.zeros(()))  # batches

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape, float32; processes must hold equal shares."""
        x = x.float()
        mean, var = self.mean, self.var
        if self.training:
            rows = x.reshape(-1, x.shape[-1])
            mean = _mean_over_processes(rows.mean(0))
            var = _mean_over_processes((rows - mean).square().mean(0))
            count = _mean_over_processes(var.new_full((), len(rows)))
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                count = count * torch.distributed.get_world_size()
            self.seen += 1
            weight = (1 / self.seen).clamp_min(self.momentum)
            self.mean.lerp_(mean, weight)
            self.var.lerp_(var * count / (count - 1).clamp_min(1), weight)
        return (x - mean) * (var + self.eps).rsqrt()
