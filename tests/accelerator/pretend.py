"""A device that is none: real tensors on the CPU behind the rules of an accelerator.

A :class:`PretendTensor` says that it lies on ``pretend:0``, computes by a tensor on the CPU, and
refuses to meet one that lies there. What would make the host wait for an accelerator is noted with
the place in ``mim`` that asked for it: a value that is read, a shape that depends on values, a copy
to the host, and a copy from the host that is not announced (``non_blocking``) or does not come from
pinned memory. What it cannot show is time, and kernels of another arithmetic.
"""

from __future__ import annotations

import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

import mim

NAME = "pretend"
_ROOT = Path(mim.__file__).parent
_ATEN = torch.ops.aten

_READS = {  # the host needs a value, or a shape that follows from values
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::nonzero_static",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave",
    "aten::linalg_eigh",
    "aten::_linalg_eigh",
    "torchvision::nms",
}
_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


@dataclass(frozen=True)
class Wait:
    """One place at which the host would wait."""

    place: str
    """``mim/training/trainer.py Trainer._read``, or ``elsewhere``."""
    line: int
    what: str

    @property
    def code(self) -> str:
        """The line that waited."""
        return linecache.getline(str(_ROOT.parent / self.place.split()[0]), self.line).strip()

    def __str__(self) -> str:
        return f"{self.place} (line {self.line}): {self.what}"


@dataclass
class Pretend:
    """What was noted since the device is in use."""

    waits: list[Wait] = field(default_factory=list)
    pinned: list[torch.UntypedStorage] = field(default_factory=list)
    calls: list[tuple[str, tuple[tuple[int, ...], ...]]] = field(default_factory=list)
    """Operations on the device in their order, with the shapes of what they made."""
    made: weakref.WeakValueDictionary[int, PretendTensor] = field(
        default_factory=weakref.WeakValueDictionary
    )

    @property
    def allocated(self) -> int:
        """Bytes that lie on the device."""
        storages = [tensor.inner.untyped_storage() for tensor in self.made.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def places(self) -> Counter[str]:
        """How often each place waited."""
        return Counter(wait.place for wait in self.waits)

    def note(self, what: str) -> None:
        frame = sys._getframe()
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_ROOT):
                place = f"mim/{path.relative_to(_ROOT).as_posix()} {frame.f_code.co_qualname}"
                self.waits.append(Wait(place, frame.f_lineno, what))
                return
            frame = frame.f_back  # type: ignore[assignment]
        self.waits.append(Wait("elsewhere", 0, what))

    def is_pinned(self, tensor: Tensor) -> bool:
        pointer = tensor.untyped_storage().data_ptr()
        return any(kept.data_ptr() == pointer for kept in self.pinned)


_current = Pretend()
_in_use = 0


class PretendTensor(Tensor):
    """A tensor on the pretend device; ``inner`` holds its numbers on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        _current.made[id(made)] = made
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        found: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return found

    @data.setter
    def data(self, value: PretendTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"


class _Mode(TorchDispatchMode):
    """Sees what has no tensor on the device yet: what makes one, or pins one."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


def _is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat, form = tree_flatten((args, kwargs))
    given = [value for value in flat if isinstance(value, Tensor)]
    here = [value for value in given if isinstance(value, PretendTensor)]
    asked = any(isinstance(v, torch.device) and v.type == NAME for v in flat)
    if not here and not asked:
        if name == "aten::_pin_memory":
            copied = args[0].clone()
            _current.pinned.append(copied.untyped_storage())
            return copied
        if name == "aten::is_pinned":
            return _current.is_pinned(args[0])
        return func(*args, **kwargs)
    if name == "aten::is_pinned":
        return False
    _check_devices(name, given)
    leaves = _waits(name, args, kwargs, flat, here)
    args_in, kwargs_in = tree_unflatten([_inner(value) for value in flat], form)
    found = func(*args_in, **kwargs_in)
    shapes = tuple(tuple(v.shape) for v in tree_flatten(found)[0] if isinstance(v, Tensor))
    _current.calls.append((name, shapes))
    if leaves:
        return args[0] if name == "aten::copy_" else found
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return tree_map(lambda v: PretendTensor(v) if isinstance(v, Tensor) else v, found)


def _inner(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.inner
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments that an operation in place, or with ``out``, returns; None for the others."""
    returns = func._schema.returns
    if not returns or not all(r.alias_info is not None and r.alias_info.is_write for r in returns):
        return None
    names = {next(iter(r.alias_info.before_set)): place for place, r in enumerate(returns)}
    found: dict[int, Any] = {}
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        place = names.get(next(iter(argument.alias_info.before_set)))
        if place is not None:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found[place] = given
    return found[0] if len(returns) == 1 else tuple(found[i] for i in range(len(returns)))


def _check_devices(name: str, given: list[Tensor]) -> None:
    """As CUDA: single numbers from the CPU are welcome, and so are indices."""
    if name in _COPIES or name in _INDEXES:
        return
    strangers = [t for t in given if not isinstance(t, PretendTensor) and t.dim() > 0]
    if strangers:
        shapes = [tuple(t.shape) for t in strangers]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu "
            f"({name}, on the cpu {shapes})"
        )


def _waits(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any], here: list[Any]
) -> bool:
    """Notes a wait; returns whether the result lies on the CPU."""
    if name in _READS:
        if name != "aten::repeat_interleave" or kwargs.get("output_size") is None:
            _current.note(name)
    elif name in _INDEXES:
        indices = [t for t in tree_flatten(args[1])[0] if isinstance(t, Tensor)]
        if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            _current.note(f"{name} by flags")
        if any(not isinstance(t, PretendTensor) for t in indices):
            _current.note(f"{name} by indices on the host")
    elif name == "aten::_to_copy":
        target = kwargs.get("device")
        if isinstance(args[0], PretendTensor):
            if target is not None and not _is_pretend(target):
                _current.note("copy to the host")
                return True
        else:
            _from_host(args[0], bool(kwargs.get("non_blocking")))
    elif name == "aten::copy_":
        into, source = args[0], args[1]
        quick = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        if not isinstance(into, PretendTensor):
            _current.note("copy to the host")
            return True
        if not isinstance(source, PretendTensor):
            _from_host(source, quick)
    elif name == "aten::_local_scalar_dense":
        return True
    return False


def _from_host(source: Tensor, non_blocking: bool) -> None:
    if not non_blocking:
        _current.note("blocking copy from the host")
    elif not _current.is_pinned(source):
        _current.note("copy from the host, not pinned")


# What CUDA's autocast computes in 16 bits, and in 32; the rest takes its inputs as they come.
_NARROW = (
    *("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv2d", "convolution"),
    *("_convolution", "conv_transpose2d.input", "scaled_dot_product_attention"),
)
_WIDE = (
    *("layer_norm", "group_norm", "softmax.int", "log_softmax.int", "exp", "log", "rsqrt"),
    *("pow.Tensor_Scalar", "sum", "sum.dim_IntList", "mse_loss", "smooth_l1_loss", "l1_loss"),
    *("cosine_similarity", "nll_loss", "cross_entropy_loss", "logsumexp", "norm.Scalar"),
    *("binary_cross_entropy_with_logits", "cumsum", "prod"),
)


def _register_autocast() -> list[torch.library.Library]:
    everything = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel)
    aten = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for names, wide in ((_NARROW, False), (_WIDE, True)):
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(_ATEN, packet), overload or "default")
            aten.impl(name, _autocast(operation, wide))
    return [everything, aten]


def _autocast(operation: Any, wide: bool) -> Any:
    def cast(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.float32 if wide else torch.get_autocast_dtype(NAME)

        def one(value: Any) -> Any:
            known = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if known and value.dtype != torch.float64 else value

        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        ):
            return operation(*tree_map(one, args), **tree_map(one, kwargs))

    return cast


_libraries: list[torch.library.Library] = []  # what they register ends with them


class _Hook(_DummyPrivateUse1Hook):
    """Says that there is no accelerator where none is in use: other tests are of the CPU."""

    def is_available(self) -> bool:
        return _in_use > 0


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Draws come from the CPU's generator."""

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def _is_in_bad_fork(self) -> bool:
        return False


def device() -> torch.device:
    """The device, which torch knows from the first call on."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
        _libraries.extend(_register_autocast())
    return torch.device(NAME, 0)


@contextmanager
def pretending() -> Iterator[Pretend]:
    """The device in use; yields what is noted."""
    global _current, _in_use
    device()
    before, _current = _current, Pretend()
    _in_use += 1
    # As FakeTensorMode does: ``torch.tensor(1, device=...)`` then makes its copy where it is seen.
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield _current
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        _current = before
        _in_use -= 1
