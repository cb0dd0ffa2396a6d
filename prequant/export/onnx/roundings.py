"""Quantized activations: QuantizeLinear and DequantizeLinear where they say the same, else the arithmetic itself.

8 bits, dynamic                  divided by the scale, which is computed, QuantizeLinear by 1, and multiplied again
8 bits, static                   QuantizeLinear to int8; to uint8 with a zero point that is an integer
fewer bits, other zero points    ``(clip(round(x / s + z), 0, levels - 1) - z) * s`` in elementary operators
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from prequant.runtime import Granularity, WeightFormat

from ..errors import ExportError
from .builder import Builder

TINY = float(np.finfo(np.float32).tiny)


def round_dynamic(builder: Builder, input: ir.Value, text: str) -> ir.Value:
    """The input on a grid that just covers each token (or the whole tensor): ``max|x| / (2^(bits-1) - 1)``."""
    format = WeightFormat.parse(text)
    per_token = format.granularity is Granularity.ROW
    magnitude = builder.op("Abs", input)
    axes = (builder.constant([-1]),) if per_token else ()
    extent = builder.op("ReduceMax", magnitude, *axes, keepdims=1)
    scale = builder.op("Div", extent, builder.constant(2 ** (format.bits - 1) - 1, np.float32))
    flat = builder.op("Less", scale, builder.constant(TINY, np.float32))
    scale = builder.op("Where", flat, builder.constant(1, np.float32), scale)
    if format.bits != 8:
        return _rounded(builder, input, scale, builder.constant(format.implied_zero_point, np.float32), format)
    # Blocks of QuantizeLinear would say it in two nodes; ONNX Runtime 1.31 moves transpositions past them, and fails.
    units = _quantized(builder, builder.op("Div", input, scale), builder.constant(1, np.float32))
    return builder.op("Mul", units, scale)


def round_static(
    builder: Builder, input: ir.Value, scale: ir.Value, zero_point: ir.Value | None, text: str, where: str
) -> ir.Value:
    """The input on a grid with a given scale, whose magnitude counts. Raises :class:`ExportError` for one that is
    computed in a way ONNX has no form for.
    """
    format = WeightFormat.parse(text)
    if format.granularity is not Granularity.TENSOR or scale.const_value is None:
        raise ExportError(f"{where} quantizes its input to {text} with scales that are computed: no form in ONNX")
    step = max(abs(float(scale.const_value.numpy().reshape(-1)[0])), TINY)
    zero = format.implied_zero_point
    if zero_point is not None:
        assert zero_point.const_value is not None
        zero = float(zero_point.const_value.numpy().reshape(-1)[0])
    stored = builder.constant(step, np.float32)
    if format.bits == 8 and zero == 128:
        return _quantized(builder, input, stored)
    if format.bits == 8 and zero.is_integer() and 0 <= zero <= 255:
        return _quantized(builder, input, stored, builder.constant(int(zero), np.uint8))
    return _rounded(builder, input, stored, builder.constant(zero, np.float32), format)


def _quantized(builder: Builder, input: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None) -> ir.Value:
    zero_point = builder.constant(0, np.int8) if zero_point is None else zero_point
    codes = builder.op("QuantizeLinear", input, scale, zero_point)
    return builder.op("DequantizeLinear", codes, scale, zero_point)


def _rounded(builder: Builder, input: ir.Value, scale: ir.Value, zero: ir.Value, format: WeightFormat) -> ir.Value:
    codes = builder.op("Round", builder.op("Add", builder.op("Div", input, scale), zero))
    ends = (builder.constant(end, np.float32) for end in (0, format.levels - 1))
    codes = builder.op("Clip", codes, *ends)
    return builder.op("Mul", builder.op("Sub", codes, zero), scale)
