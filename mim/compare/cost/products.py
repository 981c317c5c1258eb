"""What a step's matrix products take alone: the time that no rewriting around them can beat."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mim.core.cpu.linear import has_onednn

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    (
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.convolution.default,
        _aten.convolution_backward.default,
        *((torch.ops.mkldnn._linear_pointwise.default,) if has_onednn() else ()),
    )
)


class _Operand(NamedTuple):
    """A tensor's form, without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Recorder(TorchDispatchMode):
    """Notes the form of every product that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _PRODUCTS:
            forms = tree_map(_form, args)
            frozen = tuple(tuple(arg) if isinstance(arg, list) else arg for arg in forms)
            self.calls[(func, frozen)] += 1
        return func(*args, **(kwargs or {}))


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Operand(tuple(value.shape), value.stride(), value.dtype, value.device)
    return value


def _filled(value: Any) -> Any:
    if isinstance(value, _Operand):
        # Through the memory below it: an expanded tensor cannot be written to.
        size = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
        memory = torch.randn(max(size, 0), device=value.device).to(value.dtype)
        return memory.as_strided(value.shape, value.stride)
    return list(value) if isinstance(value, tuple) else value


def products_of(step: Callable[[], Any]) -> Callable[[Callable[[], None]], float]:
    """Record the products of a step; returns what times them alone.

    Attention is taken as two products, however the step computes it. Each product runs on operands
    of its own, of the same form, as often as in the step, after one run that does not count.

    Args:
        step: forward and backward.

    Returns:
        A function that runs them and gives seconds; its argument waits for the device.
    """
    with _Recorder() as recorder, sdpa_kernel(SDPBackend.MATH):
        step()
    ready = [
        (func, [_filled(arg) for arg in args], number)
        for (func, args), number in recorder.calls.items()
    ]

    def measure(wait: Callable[[], None]) -> float:
        seconds = 0.0
        for func, args, number in ready:
            func(*args)
            wait()
            began = time.perf_counter()
            for _ in range(number):
                func(*args)
            wait()
            seconds += time.perf_counter() - began
        return seconds

    return measure
