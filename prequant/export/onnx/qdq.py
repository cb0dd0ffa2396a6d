"""Style ``qdq``: DequantizeLinear before MatMul, in ONNX's own operators alone.

A weight is ``[columns, rows]`` of int4, int8 or (from opset 25 on) int2, or of the unsigned types where it has zero
points, with blocks of any size along the columns: the form that ONNX Runtime replaces by its MatMulNBits. A table that
is looked up only keeps its codes as bytes: the bytes of the rows asked for are gathered, and then split. One that is
also a head is stored as the head wants it, ``[rows, columns]``, and becomes floats whenever the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from prequant.passes.weights import WeightView
from prequant.runtime import WeightFormat

from .builder import Builder, rank_of, stored
from .corrections import spread
from .grid import Array, Grid, packed_codes
from .styles import Style, StyleName, of_planes

TWO_BIT_OPSET = 25
"""The first with int2 and uint2."""


class QDQ(Style):
    """Portable; how fast it is depends on what a runtime makes of it."""

    name: ClassVar[StyleName] = "qdq"

    def __init__(self, weights: Mapping[str, WeightView], opset: int) -> None:
        super().__init__(weights, opset)
        self._tables: dict[str, ir.Value] = {}

    @classmethod
    def obstacle(cls, format: WeightFormat, columns: int) -> str:
        """See :class:`Style`: there is none."""
        return ""

    def mapping(self, grid: Grid) -> str:
        """See :class:`Style`."""
        lookup = self.weights[grid.name].kind == "embedding"
        kind = f"{grid.width}-bit codes in bytes" if lookup else self._type(grid).name.lower()
        return f"{grid.planes} × " * (grid.planes > 1) + kind

    def _type(self, grid: Grid) -> ir.DataType:
        width = 4 if grid.width == 2 and self.opset < TWO_BIT_OPSET else grid.width
        return ir.DataType[f"{'INT' if grid.zero_point is None else 'UINT'}{width}"]

    def _product(self, builder: Builder, grid: Grid, input: ir.Value, bias: ir.Value | None, rounded: bool) -> ir.Value:
        if self._is_tied(grid) or self._is_misread(grid):
            weight = builder.op("Transpose", self._table(builder, grid), perm=[1, 0])
        else:
            weight = self._dequantized(builder, grid, ".codes", transposed=True)
        result = builder.op("MatMul", input, weight)
        return result if bias is None else builder.op("Add", result, bias)

    def _is_misread(self, grid: Grid) -> bool:
        """Whether ONNX Runtime's MatMulNBits in place of ``[columns, rows]`` would be wrong: up to 1.31 at least, that
        of 2-bit codes is where the last byte of a column is not full. The other form it leaves as it is.
        """
        return self._type(grid).bitwidth == 2 and grid.rows % 4 > 0

    def _dequantized(self, builder: Builder, grid: Grid, suffix: str, transposed: bool) -> ir.Value:
        """The float weight, ``[columns, rows]`` if ``transposed``."""
        dtype = self._type(grid)

        def turned(array: Array) -> Array:
            array = array.swapaxes(-1, -2) if transposed else array
            return np.ascontiguousarray(array if grid.planes > 1 else array[0])

        codes = grid.codes
        if grid.zero_point is None:
            codes = codes.astype(np.int16) - (1 << (grid.width - 1))
        values = [stored(builder, grid.name + suffix, turned(codes), dtype)]
        one = grid.scale.size == 1
        per_row = not one and grid.scale.shape[-1] == 1 and grid.planes == 1
        for part, array, kind in (("scale", grid.scale, None), ("zero_points", grid.zero_point, dtype)):
            if array is not None:
                shaped = array.reshape(()) if one else array.reshape(-1) if per_row else turned(array)
                values.append(stored(builder, f"{grid.name}.{part}", shaped, kind))
        columns, rows = (-2, -1) if transposed else (-1, -2)
        rank = 3 if grid.planes > 1 else 2
        attributes: dict[str, Any] = {} if one else {"axis": (rows if per_row else columns) + rank}
        if not one and not per_row:
            attributes["block_size"] = grid.group
        result = builder.op("DequantizeLinear", *values, **attributes)
        return result if grid.planes == 1 else builder.sum(result, 0)

    def _table(self, builder: Builder, grid: Grid) -> ir.Value:
        """The float table ``[rows, columns]``, made once for all that read it."""
        if grid.name not in self._tables:
            self._tables[grid.name] = self._dequantized(builder, grid, ".codes", transposed=False)
        return self._tables[grid.name]

    def _rows(self, builder: Builder, grid: Grid, ids: ir.Value) -> ir.Value:
        if self._is_tied(grid):
            return builder.op("Gather", self._table(builder, grid), ids, axis=0)
        single, rank = grid.planes == 1, rank_of(ids)
        table = builder.stored(f"{grid.name}.codes")
        if table is None:
            flat = grid.codes.reshape(-1, grid.columns)
            table = builder.store(f"{grid.name}.codes", packed_codes(flat, grid.width))
        indices, rank = (ids, rank) if single else (of_planes(builder, grid, ids), rank + 1)
        codes = self._unpacked(builder, grid, builder.op("Gather", table, indices, axis=0), rank)
        zero: ir.Value = builder.constant(1 << (grid.width - 1), np.float32)
        if grid.zero_point is not None:
            points = self._of_rows(builder, grid, "zero_points", grid.zero_point, indices, rank)
            zero = builder.op("Cast", points, to=ir.DataType.FLOAT)
        scale = self._of_rows(builder, grid, "scale", grid.scale, indices, rank)
        result = builder.op("Mul", builder.op("Sub", codes, zero), scale)
        return result if single else builder.sum(result, -2)

    @staticmethod
    def _unpacked(builder: Builder, grid: Grid, taken: ir.Value, rank: int) -> ir.Value:
        """Bytes ``[..., bytes]`` as float codes ``[..., columns]``."""
        if grid.width < 8:
            shifts = builder.constant(range(0, 8, grid.width), np.uint8)
            each = builder.op("Unsqueeze", taken, builder.constant([-1]))
            each = builder.op("BitShift", each, shifts, direction="RIGHT")
            each = builder.op("BitwiseAnd", each, builder.constant((1 << grid.width) - 1, np.uint8))
            taken = builder.reshape(each, [0] * rank + [-1])
            if grid.columns % (8 // grid.width):
                taken = builder.first(taken, grid.columns, -1)
        return builder.op("Cast", taken, to=ir.DataType.FLOAT)

    @staticmethod
    def _of_rows(builder: Builder, grid: Grid, part: str, array: Array, indices: ir.Value, rank: int) -> ir.Value:
        """Scales or zero points of the rows asked for, for each of their columns."""
        if array.size == 1:
            return stored(builder, f"{grid.name}.{part}", array.reshape(()))
        table = stored(builder, f"{grid.name}.{part}", array.reshape(-1, array.shape[-1]))
        return spread(builder, builder.op("Gather", table, indices, axis=0), rank, grid)
