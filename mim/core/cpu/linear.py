"""Linear layers by the faster of torch's two libraries for products in float32 on a CPU.

torch hands a product of float32 matrices to MKL, and one of bfloat16 to oneDNN. On processors of
other makes than Intel's, MKL leaves AVX-512 alone and takes twice as long as oneDNN, which does the
same sums in another order (benchmarks/README.md).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

_CPUINFO = Path("/proc/cpuinfo")
_LEAST = 2**23  # multiplications below which calling it from Python takes what it gains


@cache
def has_onednn() -> bool:
    """Whether torch comes with oneDNN's product for this processor."""
    known = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    return known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def mkl_lacks_avx512() -> bool:
    """Whether torch has MKL, and this processor AVX-512 that MKL does not use."""
    if not torch.backends.mkl.is_available():
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not _is_intel()


def takes_onednn(kind: str) -> bool:
    """Whether ``train.linear`` means oneDNN on this machine's CPU."""
    return has_onednn() and (kind == "onednn" or (kind == "auto" and mkl_lacks_avx512()))


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in _CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return "Intel" in platform.processor()


def _product(a: Tensor, b: Tensor, offset: Tensor | None) -> Tensor:
    """a (..., K), b (N, K), offset (N) -> a b' + offset (..., N)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, offset, "none", [], "")
    return product


# torch.compile takes torch's operation for one of inference, whose weights are constants.
_opaque = torch.library.custom_op(
    "mim::onednn_product", _product, mutates_args=(), device_types="cpu"
)


@_opaque.register_fake
def _(a: Tensor, b: Tensor, offset: Tensor | None) -> Tensor:
    return a.new_empty(*a.shape[:-1], len(b))


def _times(a: Tensor, b: Tensor, offset: Tensor | None = None) -> Tensor:
    return (_opaque if torch.compiler.is_compiling() else _product)(a, b, offset)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        # Where this is recorded too, a gradient of the gradient is needed.
        times = F.linear if torch.is_grad_enabled() else _times
        x, g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        (rows, inner), outer = x.shape, g.shape[1]
        by_x = by_weight = None
        if to_x:
            by_x = times(gradient, weight.t())
        if to_weight and rows * inner + inner * outer < rows * outer:
            by_weight = times(x.t(), g.t()).t()  # the first is copied: best that of fewer values
        elif to_weight:
            by_weight = times(g.t(), x.t())
        return by_x, by_weight, g.sum(0) if to_bias else None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``torch.nn.functional.linear`` by oneDNN where it pays: float32, not too small."""
    pays = x.dtype == weight.dtype == torch.float32 and x.numel() * len(weight) >= _LEAST
    if not pays or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`onednn_linear`; weights and their names are the same."""

    def forward(self, input: Tensor) -> Tensor:
        return onednn_linear(input, self.weight, self.bias)


class PatchProjection(nn.Conv2d):
    """``nn.Conv2d`` as ever, whose weights :func:`linear_of` multiplies by oneDNN."""


def linear_of(module: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Choose what multiplies by a module's weights where the module itself is not called."""
    return onednn_linear if isinstance(module, (Linear, PatchProjection)) else F.linear


def _operations(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(x) * int(weight[0])


if has_onednn():
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)
