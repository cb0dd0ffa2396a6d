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
from ..backends import Backend, choose, register_backend, unregister_backend
from ..formats import Granularity, Scheme, WeightFormat
from ..reference import Outliers
from . import availability

NAME = "triton"

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Types of inputs, and of scales, that the kernels take."""


def _accepts_linear(format: WeightFormat, input: Tensor, codes: Tensor, scale: Tensor, *_: object) -> bool:
    return input.dtype in FLOATS and scale.dtype in FLOATS and availability.run_on(input.device)


def _accepts_linears(format: None, input: Tensor, calls: Sequence[tuple[Any, ...]]) -> bool:
    chosen = [choose("packed_linear", *each) for each in calls]
    return all(backend is not None and backend.name == NAME for backend in chosen)


def _accepts_rows(format: WeightFormat, first: Tensor, *operands: Any) -> bool:
    scale = next(tensor for tensor in operands if isinstance(tensor, Tensor) and tensor.is_floating_point())
    return scale.dtype in FLOATS and availability.run_on(first.device)


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


def _kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that imports Triton, once its tensors are known to be on one device."""

    def call(format: WeightFormat | None, *operands: Any) -> Any:
        checks.one_device(operands)
        function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return function(format, *operands)

    return call


_KERNELS = (
    ("packed_linear", _accepts_linear, _kernel("linear", "packed_linear")),
    ("packed_linears", _accepts_linears, _kernel("linear", "packed_linears")),
    ("packed_embedding", _accepts_rows, _kernel("rows", "packed_embedding")),
    ("dequantize", _accepts_rows, _kernel("rows", "dequantize")),
    ("dequantize_gradients", _accepts_unpacking_gradients, _kernel("gradients", "dequantize_gradients")),
    ("add_outliers", _accepts_outliers, _kernel("rows", "add_outliers")),
    ("quantize", _accepts_rounding, _kernel("simulated", "quantize")),
    ("fake_quantize", _accepts_rounding, _kernel("simulated", "fake_quantize")),
    ("fake_quantize_gradients", _accepts_rounding_gradients, _kernel("simulated", "fake_quantize_gradients")),
    ("dynamic_scale", _accepts_dynamic_scale, _kernel("simulated", "dynamic_scale")),
)

CUDA = tuple(Backend(NAME, op, "cuda", accepts, kernel) for op, accepts, kernel in _KERNELS)
for _backend in CUDA:
    register_backend(_backend)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, calls on the CPU go to the same kernels, which Triton runs as Python: to test them, slowly.

    Raises :class:`~.availability.TritonError` where Triton is missing, or has not been told to interpret.
    """
    availability.check_interpreted()
    backends = [Backend(NAME, op, "cpu", accepts, kernel) for op, accepts, kernel in _KERNELS]
    for backend in backends:
        register_backend(backend)
    try:
        yield
    finally:
        for backend in backends:
            unregister_backend(backend)
