"""Where the Triton kernels stand among the backends: for CUDA tensors, and on request for those on the CPU.

This module knows no Triton: the kernels are imported when one of them first takes a call.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import OPS, Backend, choose, register_backend, unregister_backend
from ..errors import FormatError
from ..formats import Granularity, Scheme, WeightFormat
from ..reference import Outliers
from . import availability

NAME = "triton"

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Types of inputs, and of scales, that the kernels take."""

COMPUTED = ("input", "scale")
"""Operands that a kernel computes with in their own type."""


def _accepts(format: WeightFormat, first: Tensor, *_: object) -> bool:
    # Types that the kernel does not take are refused when it is called: the reference would be slow, and say nothing.
    return availability.run_on(first.device)


def _accepts_linears(format: None, input: Tensor, calls: Sequence[tuple[Any, ...]]) -> bool:
    chosen = [choose("packed_linear", *each) for each in calls]
    return all(backend is not None and backend.name == NAME for backend in chosen)


def _accepts_rounding(format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    operands = [input, scale] if zero_point is None else [input, scale, zero_point]
    fits = zero_point is None or zero_point.shape == scale.shape
    taken = all(tensor.dtype in FLOATS for tensor in operands) and input.numel() > 0
    return fits and taken and availability.run_on(input.device)


def _accepts_rounding_gradients(format: WeightFormat, gradient: Tensor, *operands: Any) -> bool:
    return gradient.dtype in FLOATS and _accepts_rounding(format, *operands[:3])


def _accepts_dynamic_scale(format: WeightFormat, input: Tensor) -> bool:
    # The reference says what is wrong with other formats.
    taken = format.scheme is Scheme.AFFINE and format.symmetric and format.granularity is not Granularity.GROUP
    return taken and input.dtype in FLOATS and input.numel() > 0 and availability.run_on(input.device)


def _accepts_unpacking_gradients(
    format: WeightFormat, gradient: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, needs: object
) -> bool:
    operands = [gradient, scale] if zero_point is None else [gradient, scale, zero_point]
    taken = all(tensor.dtype in FLOATS for tensor in operands) and gradient.numel() > 0
    return taken and availability.run_on(gradient.device)


def _accepts_outliers(format: None, weight: Tensor, outliers: Outliers) -> bool:
    # A weight in half precision would have its sum rounded otherwise.
    return weight.dtype is torch.float32 and outliers.values.dtype in FLOATS and availability.run_on(weight.device)


def check_operands(op: str, operands: Sequence[Any]) -> None:
    """Raise :class:`FormatError` where the operands of an op behind its format are not on one device, or of types that
    its kernel does not take.
    """
    named = dict(zip(OPS[op], operands, strict=True))
    checks.one_device(op, named)
    for name in COMPUTED:
        if name in named and named[name].dtype not in FLOATS:
            raise FormatError(
                f"{op}: no kernel takes {name} of {named[name].dtype} on {named[name].device}: convert it to one "
                f"of {', '.join(map(str, FLOATS))}, or set PREQUANT_ISA=reference"
            )


def kernel_of(op: str) -> Callable[..., Any]:
    """The kernel of an op, in a module that imports Triton: once a call comes whose operands it can take."""

    def call(format: WeightFormat | None, *operands: Any) -> Any:
        function = getattr(importlib.import_module(f"{__package__}.{MODULES[op]}"), op)
        check_operands(op, operands)
        return function(format, *operands)

    return call


MODULES = {
    "packed_linear": "linear",
    "packed_linears": "linear",
    "packed_embedding": "rows",
    "dequantize": "rows",
    "dequantize_gradients": "gradients",
    "add_outliers": "rows",
    "quantize": "simulated",
    "fake_quantize": "simulated",
    "fake_quantize_gradients": "simulated",
    "dynamic_scale": "simulated",
}
"""Where the kernel of each op stands."""

_ACCEPTS: dict[str, Callable[..., bool]] = {
    "packed_linears": _accepts_linears,
    "dequantize_gradients": _accepts_unpacking_gradients,
    "add_outliers": _accepts_outliers,
    "quantize": _accepts_rounding,
    "fake_quantize": _accepts_rounding,
    "fake_quantize_gradients": _accepts_rounding_gradients,
    "dynamic_scale": _accepts_dynamic_scale,
}


def _backends_for(device: str) -> tuple[Backend, ...]:
    return tuple(Backend(NAME, op, device, _ACCEPTS.get(op, _accepts), kernel_of(op)) for op in MODULES)


for _backend in _backends_for("cuda"):
    register_backend(_backend)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, calls on the CPU go to the same kernels, which Triton runs as Python: to test them, slowly.

    Raises :class:`~.availability.TritonError` where Triton is missing, or has not been told to interpret.
    """
    availability.check_interpreted()
    backends = _backends_for("cpu")
    for backend in backends:
        register_backend(backend)
    try:
        yield
    finally:
        for backend in backends:
            unregister_backend(backend)
