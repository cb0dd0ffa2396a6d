"""Where a faster implementation of an op registers; the reference runs whatever no backend takes.

A backend is chosen per call by the device of the first tensor and by its own ``accepts``: the newest registration that
accepts wins. Nothing falls back by catching errors: a kernel that accepted a call and fails, raises. Kernels see
arguments that ``checks.py`` has passed (shapes, types, device), the same as the reference, which is their oracle: a
format, and the operands that :data:`OPS` says.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from . import checks
from .errors import PrequantError
from .formats import WeightFormat

Kernel = Callable[..., Any]
Result = TypeVar("Result")

_LINEAR = ("input", "codes", "scale", "zero_point", "outliers", "bias", "input_scale", "input_zero_point")

OPS = {
    "quantize": ("input", "scale", "zero_point"),
    "dequantize": ("codes", "scale", "zero_point", "columns", "dtype"),
    "dequantize_gradients": ("gradient", "codes", "scale", "zero_point", "needs"),
    "fake_quantize": ("input", "scale", "zero_point"),
    "fake_quantize_gradients": ("gradient", "input", "scale", "zero_point", "scale_gradient", "needs"),
    "dynamic_scale": ("input",),
    "add_outliers": ("weight", "outliers"),
    "packed_linear": (*_LINEAR, "columns", "input_format", "activation", "residual"),
    "packed_linears": ("input", "calls"),
    "packed_embedding": ("ids", "codes", "scale", "zero_point", "outliers", "columns", "dtype"),
}
"""The ops that take backends, and their operands behind the format, which is None for those that have none of their own
(``add_outliers``, ``packed_linears``). Calls of ``dequantize_bcq`` are ``dequantize``'s; gradients are a list of those
that ``needs`` says. ``packed_linears`` gives a list of results; each of its ``calls`` is what ``packed_linear`` gets,
and goes where that one would if no backend takes them together.
"""


@dataclass(frozen=True)
class Backend:
    """A kernel for one op on one device type. ``accepts(format, *arguments)`` sees exactly what the kernel would."""

    name: str
    op: str
    device: str
    accepts: Callable[..., bool]
    kernel: Kernel


_backends: dict[tuple[str, str], list[Backend]] = {}

on_change: list[Callable[[], object]] = []
"""What to call when a backend has come or gone: for those who remember which one took a call."""


class _Recording(threading.local):
    on = False


recording = _Recording()
"""``recording.on``: whether kernels of this thread run on behalf of autograd (:func:`recording_gradients`)."""


@contextlib.contextmanager
def recording_gradients() -> Iterator[None]:
    """Inside, kernels run on behalf of autograd: what they compute will be differentiated."""
    before = recording.on
    recording.on = True
    try:
        yield
    finally:
        recording.on = before


def records_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd, in the call that runs now, wants a gradient for any of ``tensors``."""
    return recording.on and any(t is not None and t.requires_grad for t in tensors)


def register_backend(backend: Backend) -> None:
    """Put ``backend`` before the ones registered so far.

    Raises :class:`PrequantError` for an op that takes no backends, or a name that the op has on that device already.
    """
    if backend.op not in OPS:
        raise PrequantError(f"backend {backend.name!r} is for op {backend.op!r}; backends exist for {list(OPS)}")
    registered = _backends.setdefault((backend.op, backend.device), [])
    if any(other.name == backend.name for other in registered):
        raise PrequantError(f"a backend {backend.name!r} for {backend.op} on {backend.device} is already registered")
    registered.insert(0, backend)
    for changed in on_change:
        changed()


def unregister_backend(backend: Backend) -> None:
    """Take ``backend`` out again. Raises :class:`PrequantError` if it is not registered."""
    registered = _backends.get((backend.op, backend.device), [])
    if backend not in registered:
        raise PrequantError(f"backend {backend.name!r} for {backend.op} on {backend.device} is not registered")
    registered.remove(backend)
    for changed in on_change:
        changed()


def registered_backends(op: str, device: str) -> tuple[str, ...]:
    """Names of the backends that are asked, in that order, before the reference."""
    return tuple(backend.name for backend in _backends.get((op, device), ()))


def is_first(backend: Backend) -> bool:
    """Whether ``backend`` is asked before all others, so that what it accepted once it would be given again."""
    return _backends.get((backend.op, backend.device), [None])[:1] == [backend]


def choose(op: str, format: WeightFormat | None, *arguments: Any) -> Backend | None:
    """The first backend that accepts the call; None for the reference."""
    for backend in _backends.get((op, arguments[0].device.type), ()):
        if backend.accepts(format, *arguments):
            return backend
    return None


def call(op: str, reference: Callable[..., Result], format: WeightFormat | None, *arguments: Any) -> Result:
    """Run the first backend that accepts the call, or else ``reference``.

    Raises :class:`FormatError` where a backend of the CPU would be given tensors that are elsewhere: its kernels follow
    bare pointers.
    """
    backend = choose(op, format, *arguments)
    if backend is None:
        return reference(format, *arguments)
    if backend.device == "cpu":
        checks.one_device(op, dict(zip(OPS[op], arguments, strict=True)))
    kernel: Callable[..., Result] = backend.kernel
    return kernel(format, *arguments)
