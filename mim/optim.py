"""The optimizer's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from mim.config import OptimConfig

# Vectors that timm's rule (no decay for one-dimensional parameters) does not see.
_NO_DECAY = ("layer_weights", "cls_token", "reg_token", "dist_token", "mask_token")
_NO_DECAY_POSITIONS = ("pos_embed", "pos_embed_x", "pos_embed_y")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a half cosine (MAE, arXiv:2111.06377).

    Attributes:
        peak: the highest learning rate.
        low: where it ends.
        warmup: steps of warm-up.
        total: steps of the run.
    """

    peak: float
    low: float
    warmup: float
    total: int

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(self.total - self.warmup, 1)
        return self.low + (self.peak - self.low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def build_schedule(
    config: OptimConfig, batch_size: int, total: int, steps_per_epoch: int
) -> Schedule:
    """The schedule of a run; its peak is ``base_lr * batch_size / 256``."""
    warmup = min(config.warmup_epochs * steps_per_epoch, total / 2)
    return Schedule(config.base_lr * batch_size / 256, config.min_lr, warmup, total)


def build_optimizer(config: OptimConfig, model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW; biases, norms, tokens and position embeddings have no weight decay."""
    vectors = _NO_DECAY + _NO_DECAY_POSITIONS
    names = [name for name, _ in model.named_parameters() if name.split(".")[-1] in vectors]
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=names)
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)
