"""Attaching a gradient to an op of ``ops.py``.

``torch.library.register_autograd`` does this in general. What follows knows its ops (tensors and numbers by position,
options by keyword, one result), which leaves less to do at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import recording_gradients

Setup = Callable[[Any, Sequence[bool], tuple[Any, ...], dict[str, Any]], None]
"""``(ctx, needs, arguments, options)``: save what backward reads. ``needs`` says which arguments want a gradient."""

Backward = Callable[[Any, Sequence[bool], Tensor], "tuple[Tensor | None, ...]"]
"""``(ctx, needs, gradient)``: a gradient, or None, for each positional argument."""

# What is left of a call on plain tensors. With any other key on top (a tracer, a subclass) the dispatcher is asked.
_PLAIN = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)


def register_gradient(name: str, setup: Setup, backward: Backward) -> None:
    """Give op ``name`` a backward."""
    op, kernel = getattr(torch.ops.prequant, name).default, ops.KERNELS[name]
    # The dispatcher leaves out options that have their default.
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.kwarg_only and a.has_default_value()}

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, options: dict[str, Any], *arguments: Any) -> Tensor:
            setup(ctx, ctx.needs_input_grad[2:], arguments, {**defaults, **options})
            with recording_gradients():
                return _below_autograd(op, keyset, arguments, options)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
            return None, None, *backward(ctx, ctx.needs_input_grad[2:], gradient)

    def autograd_kernel(keyset: Any, *arguments: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Gradient.apply(keyset, options, *arguments)
        if (keyset & torch._C._after_autograd_keyset).highestPriorityTypeId() in _PLAIN:
            return kernel(*arguments, **options)
        return _below_autograd(op, keyset, arguments, options)

    ops.library.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def register_constant(name: str) -> None:
    """Make the result of op ``name`` a constant to autograd, whatever its arguments."""
    op = getattr(torch.ops.prequant, name).default

    def autograd_kernel(keyset: Any, *arguments: Any, **options: Any) -> Tensor:
        return _below_autograd(op, keyset, arguments, options)

    ops.library.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def _below_autograd(op: Any, keyset: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **options)
