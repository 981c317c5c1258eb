"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mim.core.config import OptimConfig

# Vectors that timm's rule (no decay for one-dimensional parameters) does not see.
_TOKENS = ("cls_token", "reg_token", "dist_token", "mask_token")
_NO_DECAY = ("layer_weights", "pos_embed", "pos_embed_x", "pos_embed_y")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a half cosine (MAE, arXiv:2111.06377)."""

    peak: float
    """Highest learning rate."""
    low: float
    """Last learning rate."""
    warmup: float
    """Steps of warm-up."""
    total: int
    """Steps of the run."""

    def __call__(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(self.total - self.warmup, 1)
        return self.low + (self.peak - self.low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def build_schedule(
    config: OptimConfig, batch_size: int, total: int, steps_per_epoch: int
) -> Schedule:
    """Builds the schedule of a run; its peak is ``base_lr * batch_size / 256``."""
    warmup = min(config.warmup_epochs * steps_per_epoch, total / 2)
    return Schedule(config.base_lr * batch_size / 256, config.min_lr, warmup, total)


def build_optimizer(config: OptimConfig, model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Builds AdamW without weight decay of vectors and, unless asked for, of tokens."""
    free = _NO_DECAY if config.decay_tokens else _NO_DECAY + _TOKENS
    names = [name for name, _ in model.named_parameters() if name.split(".")[-1] in free]
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=names)
    narrow = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    kind = CompensatedAdamW if narrow else torch.optim.AdamW
    return kind(groups, lr=lr, betas=config.betas, fused=True)


class CompensatedAdamW(torch.optim.AdamW):
    """AdamW for weights in bfloat16 that keeps what rounding removes.

    Most updates, weight decay above all, are less than half the distance to the next bfloat16 and
    would be lost. So each weight has a remainder in bfloat16 (Kahan's compensated sum, as in
    Zamirai et al., arXiv:2010.06192), and torch's AdamW works on the sum of both in float32, one
    tensor after another. The second moment, which falls by 1 - beta2 of itself at most, has a
    remainder too; the first has none. A step with ``found_inf`` changes nothing, as in torch.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for name in ("remainder", "exp_avg", "exp_avg_sq", "exp_avg_sq_remainder"):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        value = weight.float() + state["remainder"]
        first = state["exp_avg"].float()
        second = state["exp_avg_sq"].float() + state["exp_avg_sq_remainder"]
        adamw(
            [value],
            [gradient.float()],
            [first],
            [second],
            [],
            [state["step"]],
            fused=True,
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _split(value, weight, state["remainder"])
        _split(second, state["exp_avg_sq"], state["exp_avg_sq_remainder"])
        state["exp_avg"].copy_(first)


def _split(value: Tensor, rounded: Tensor, remainder: Tensor) -> None:
    """Splits a float32 into a bfloat16 and the remainder, rounded too."""
    rounded.copy_(value)
    torch.sub(value, rounded, out=remainder)
