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


def register_gradient(name: str, setup: Setup, backward: Backward) -> None:
    """Give op ``name`` a backward."""
    op = getattr(torch.ops.prequant, name).default
    # The dispatcher leaves out what has its default at the end of the arguments, and options that have theirs.
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    names = [a.name for a in op._schema.arguments if not a.kwarg_only]

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, options: dict[str, Any], *arguments: Any) -> Tensor:
            named = dict(zip(names, arguments, strict=False))
            setup(ctx, ctx.needs_input_grad[2:], arguments, {**defaults, **named, **options})
            with recording_gradients():
                return _below_autograd(op, keyset, arguments, options)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
            needs = ctx.needs_input_grad[2:]
            gradients = backward(ctx, needs, gradient)
            return None, None, *gradients, *(None,) * (len(needs) - len(gradients))

    def differentiable(keyset: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        return Gradient.apply(keyset, options, *arguments)

    _register(name, differentiable)


def register_composite(name: str, composite: Callable[..., Any]) -> None:
    """While gradients are recorded, make a call of op ``name`` one of ``composite``, whose ops have gradients."""

    def differentiable(keyset: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return composite(*arguments, **options)

    _register(name, differentiable)


def _register(name: str, differentiable: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Register what runs where gradients are recorded; elsewhere the op's own kernel does."""
    op = getattr(torch.ops.prequant, name).default
    kernels: dict[int, Callable[..., Any] | None] = {}

    def autograd_kernel(keyset: Any, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return differentiable(keyset, arguments, options)
        keys = keyset.raw_repr()
        if keys not in kernels:
            kernels[keys] = _plain_kernel(name, keyset)
        if (kernel := kernels[keys]) is not None:
            return kernel(*arguments, **options)
        return _below_autograd(op, keyset, arguments, options)

    ops.library.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def _plain_kernel(name: str, keyset: Any) -> Callable[..., Any] | None:
    """The kernel of a call on plain tensors; None where another key is on top (a tracer, a subclass)."""
    key = (keyset & torch._C._after_autograd_keyset).highestPriorityTypeId()
    if key == torch._C.DispatchKey.CPU:
        return ops.CPU_KERNELS.get(name, ops.KERNELS[name])
    return ops.KERNELS[name] if key == torch._C.DispatchKey.CUDA else None


def register_constant(name: str) -> None:
    """Make the result of op ``name`` a constant to autograd, whatever its arguments."""
    op = getattr(torch.ops.prequant, name).default

    def autograd_kernel(keyset: Any, *arguments: Any, **options: Any) -> Tensor:
        return _below_autograd(op, keyset, arguments, options)

    ops.library.impl(name, autograd_kernel, "Autograd", with_keyset=True)


def _below_autograd(op: Any, keyset: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **options)
