"""The truth of the runtime's tests: formats.py's formulas in slow float64 NumPy, element by element."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prequant.runtime import Granularity, Scheme, WeightFormat, ops
from prequant.runtime.packing import pack

Array = npt.NDArray[Any]

ROWS, COLUMNS, GROUP = 5, 23, 6  # the last group is shorter

AFFINE = [
    WeightFormat.affine(bits, granularity, GROUP if granularity == "group" else 0, symmetric)
    for bits, granularity, symmetric in itertools.product(range(2, 9), ("tensor", "row", "group"), (True, False))
]
SMALL = [
    make(granularity, GROUP if granularity == "group" else 0, **options)
    for granularity in ("tensor", "row", "group")
    for make, options in (
        (WeightFormat.ternary, {}),
        (WeightFormat.ternary, {"base3": True}),
        (WeightFormat.binary, {}),
    )
]
BCQ = [WeightFormat.bcq(planes, group) for planes in (1, 2, 3, 4) for group in (0, GROUP)]
FORMATS = AFFINE + SMALL + BCQ
FEW = [
    WeightFormat.parse(text)
    for text in ("affine4:row", "affine3:group6:asym", "ternary:tensor:base3", "binary:row", "bcq2:group6")
]


def scale_index(format: WeightFormat, row: int, column: int) -> tuple[int, int]:
    if format.granularity is Granularity.TENSOR:
        return 0, 0
    return row, column // format.group_size if format.granularity is Granularity.GROUP else 0


def true_weight(codes: Array, scale: Array, zero_point: Array | None, format: WeightFormat) -> Array:
    """Values of unpacked codes ``[rows, columns]``, or ``[planes, rows, columns]``."""
    rows, columns = codes.shape[-2:]
    weight = np.zeros((rows, columns))
    for row, column in np.ndindex(rows, columns):
        at = scale_index(format, row, column)
        if format.scheme is Scheme.AFFINE:
            zero = 2.0 ** (format.bits - 1) if zero_point is None else float(zero_point[at])
            weight[row, column] = (float(codes[row, column]) - zero) * float(scale[at])
        elif format.scheme is Scheme.TERNARY:
            weight[row, column] = {0: -1.0, 1: 0.0, 2: 1.0}[int(codes[row, column])] * float(scale[at])
        elif format.scheme is Scheme.BINARY:
            weight[row, column] = {0: -1.0, 1: 1.0}[int(codes[row, column])] * float(scale[at])
        else:
            for plane in range(format.bits):
                weight[row, column] += {0: -1.0, 1: 1.0}[int(codes[plane, row, column])] * float(scale[plane][at])
    return weight


def true_codes(input: Array, scale: Array, zero_point: Array | None, format: WeightFormat) -> Array:
    """Nearest codes of ``[rows, columns]`` values."""
    codes = np.zeros(input.shape)
    for row, column in np.ndindex(*input.shape):
        at = scale_index(format, row, column)
        x, s = float(input[row, column]), float(scale[at])
        if format.scheme is Scheme.AFFINE:
            zero = 2.0 ** (format.bits - 1) if zero_point is None else float(zero_point[at])
            codes[row, column] = min(max(np.rint(x / s + zero), 0), 2**format.bits - 1)
        elif format.scheme is Scheme.TERNARY:
            threshold = s / 2 if zero_point is None else float(zero_point[at])
            codes[row, column] = 1 if abs(x) <= threshold else (2 if x > 0 else 0)
        else:
            codes[row, column] = 1 if x >= 0 else 0
    return codes


class Weight:
    """A random weight in a format, packed, with its true values."""

    def __init__(
        self, format: WeightFormat, rows: int = ROWS, columns: int = COLUMNS, outliers: str = "", nnz: int = 11
    ) -> None:
        self.format, self.columns = format, columns
        planes = (format.bits,) if format.scheme is Scheme.BCQ else ()
        codes = torch.randint(0, format.levels, (*planes, rows, columns))
        shape = format.scale_shape(rows, columns)
        self.scale = torch.rand(shape) + 0.1
        self.zero_point = None if format.symmetric else torch.rand(shape) * (format.levels - 1)
        self.codes = pack(codes, format)
        zero = None if self.zero_point is None else self.zero_point.numpy()
        self.true = true_weight(codes.numpy(), self.scale.numpy(), zero, format)
        self.values = self.column_indices = self.row_offsets = None
        self.replace = outliers == "replace"
        if outliers:
            flat = torch.randperm(rows * columns)[:nnz].sort().values
            self.values = torch.randn(nnz) * 3
            self.column_indices = (flat % columns).to(torch.uint16)
            counts = torch.bincount(flat // columns, minlength=rows)
            self.row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
            for i, position in enumerate(flat.tolist()):
                at = divmod(position, columns)
                self.true[at] = float(self.values[i]) + (0 if self.replace else self.true[at])

    def operands(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero_point, self.values, self.column_indices, self.row_offsets, self.replace

    def options(self) -> dict[str, Any]:
        return {"format": str(self.format), "columns": self.columns}

    def linear(
        self, input: Tensor, bias: Tensor | None = None, *scale: Tensor, residual: Tensor | None = None, **options: str
    ) -> Tensor:
        input_scale, input_zero = (*scale, None, None)[:2]
        operands = (input, *self.operands(), bias, input_scale, input_zero, residual)
        return ops.packed_linear(*operands, **self.options(), **options)

    def embedding(self, ids: Tensor, **options: Any) -> Tensor:
        return ops.packed_embedding(ids, *self.operands(), **self.options(), **options)


def assert_close(result: Tensor, expected: Array, tolerance: float = 1e-6) -> None:
    assert result.shape == expected.shape
    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
    np.testing.assert_allclose(result.double().numpy(), expected, rtol=0, atol=tolerance * scale)


def rounding_case(
    format: WeightFormat, shape: tuple[int, ...] = (ROWS, COLUMNS)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, scale (powers of two) and zero point, such that a part of the input lies outside of the range."""
    scale = 2.0 ** torch.randint(-4, 2, format.scale_shape(*shape))
    width = {Scheme.TERNARY: 2, Scheme.BINARY: 2}.get(format.scheme, format.levels)
    input = torch.randn(shape) * width * 0.25
    zero_point = None if format.symmetric else torch.randint(0, format.levels, scale.shape).float()
    return input, scale, zero_point


def strided(tensor: Tensor) -> list[Tensor]:
    """The same values in other places: a slice of something wider, a transposed copy."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    views = [wide[..., 1::2]]
    if tensor.dim() > 1:
        views.append(tensor.transpose(0, -1).contiguous().transpose(0, -1))
    return views
