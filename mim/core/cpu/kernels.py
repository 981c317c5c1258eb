"""Which kernels compute a model; the numbers are the same up to rounding."""

from __future__ import annotations

import torch
from torch import nn

from mim.core.cpu.linear import Linear, PatchProjection, takes_onednn


def tune(
    model: nn.Module,
    device: torch.device,
    precision: str = "fp32",
    *,
    attention: str = "auto",
    linear: str = "auto",
) -> None:
    """Choose the kernels of a model's attention and linear layers; both change in place.

    Args:
        model: of timm's modules.
        device: where it runs.
        precision: fp32, bf16, fp16 or fp8.
        attention: one fused operation (``fused``), products of matrices (``plain``), or ``auto``.
            On a CPU in bfloat16 torch's fused kernel takes longer than plain products
            (benchmarks/README.md), so there auto is plain, and elsewhere fused.
        linear: torch's own choice of library (``torch``), ``onednn`` in float32 on a CPU, or
            ``auto``: oneDNN where :func:`mim.core.cpu.linear.mkl_lacks_avx512`.
    """
    is_slow = device.type == "cpu" and precision in ("bf16", "fp8")
    is_fused = attention == "fused" or (attention == "auto" and not is_slow)
    by_onednn = device.type == "cpu" and precision == "fp32" and takes_onednn(linear)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", is_fused)  # noqa: B010 (timm declares no type)
        for plain, ours in ((nn.Linear, Linear), (nn.Conv2d, PatchProjection)):
            if type(module) in (plain, ours):
                module.__class__ = ours if by_onednn else plain
