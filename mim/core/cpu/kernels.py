"""Which kernels compute a model; the numbers are the same up to rounding."""

from __future__ import annotations

import torch
from torch import nn

from mim.core.config import TrainConfig
from mim.core.cpu.linear import use_linear

ATTENTION = ("auto", "fused", "plain")


def use_attention(model: nn.Module, kind: str, device: torch.device, precision: str) -> None:
    """Let all attention of timm's modules run as one fused operation or as plain products.

    Args:
        model: its modules are changed in place.
        kind: fused, plain, or auto. On a CPU in bfloat16 torch's fused kernel takes longer than
            plain products (benchmarks/README.md), so there auto is plain, and elsewhere fused.
        device: where the model runs.
        precision: fp32, bf16, fp16 or fp8, whose attention is that of bf16.
    """
    is_fused = kind == "fused" or (
        kind == "auto" and not (device.type == "cpu" and precision in ("bf16", "fp8"))
    )
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", is_fused)  # noqa: B010 (timm declares no type)


def use_kernels(model: nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Let a model's attention and linear layers run as ``train`` says, by measurement on auto.

    Args:
        model: its modules are changed in place.
        train: ``attention``, ``linear`` and ``precision`` count.
        device: where the model runs.
    """
    use_attention(model, train.attention, device, train.precision)
    use_linear(model, train.linear, device, train.precision)
