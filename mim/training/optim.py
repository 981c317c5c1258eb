"""The optimizer's parameter groups, and the schedule of its rate."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mim.core.config import OptimConfig
from mim.core.schedule import Schedule

# Vectors that timm's rule (no decay for one-dimensional parameters) does not see.
_TOKENS = ("cls_token", "reg_token", "dist_token", "mask_token")
_NO_DECAY = ("layer_weights", "pos_embed", "pos_embed_x", "pos_embed_y")


def build_schedule(
    config: OptimConfig, batch_size: int, total: int, steps_per_epoch: int
) -> Schedule:
    """Builds the schedule of a run; its peak is ``base_lr * batch_size / 256``."""
    moves = config.schedule
    if moves.warmup is None:
        warmup = config.warmup_epochs * (steps_per_epoch if moves.unit == "steps" else 1)
        moves = replace(moves, warmup=warmup)
    if moves.to is None and moves.ends:
        moves = replace(moves, to=config.min_lr)
    return moves.build(config.base_lr * batch_size / 256, total, steps_per_epoch)


def build_optimizer(config: OptimConfig, model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Builds AdamW without weight decay of vectors and, unless asked for, of tokens.

    Raises:
        UserError: if a pattern of ``optim.scales`` fits no parameter.
    """
    free = _NO_DECAY if config.decay_tokens else _NO_DECAY + _TOKENS
    names = [name for name, _ in model.named_parameters() if name.split(".")[-1] in free]
    groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=names)
    if config.scales:
        groups = _scaled(config, model, groups)
    for group in groups:
        if config.decay_schedule.moves:
            group["decay_scale"] = group["weight_decay"]  # times which the moving decay holds
        group["weight_decay"] *= config.weight_decay
    narrow = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    kind = CompensatedAdamW if narrow else torch.optim.AdamW
    return kind(groups, lr=lr, betas=config.betas, fused=True)


def _scaled(
    config: OptimConfig, model: nn.Module, groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Parts groups, whose ``weight_decay`` is a multiplier, by those of ``optim.scales``."""
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for scale in config.scales:
        if not fnmatch.filter(trained, scale.names):
            reason = "fits the name of no trained parameter; the first are "
            raise scale.error("names", reason + ", ".join(list(trained)[:4]))
    parted: dict[tuple[float, float], dict[str, Any]] = {}
    group: dict[str, Any]
    for name, parameter in trained.items():
        fits = [s for s in config.scales if fnmatch.fnmatchcase(name, s.names)]
        rate = fits[-1].lr if fits else 1.0
        decay = fits[-1].decay if fits and fits[-1].decay is not None else decays[id(parameter)]
        group = {"params": [], "lr_scale": rate, "weight_decay": decay}
        parted.setdefault((rate, decay), group)["params"].append(parameter)
    return list(parted.values())


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
