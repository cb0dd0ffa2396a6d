"""Whether the tensors of a call fit its format, before any kernel sees them.

Only shapes, types and devices are looked at, never values, so that a check costs the same whatever the size. What
depends on the weight alone is remembered: a layer is called again and again with the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .errors import FormatError
from .formats import Granularity, Scheme, WeightFormat, _parse
from .reference import ACTIVATIONS, Outliers

Shape = tuple[int, ...]

COLUMN_TYPES = (torch.uint16, torch.int32)
OFFSET_TYPES = (torch.int32, torch.int64)
ID_TYPES = (torch.int64, torch.int32)


def weight_format(text: str, columns: int, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> WeightFormat:
    """Parse ``text``, and check that the tensors are a ``[rows, columns]`` weight in that format."""
    zero_shape = None if zero_point is None else zero_point.shape
    return _weight_format(text, columns, codes.shape, codes.dtype, scale.shape, scale.dtype, zero_shape)


def as_rows(format: WeightFormat, codes: Tensor, *scales: Tensor | None) -> list[Tensor | None]:
    """Codes ``[..., rows, row_bytes]`` of an activation, and what goes with them, as those of a matrix."""
    flat: list[Tensor | None] = [codes.flatten(0, -2)]
    for scale in scales:
        if scale is None or format.granularity is Granularity.TENSOR:
            flat.append(scale)
            continue
        if scale.shape[:-1] != codes.shape[:-1]:
            raise FormatError(f"{format}: codes {list(codes.shape)} have other rows than scales {list(scale.shape)}")
        flat.append(scale.flatten(0, -2))
    return flat


@lru_cache(maxsize=4096)
def _weight_format(
    text: str,
    columns: int,
    codes: Shape,
    codes_dtype: torch.dtype,
    scale: Shape,
    scale_dtype: torch.dtype,
    zero_point: Shape | None,
) -> WeightFormat:
    format = _parse(text)
    dimensions = 3 if format.scheme is Scheme.BCQ else 2
    if len(codes) != dimensions or codes != format.codes_shape(codes[-2], columns):
        example = format.codes_shape(codes[-2] if len(codes) > 1 else 1, columns)
        raise FormatError(
            f"codes of {text} with {columns} columns have a shape like {list(example)}, not {list(codes)}"
        )
    if codes_dtype is not torch.uint8:
        raise FormatError(f"codes are uint8, not {codes_dtype}")
    if scale != format.scale_shape(codes[-2], columns):
        expected = list(format.scale_shape(codes[-2], columns))
        raise FormatError(f"{text}: codes {list(codes)} go with a scale {expected}, not {list(scale)}")
    if not scale_dtype.is_floating_point:
        raise FormatError(f"scales are floats, not {scale_dtype}")
    if zero_point is not None and zero_point != scale:
        raise FormatError(f"a zero point has the shape of the scale, {list(scale)}, not {list(zero_point)}")
    _check_zero_point(format, zero_point is not None)
    return format


@lru_cache(maxsize=4096)
def scaled_format(text: str, input: Shape, scale: Shape, zero_point: Shape | None) -> WeightFormat:
    """Parse ``text``, and check that the scale (and zero point) of an input to be rounded have shapes that fit it."""
    format = _parse(text)
    if format.scheme is Scheme.BCQ:
        raise FormatError("bcq codes come from a solver (prequant.runtime.bcq), not from rounding")
    if not input:
        raise FormatError("the input needs at least one dimension")
    expected: Shape = (format.groups(input[-1]),)
    if format.granularity is not Granularity.TENSOR:
        expected = (*input[:-1], *expected)
    for name, shape in (("scale", scale), ("zero point", zero_point)):
        if shape is None:
            continue
        if format.granularity is Granularity.TENSOR:
            fits = all(n == 1 for n in shape)
        else:
            # Leading dimensions may be shared: one scale for all tokens.
            fits = len(shape) == len(input) and shape[-1] == expected[-1]
            fits = fits and all(n in (1, m) for n, m in zip(shape[:-1], expected, strict=False))
        if not fits:
            raise FormatError(f"{text}: an input {list(input)} goes with a {name} {list(expected)}, not {list(shape)}")
    _check_zero_point(format, zero_point is not None)
    return format


def _check_zero_point(format: WeightFormat, given: bool) -> None:
    if given and format.symmetric and format.scheme is not Scheme.TERNARY:  # a ternary one is the threshold of rounding
        raise FormatError(f"{format} is symmetric and takes no zero point")
    if not given and not format.symmetric:
        raise FormatError(f"{format} is asymmetric and needs a zero point")


def rounding_gradients(
    format: WeightFormat, gradient: Tensor, input: Tensor, zero_point: Tensor | None, needs: Sequence[bool]
) -> None:
    """Check what the gradients of ``fake_quantize`` take beside a scale that fits, and that there are those needed."""
    if gradient.shape != input.shape:
        raise FormatError(f"a gradient {list(gradient.shape)} does not fit an input {list(input.shape)}")
    if len(needs) != 3:
        raise FormatError(f"needs are those of input, scale and zero point, not {list(needs)}")
    if needs[0] and format.scheme is not Scheme.AFFINE:
        raise FormatError(f"{format} clips no input: its gradient is the whole one")
    if needs[2] and (format.scheme is not Scheme.AFFINE or zero_point is None):
        raise FormatError(f"{format} has no zero point that takes a gradient")


def unpacking_gradients(
    format: WeightFormat, gradient: Tensor, codes: Tensor, zero_point: Tensor | None, needs: Sequence[bool]
) -> None:
    """Check what the gradients of ``dequantize`` take beside a weight that fits, and that there are those needed."""
    if gradient.dim() != 2 or gradient.shape[0] != codes.shape[-2]:
        raise FormatError(f"a gradient {list(gradient.shape)} does not fit codes {list(codes.shape)}")
    if len(needs) != 2:
        raise FormatError(f"needs are those of scale and zero point, not {list(needs)}")
    if needs[1] and (format.scheme is not Scheme.AFFINE or zero_point is None):
        raise FormatError(f"{format} has no zero point that takes a gradient")


def activation_format(text: str, input: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> WeightFormat | None:
    """Parse the format of a matmul's input (None for ``""``), and check its scale (None: dynamic)."""
    if not text:
        if scale is not None or zero_point is not None:
            raise FormatError("an input scale or zero point needs an input format")
        return None
    if scale is not None:
        return scaled_format(text, input.shape, scale.shape, None if zero_point is None else zero_point.shape)
    if zero_point is not None:
        raise FormatError("an input zero point needs an input scale; dynamic scales are symmetric")
    return _parse(text)


def outliers(
    values: Tensor | None, columns: Tensor | None, row_offsets: Tensor | None, replace: bool, rows: int
) -> Outliers | None:
    """The three tensors as one, if there are any, once it is sure that they describe a matrix of ``rows`` rows."""
    if values is None:
        return None
    if columns is None or row_offsets is None:
        raise FormatError("outlier values come with their columns and row offsets")
    if values.dim() != 1 or values.shape != columns.shape:
        raise FormatError(
            f"outlier values {list(values.shape)} and columns {list(columns.shape)} must be vectors of one length"
        )
    if row_offsets.shape != (rows + 1,):
        raise FormatError(f"row offsets of {rows} rows have shape [{rows + 1}], not {list(row_offsets.shape)}")
    if columns.dtype not in COLUMN_TYPES or row_offsets.dtype not in OFFSET_TYPES:
        raise FormatError(
            f"outliers have uint16 or int32 columns and int32 row offsets, not {columns.dtype} and {row_offsets.dtype}"
        )
    return Outliers(values, columns, row_offsets, replace)


def linear(input: Tensor, codes: Tensor, columns: int, bias: Tensor | None) -> None:
    """Check what a matmul needs of its input and bias, beside a weight that fits its format."""
    if input.shape[-1:] != (columns,):
        raise FormatError(f"an input {list(input.shape)} does not fit a weight with {columns} columns")
    if not input.is_floating_point():
        raise FormatError(f"the input of a matmul is of floats, not {input.dtype}")
    if bias is not None and bias.shape != codes.shape[-2:-1]:
        raise FormatError(f"a bias {list(bias.shape)} does not fit a weight with {codes.shape[-2]} rows")
    same_device(input, codes)


def epilogue(activation: str, residual: Tensor | None, input: Tensor, codes: Tensor) -> None:
    """Check what comes after a matmul: an activation by name, and a residual of the shape and type of the result."""
    if activation not in ACTIVATIONS:
        raise FormatError(f"activation {activation!r} is none of {', '.join(map(repr, ACTIVATIONS))}")
    if residual is not None and (
        residual.shape != (*input.shape[:-1], codes.shape[-2]) or residual.dtype != input.dtype
    ):
        raise FormatError(
            f"a residual {list(residual.shape)} of {residual.dtype} does not fit a result "
            f"{[*input.shape[:-1], codes.shape[-2]]} of {input.dtype}"
        )


def same_lengths(lists: Mapping[str, Sequence[object]]) -> None:
    """Check that lists of operands, by name, have one element for each of the same linears, of which there are some."""
    (first, operands), *others = lists.items()
    if not operands:
        raise FormatError("packed_linears takes at least one linear")
    for name, other in others:
        if len(other) != len(operands):
            raise FormatError(f"{len(operands)} {first} go with as many {name}, not {len(other)}")


def ids(ids: Tensor, codes: Tensor) -> None:
    """Check what a look-up needs of its ids, but for their range."""
    if ids.dtype not in ID_TYPES:
        raise FormatError(f"embedding ids are int64 or int32, not {ids.dtype}")
    same_device(ids, codes)


def same_device(input: Tensor, codes: Tensor) -> None:
    """Native kernels follow bare pointers, so that tensors of two devices must not reach them."""
    if input.device != codes.device:
        raise FormatError(f"the input is on {input.device}, the codes on {codes.device}")


def one_device(op: str, operands: Mapping[str, object]) -> None:
    """Check that all tensors among the operands of a kernel, by name, outliers' as well, are on the device of the
    first.
    """
    first: tuple[str, torch.device] | None = None
    for name, operand in operands.items():
        for tensor in operand if isinstance(operand, Outliers) else (operand,):
            if not isinstance(tensor, Tensor):
                continue
            if first is None:
                first = name, tensor.device
            elif tensor.device != first[1]:
                raise FormatError(f"{op}: {first[0]} on {first[1]}, but {name} on {tensor.device}")
