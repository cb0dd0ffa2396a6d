"""Rounding to the levels of a format, and its gradients, on the native kernels.

Behind ``fake_quantize`` and ``fake_quantize_gradients``: each is one pass over its operands, in place of a dozen.
Values and the gradients to inputs are the reference's, to the last bit; what sums up, the gradients to scales and zero
points, is added up in double.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, reference
from .backends import Backend, register_backend
from .formats import Granularity, WeightFormat
from .native_weight import address_of, float_copy

SHARED_RUN = 4096
"""So many elements of those that all share one scale are a row to the kernels, which share rows out to threads."""


def _accepts(format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> bool:
    floats = all(t is None or (t.dtype is torch.float32 and t.is_cpu) for t in (input, scale, zero_point))
    if not floats or not input.numel() or native.chosen_isa() == native.REFERENCE:
        return False
    if zero_point is not None and zero_point.shape != scale.shape:
        return False
    # The same scales for all rows, or each row its own: nothing between.
    return _shared(format, scale) or scale.shape[:-1] == input.shape[:-1]


def _shared(format: WeightFormat, scale: Tensor) -> bool:
    return format.granularity is Granularity.TENSOR or scale.numel() == scale.shape[-1]


def _fake_quantize(format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    elements = input.contiguous()
    rounding = _Rounding(format, elements, scale, zero_point)
    out = torch.empty_like(elements)
    status = native.load().prequant_round(
        *(rounding.address, elements.data_ptr(), out.data_ptr()),
        *(torch.get_num_threads(), native.chosen_isa().encode()),
    )
    native.check(status, f"rounding {list(input.shape)} to {format}")
    return out if elements is input else torch.empty_like(input).copy_(out)


def _accepts_gradients(
    format: WeightFormat, gradient: Tensor, input: Tensor, scale: Tensor, zero_point: Tensor | None, *_: object
) -> bool:
    return gradient.dtype is torch.float32 and _accepts(format, input, scale, zero_point)


def _fake_quantize_gradients(
    format: WeightFormat,
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scale_gradient: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    gradient, elements = gradient.contiguous(), input.contiguous()
    rounding = _Rounding(format, elements, scale, zero_point)
    to_input = torch.empty_like(elements) if needs[0] else None
    to_scale, to_zero_point = (
        torch.empty(rounding.rows, rounding.groups, dtype=torch.float64) if wanted else None for wanted in needs[1:]
    )
    status = native.load().prequant_round_gradients(
        *(rounding.address, gradient.data_ptr(), elements.data_ptr()),
        *(address_of(to_input), address_of(to_scale), address_of(to_zero_point)),
        *(torch.get_num_threads(), native.chosen_isa().encode()),
    )
    native.check(status, f"the gradients of rounding {list(input.shape)} to {format}")
    factor = reference.lsq_factor(input, scale, format) if scale_gradient else 1.0
    found = [] if to_input is None else [to_input]
    if to_scale is not None:
        to_magnitude = rounding.per_scale(to_scale)
        found.append((torch.where(scale < 0, -to_magnitude, to_magnitude) * factor).to(scale.dtype))
    if to_zero_point is not None:
        clipped = rounding.per_scale(to_zero_point) * reference.positive_scale(scale, format)
        found.append((clipped * -factor).to(scale.dtype))
    return found


class _Rounding:
    """``prequant_rounding`` for a contiguous input; :attr:`address` is good for as long as this lives."""

    def __init__(self, format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self._scales, self._zeros = float_copy(scale), float_copy(zero_point)
        self._shape, self._shared = scale.shape, _shared(format, scale)
        columns, group_size = input.shape[-1], format.group_size
        if scale.numel() == 1:
            columns, group_size = SHARED_RUN, 0
        self.rows = -(-input.numel() // columns)
        self.groups = -(-columns // group_size) if group_size else 1
        self._structure = native.Rounding(
            elements=input.numel(),
            columns=columns,
            group_size=group_size,
            levels=format.levels,
            shared_scale=self._shared,
            scales=address_of(self._scales),
            zeros=address_of(self._zeros),
        )
        self.address = ctypes.addressof(self._structure)

    def per_scale(self, sums: Tensor) -> Tensor:
        """Sums of each row, ``[rows, groups]``, as those of each scale."""
        return (sums.sum(0) if self._shared else sums).reshape(self._shape)


register_backend(Backend("native", "fake_quantize", "cpu", _accepts, _fake_quantize))
register_backend(Backend("native", "fake_quantize_gradients", "cpu", _accepts_gradients, _fake_quantize_gradients))
