"""Rows of packed codes become floats on the native kernels, to the last bit those of the reference.

Behind ``dequantize``, ``packed_embedding``, and ``packed_linear`` where gradients for the weight are recorded:
they read the neutral layout, so nothing is packed for them, and a weight may change from call to call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native, reference
from .backends import Backend, records_gradients, register_backend
from .formats import WeightFormat
from .native_weight import NeutralWeight
from .reference import Outliers

GROUP_MULTIPLE = 8
"""Groups that the kernels take are multiples of so many columns."""


def accepts(format: WeightFormat, scale: Tensor) -> bool:
    """Whether the kernels can unpack a weight of that format and those scales."""
    on = native.chosen_isa() != native.REFERENCE
    return on and scale.dtype is torch.float32 and not format.group_size % GROUP_MULTIPLE


def _accepts_dequantize(format: WeightFormat, codes: Tensor, scale: Tensor, *_: object) -> bool:
    return accepts(format, scale)


def _dequantize(
    format: WeightFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    return _rows(format, None, codes, scale, zero_point, columns).to(dtype)


def _accepts_embedding(format: WeightFormat, ids: Tensor, codes: Tensor, scale: Tensor, *_: object) -> bool:
    return accepts(format, scale)


def _packed_embedding(
    format: WeightFormat,
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    taken = _rows(format, flat, codes, scale, zero_point, columns)
    if outliers is not None:
        reference.add_outliers_(taken, reference.taken_outliers(flat, outliers))
    return taken.reshape(*ids.shape, columns).to(dtype)


def _accepts_trained_linear(
    format: WeightFormat,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    *_: object,
) -> bool:
    trained = (scale, zero_point, None if outliers is None else outliers.values)
    return accepts(format, scale) and records_gradients(*trained)


def _trained_linear(
    format: WeightFormat,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    columns: int,
    input_format: WeightFormat | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    weight = _rows(format, None, codes, scale, zero_point, columns)
    if outliers is not None:
        reference.add_outliers_(weight, outliers)
    return reference.unpacked_linear(
        weight, input, bias, input_scale, input_zero_point, input_format, activation, residual
    )


def _rows(
    format: WeightFormat, rows: Tensor | None, codes: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int
) -> Tensor:
    weight = NeutralWeight(format, codes, scale, zero_point, columns)
    count = codes.shape[-2] if rows is None else rows.shape[0]
    out = torch.empty(count, columns, dtype=torch.float32, device="cpu")
    status = native.load().prequant_dequantize(
        *(weight.address, None if rows is None else rows.data_ptr(), count, out.data_ptr()),
        *(torch.get_num_threads(), native.chosen_isa().encode()),
    )
    if status == native.BAD_ROW and rows is not None:
        reference.check_ids(rows, codes.shape[-2])
    native.check(status, f"unpacking a weight {list(codes.shape)} of {format}")
    return out


TRAINED_LINEAR = Backend("native rows", "packed_linear", "cpu", _accepts_trained_linear, _trained_linear)
"""Registered in native_linear.py, which knows the order of the two."""

register_backend(Backend("native", "dequantize", "cpu", _accepts_dequantize, _dequantize))
register_backend(Backend("native", "packed_embedding", "cpu", _accepts_embedding, _packed_embedding))
