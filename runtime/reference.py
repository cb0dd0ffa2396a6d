"""What every op means, in plain PyTorch: the definition, the CPU fallback, and the oracle of every faster backend.

Functions here take real tensors and a parsed :class:`WeightFormat`; ``ops.py`` gives them schemas, shape functions
and gradients. Shapes: weights ``[rows, columns]``, scales as ``WeightFormat.scale_shape``, codes as
``WeightFormat.codes_shape``. Activations are quantized by the same functions: there a "row" is a token, and leading
dimensions are free (``[..., columns]``, scales ``[..., 1]``).

A trailing underscore means, as in torch, that the first argument is overwritten: large weights are passed over as
seldom as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .errors import FormatError
from .formats import Granularity, Scheme, WeightFormat
from .packing import pack, unpack


class Outliers(NamedTuple):
    """A sparse float matrix with fixed positions, by rows (CSR).

    ``values`` ``[nnz]`` float, ``columns`` ``[nnz]`` uint16 or int32, ``row_offsets`` ``[rows + 1]`` int32: row ``r``
    owns ``values[row_offsets[r]:row_offsets[r + 1]]``. No position comes twice. ``replace``: the value stands in place
    of the dense one, else it is added to it.
    """

    values: Tensor
    columns: Tensor
    row_offsets: Tensor
    replace: bool

    def positions(self) -> tuple[Tensor, Tensor]:
        """Row and column of every value, ``[nnz]`` int64 each."""
        return _row_of_each(self.row_offsets, self.values.shape[0]), self.columns.to(torch.int64)


def _row_of_each(row_offsets: Tensor, count: int) -> Tensor:
    """Row of each of ``count`` values, ``[count]`` int64: how many rows, after the first, begin at it or before it.

    ``torch.repeat_interleave`` says the same, but wakes all threads for any size, and no tracer could tell how long
    its result is.
    """
    begins = row_offsets[1:].to(torch.int64)
    marks = torch.zeros(count + 1, dtype=torch.int64, device=row_offsets.device)
    return marks.index_add_(0, begins, torch.ones_like(begins))[:-1].cumsum(0)


# ---- scales ----------------------------------------------------------------------------------------------------------


def per_element(scale: Tensor, format: WeightFormat, columns: int) -> Tensor:
    """Scales that broadcast against ``[..., columns]``: groups repeat, the rest is left to broadcasting."""
    if format.granularity is Granularity.TENSOR:
        return scale.reshape(1)  # whatever its dimensions, they must not add any to the elements'
    if format.granularity is Granularity.ROW:
        return scale
    return scale.repeat_interleave(format.group_size, dim=-1)[..., :columns]


def per_scale(elementwise: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    """The adjoint of :func:`per_element`: sums ``[..., columns]`` over the elements that share a scale."""
    if format.granularity is Granularity.TENSOR:
        return elementwise.sum().reshape(scale.shape)
    if format.granularity is Granularity.GROUP:
        padded = torch.nn.functional.pad(elementwise, (0, -elementwise.shape[-1] % format.group_size))
        elementwise = padded.unflatten(-1, (-1, format.group_size)).sum(-1)
    return elementwise.sum_to_size(scale.shape)


def dynamic_scale(input: Tensor, format: WeightFormat) -> Tensor:
    """The scale that just covers ``input``, ``max|x| / (2^(bits-1) - 1)``, per token or tensor (``[1, ..., 1]``).

    It has at least float32's precision, whatever the input's. Tokens of zeros (or so small that their scale would be
    subnormal) get scale 1, so that nothing divides by zero; a token with NaN or infinity gets a scale that is not
    finite, and stays visible downstream.
    """
    if format.scheme is not Scheme.AFFINE or not format.symmetric or format.granularity is Granularity.GROUP:
        raise FormatError(f"dynamic scales are for symmetric affine formats per row (token) or tensor, not {format}")
    magnitude = input.abs()
    if format.granularity is Granularity.ROW:
        extent = magnitude.amax(-1, keepdim=True)
    else:
        extent = (magnitude.amax() if input.numel() else input.new_zeros(())).reshape([1] * input.dim())
    scale = _at_least_float32(extent) / (2 ** (format.bits - 1) - 1)
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)


def _at_least_float32(input: Tensor) -> Tensor:
    return input.to(torch.promote_types(input.dtype, torch.float32))


# ---- codes -----------------------------------------------------------------------------------------------------------


def encode(input: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    """Nearest code of every element, as floats: ``clip(round(x / s + z), 0, levels - 1)``. NaN stays NaN.

    Binary maps 0 to +1 (``sign(0)`` would be a third level). Ternary takes ``zero_point``, if given, as the threshold
    under which an element becomes 0; without one the nearest level wins. An affine scale of 0 counts as 1: it has no
    nearest level.
    """
    columns = input.shape[-1]
    input = _at_least_float32(input)  # 8-bit codes and their rounding do not fit bfloat16's 8 bits
    if format.scheme is Scheme.AFFINE:
        codes = input / per_element(torch.where(scale == 0, 1, scale), format, columns)
        return codes.add_(_offset(zero_point, format, columns)).round_().clamp_(0, format.levels - 1)
    if format.scheme is Scheme.BINARY:
        codes = (input >= 0).to(input.dtype)
    elif format.scheme is Scheme.TERNARY:
        threshold = per_element(scale / 2 if zero_point is None else zero_point, format, columns)
        codes = torch.where(input.abs() > threshold, input.sign(), 0.0).add_(1)
    else:
        raise FormatError(f"{format} codes come from a solver, not from rounding")
    return torch.where(input.isnan(), input, codes)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    """Value of unpacked uint8 codes ``[..., columns]``, in the scale's dtype. Ternary ignores the threshold."""
    return _scaled_(_centred_(codes.to(scale.dtype), zero_point, format), scale, format)


def _offset(zero_point: Tensor | None, format: WeightFormat, columns: int) -> Tensor | float:
    return format.implied_zero_point if zero_point is None else per_element(zero_point, format, columns)


def _centred_(codes: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    """Codes as floats, turned into their values in units of the scale."""
    if format.scheme in (Scheme.BINARY, Scheme.BCQ):
        return codes.mul_(2).sub_(1)
    return codes.sub_(_offset(None if format.scheme is Scheme.TERNARY else zero_point, format, codes.shape[-1]))


def _scaled_(values: Tensor, scale: Tensor, format: WeightFormat) -> Tensor:
    """``values`` ``[..., columns]`` times the scale of each."""
    columns = values.shape[-1]
    if format.granularity is Granularity.GROUP and columns % format.group_size == 0:
        values.unflatten(-1, (-1, format.group_size)).mul_(
            scale.unsqueeze(-1)
        )  # the same, without spreading the scales
        return values
    return values.mul_(per_element(scale, format, columns))


def quantize(input: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    """Packed codes uint8 ``[..., row_bytes]`` of ``input`` ``[..., columns]``. Raises :class:`FormatError` for NaN."""
    return pack(encode(input, scale, zero_point, format), format)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat, columns: int) -> Tensor:
    """Values ``[..., columns]`` of packed codes, in the scale's dtype. Bcq: ``sum_i alpha_i * b_i``, b in {-1, +1}."""
    if format.scheme is not Scheme.BCQ:
        return decode(unpack(codes, format, columns), scale, zero_point, format)
    # One plane at a time, so that only one is held as floats beside the sum.
    planes = zip(codes, scale, strict=True)
    plane, alpha = next(planes)
    total = decode(unpack(plane, format, columns), alpha, None, format)
    for plane, alpha in planes:
        total += decode(unpack(plane, format, columns), alpha, None, format)
    return total


def positive_scale(scale: Tensor, format: WeightFormat) -> Tensor:
    """The scale that :func:`fake_quantize` works with: a learned one may cross zero, so its magnitude counts, never 0.

    QDrop's rule (arXiv 2203.05740), with the smallest normal number as the floor. Binary and ternary levels divide by
    no scale, and keep 0.
    """
    magnitude = scale.abs()
    return magnitude.clamp(min=torch.finfo(scale.dtype).tiny) if format.scheme is Scheme.AFFINE else magnitude


def fake_quantize(input: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    """``dequantize(quantize(input))`` without the packing, in the input's dtype, with the scale's magnitude."""
    scale = positive_scale(scale, format)
    codes = encode(input, scale, zero_point, format)
    return _scaled_(_centred_(codes, zero_point, format), scale, format).to(input.dtype)


# ---- gradients -------------------------------------------------------------------------------------------------------


def dequantize_gradients(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: WeightFormat,
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`dequantize` to the scale (alphas) and the zero point, from the gradient to its values.

    ``needs`` says which of the two are wanted; the other is None, as is that of a zero point that there is not.
    """
    columns = gradient.shape[-1]
    gradient = gradient.to(scale.dtype)
    to_scale = to_zero_point = None

    def units(codes: Tensor) -> Tensor:
        return _centred_(unpack(codes, format, columns).to(scale.dtype), zero_point, format)

    if needs[0] and format.scheme is Scheme.BCQ:
        planes = zip(codes, scale, strict=True)
        to_scale = torch.stack([per_scale(units(plane).mul_(gradient), alpha, format) for plane, alpha in planes])
    elif needs[0]:
        to_scale = per_scale(units(codes).mul_(gradient), scale, format)
    if needs[1] and zero_point is not None and format.scheme is Scheme.AFFINE:
        to_zero_point = -per_scale(gradient, zero_point, format) * scale
    return to_scale, to_zero_point


def fake_quantize_gradients(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: WeightFormat,
    clipped: bool,
    scale_gradient: bool,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`fake_quantize` to input, scale and zero point; ``needs`` says which of them are wanted.

    Input: straight through; zero where an affine input was clipped, if ``clipped``. Ternary and binary inputs always
    get the identity, as in XTC and BinaryBERT. Scale: LSQ (arXiv 1902.08153, eq. 3): ``round(x/s) - x/s`` inside the
    range, the clipped level outside; the level itself for ternary and binary. ``scale_gradient`` multiplies it by
    LSQ's ``1 / sqrt(elements per scale * largest level)``. Zero point: LSQ+ (arXiv 2004.09576): ``-s`` where clipped.
    A negative scale counts by its magnitude, so its gradient changes sign with it.
    """
    columns, magnitude = input.shape[-1], positive_scale(scale, format)
    to_input = gradient if needs[0] else None
    to_scale = to_zero_point = None
    if format.scheme is Scheme.AFFINE:
        offset = _offset(zero_point, format, columns)
        ratio = _at_least_float32(input) / per_element(magnitude, format, columns)
        code = torch.round(ratio + offset)
        inside = (code >= 0) & (code <= format.levels - 1)
        if clipped and needs[0]:
            to_input = torch.where(inside, gradient, 0)
        if needs[1]:
            level = code.clamp(0, format.levels - 1) - offset
            to_scale = per_scale(gradient * torch.where(inside, level - ratio, level), scale, format)
        if needs[2] and zero_point is not None:
            clipped_part = torch.where(inside, 0, _at_least_float32(gradient))
            to_zero_point = -per_scale(clipped_part, zero_point, format) * magnitude
    elif needs[1]:
        level = _centred_(encode(input, magnitude, zero_point, format), None, format)
        to_scale = per_scale(gradient * level, scale, format)
    factor = lsq_factor(input, scale, format) if scale_gradient else 1.0
    if to_scale is not None:
        to_scale = (torch.where(scale < 0, -to_scale, to_scale) * factor).to(scale.dtype)
    if to_zero_point is not None and zero_point is not None:
        to_zero_point = (to_zero_point * factor).to(zero_point.dtype)
    return to_input, to_scale, to_zero_point


def lsq_factor(input: Tensor, scale: Tensor, format: WeightFormat) -> float:
    """LSQ's gradient scaling, ``1 / sqrt(elements per scale * largest level)``; 1 for tensors without elements."""
    largest_level = format.levels - 1
    if format.symmetric:
        largest_level = max(largest_level - int(format.implied_zero_point), 1)
    return (input.numel() / scale.numel() * largest_level) ** -0.5 if input.numel() else 1.0


# ---- outliers --------------------------------------------------------------------------------------------------------


def add_outliers(weight: Tensor, outliers: Outliers) -> Tensor:
    """``weight`` ``[rows, columns]`` with the sparse values added, or put in place of it."""
    return add_outliers_(weight.clone(), outliers)


def add_outliers_(weight: Tensor, outliers: Outliers) -> Tensor:
    """The same, into ``weight`` itself."""
    return weight.index_put_(outliers.positions(), outliers.values.to(weight.dtype), accumulate=not outliers.replace)


# ---- packed ----------------------------------------------------------------------------------------------------------


def packed_weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    format: WeightFormat,
    columns: int,
) -> Tensor:
    """The float weight ``[rows, columns]`` that a packed expression stands for."""
    weight = dequantize(codes, scale, zero_point, format, columns)
    return weight if outliers is None else add_outliers_(weight, outliers)


def quantized_input(
    input: Tensor, scale: Tensor | None, zero_point: Tensor | None, format: WeightFormat | None
) -> Tensor:
    """A matmul's input as it is after quantization: left alone without a format, by a dynamic scale without one."""
    if format is None:
        return input
    return fake_quantize(input, dynamic_scale(input, format) if scale is None else scale, zero_point, format)


def packed_linear(
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
    activation: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(linear(quantized_input, packed_weight, bias)) + residual``, ``[..., rows]`` in the input's dtype."""
    weight = packed_weight(codes, scale, zero_point, outliers, format, columns)
    return unpacked_linear(weight, input, bias, input_scale, input_zero_point, input_format, activation, residual)


def unpacked_linear(
    weight: Tensor,
    input: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    input_format: WeightFormat | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """What :func:`packed_linear` does with its weight once it is a float matrix."""
    input = quantized_input(input, input_scale, input_zero_point, input_format)
    bias = None if bias is None else bias.to(input.dtype)
    output = ACTIVATIONS[activation](torch.nn.functional.linear(input, weight.to(input.dtype), bias))
    return output if residual is None else output + residual


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda output: output,
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
"""What a packed linear may do to its result, by the name that the op knows it by."""


def packed_embedding(
    format: WeightFormat,
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``ids`` of the float weight, ``[*ids.shape, columns]``; only the rows asked for are unpacked.

    Raises ``IndexError`` for an id outside the table. (On a GPU the device asserts: a check here would wait for it.)
    """
    flat = ids.reshape(-1)
    if flat.device.type == "cpu":
        check_ids(flat, codes.shape[-2])
    scale, zero_point = taken_scales(flat, scale, format), taken_scales(flat, zero_point, format)
    taken = dequantize(codes.index_select(-2, flat), scale, zero_point, format, columns)
    if outliers is not None:
        add_outliers_(taken, taken_outliers(flat, outliers))
    return taken.reshape(*ids.shape, columns).to(dtype)


def check_ids(ids: Tensor, rows: int) -> None:
    """Raise ``IndexError`` for ids outside a table of so many rows."""
    if ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(f"embedding ids reach from {low} to {high}; the table has rows 0 to {rows - 1}")


@overload
def taken_scales(rows: Tensor, scale: Tensor, format: WeightFormat) -> Tensor: ...
@overload
def taken_scales(rows: Tensor, scale: None, format: WeightFormat) -> None: ...
def taken_scales(rows: Tensor, scale: Tensor | None, format: WeightFormat) -> Tensor | None:
    """The scales (or zero points) of some rows of a weight."""
    return scale if scale is None or format.granularity is Granularity.TENSOR else scale.index_select(-2, rows)


def taken_outliers(rows: Tensor, outliers: Outliers) -> Outliers:
    """The outliers of a ``[len(rows), columns]`` matrix made of rows of another."""
    starts, ends = (part[rows].to(torch.int64) for part in (outliers.row_offsets[:-1], outliers.row_offsets[1:]))
    offsets = torch.nn.functional.pad((ends - starts).cumsum(0), (1, 0))
    count = int(offsets[-1])
    # What a row brings stands in one piece both where it was and where it goes, so one distance tells it all.
    moves = (starts - offsets[:-1])[_row_of_each(offsets, count)]
    index = torch.arange(count, device=rows.device) + moves
    return Outliers(outliers.values[index], outliers.columns.to(torch.int32)[index], offsets, outliers.replace)
