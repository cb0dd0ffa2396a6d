"""What stands beside the codes of a weight: offsets of groups that no zero point expresses, and outliers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .builder import Array, Builder, rank_of, stored
from .grid import Grid


def corrected_linear(builder: Builder, grid: Grid, input: ir.Value, result: ir.Value) -> ir.Value:
    """``result`` ``[..., rows]`` with what offsets and outliers of the weight add to a product with ``input``."""
    if grid.offset is not None:
        offset = stored(builder, f"{grid.name}.offset", grid.offset)
        sums = _group_sums(builder, grid, input)
        added = builder.op("MatMul", sums, builder.op("Transpose", offset, perm=[1, 0]))
        result = builder.op("Add", result, added)
    if grid.outliers is not None and len(grid.outliers.values):
        result = builder.op("Add", result, _sparse_product(builder, grid, input))
    return result


def _group_sums(builder: Builder, grid: Grid, input: ir.Value) -> ir.Value:
    """Sums of the input over each group, ``[..., groups]``."""
    assert grid.offset is not None
    rank, groups = rank_of(input), grid.offset.shape[1]
    if groups == 1:
        return builder.sum(input, -1, keepdims=True)
    if padding := groups * grid.group - grid.columns:
        pads = builder.constant([0] * (2 * rank - 1) + [padding])
        input = builder.op("Pad", input, pads, builder.constant(0, np.float32))
    return builder.sum(builder.reshape(input, [0] * (rank - 1) + [groups, grid.group]), -1)


# ---- outliers ------------------------------------------------------------------------------------------------------


def _csr(builder: Builder, grid: Grid) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Values float32, columns int64, row offsets int64. They are stored as narrow as the Program has them."""
    assert grid.outliers is not None
    values = _cast(builder, f"{grid.name}.outliers.values", grid.outliers.values, ir.DataType.FLOAT)
    columns = _cast(builder, f"{grid.name}.outliers.columns", grid.outliers.columns, ir.DataType.INT64)
    offsets = _cast(builder, f"{grid.name}.outliers.row_offsets", grid.outliers.row_offsets, ir.DataType.INT64)
    return values, columns, offsets


def _row_of_each(builder: Builder, ends: ir.Value, count: ir.Value) -> ir.Value:
    """Of each of ``count`` values the row that it belongs to, from where the rows end: how many ended before it."""
    size = builder.op("Add", count, builder.constant([1]))
    zero = ir.tensor(np.zeros(1, np.int64))
    zeros = builder.op("ConstantOfShape", size, value=zero)
    ones = builder.op("ConstantOfShape", builder.op("Shape", ends), value=ir.tensor(np.ones(1, np.int64)))
    marks = builder.op("ScatterElements", zeros, ends, ones, axis=0, reduction="add")
    counted = builder.op("CumSum", marks, builder.constant(0))
    return builder.op("Slice", counted, builder.constant([0]), builder.constant([-1]), builder.constant([0]))


def _sparse_product(builder: Builder, grid: Grid, input: ir.Value) -> ir.Value:
    """``input @ outliers.T``: columns of the input, each times its value, are summed up by row.

    Rows with about as many outliers are reduced together, filled up with zeros to a power of two. A ScatterND that adds
    would need no filling, but ONNX Runtime's threads lose sums where several go to one row. Tokens lie along the last
    axis meanwhile, so that each step goes over whole rows of memory.
    """
    assert grid.outliers is not None
    tokens = builder.op("Transpose", builder.reshape(input, [-1, grid.columns]), perm=[1, 0])
    name = f"{grid.name}.outliers"
    sums, rows = [], []
    for width, members, positions, filled in _rows_by_count(grid.outliers.row_offsets):
        columns = _cast(builder, f"{name}.{width}.columns", grid.outliers.columns[positions], ir.DataType.INT64)
        values = np.where(filled, grid.outliers.values[positions], grid.outliers.values.dtype.type(0))[..., None]
        factors = _cast(builder, f"{name}.{width}.values", values, ir.DataType.FLOAT)
        sums.append(builder.sum(builder.op("Mul", builder.op("Gather", tokens, columns, axis=0), factors), 1))
        rows.append(members)
    shape = builder.op("Concat", builder.constant([grid.rows]), builder.op("Shape", tokens, start=1), axis=0)
    zeros = builder.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.float32)))
    narrow = np.uint16 if grid.rows <= 1 << 16 else np.int32
    where = _cast(builder, f"{name}.rows", np.concatenate(rows).astype(narrow)[:, None], ir.DataType.INT64)
    summed = builder.op("ScatterND", zeros, where, builder.op("Concat", *sums, axis=0))
    result = builder.op("Transpose", summed, perm=[1, 0])
    leading = builder.op("Shape", input, end=-1)
    return builder.op("Reshape", result, builder.op("Concat", leading, builder.constant([grid.rows]), axis=0))


def _rows_by_count(row_offsets: Array) -> Iterator[tuple[int, Array, Array, Array]]:
    """For each power of two: it; the rows with so many outliers or fewer, but more than half as many; where their
    outliers stand, ``[rows, power]``, the last of a row again and again where it has no more; and which are not again.
    """
    starts, counts = row_offsets[:-1].astype(np.int64), np.diff(row_offsets.astype(np.int64))
    width = 1
    while width < 2 * counts.max():
        rows = np.flatnonzero((counts > width // 2) & (counts <= width))
        if len(rows):
            slots, own = np.arange(width), counts[rows, None]
            yield width, rows, starts[rows, None] + np.minimum(slots, own - 1), slots < own
        width *= 2


def _cast(builder: Builder, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
    """An array that is stored as narrow as it is."""
    value = stored(builder, name, array)
    return value if value.dtype is dtype else builder.op("Cast", value, to=dtype)


def _from(builder: Builder, start: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    return builder.constant([start]), builder.constant([np.iinfo(np.int64).max]), builder.constant([0])


def corrected_rows(builder: Builder, grid: Grid, ids: ir.Value, result: ir.Value) -> ir.Value:
    """``result`` ``[..., columns]``, the rows ``ids`` of the codes, with what offsets and outliers add to them."""
    if grid.offset is not None:
        offset = stored(builder, f"{grid.name}.offset", grid.offset)
        taken = builder.op("Gather", offset, ids, axis=0)
        result = builder.op("Add", result, spread(builder, taken, rank_of(ids), grid))
    if grid.outliers is not None:
        result = _with_outliers(builder, grid, ids, result)
    return result


def spread(builder: Builder, each: ir.Value, rank: int, grid: Grid) -> ir.Value:
    """``each`` ``[..., groups]``, behind ``rank`` axes, for every column: ``[..., columns]`` or, of one group,
    ``[..., 1]``.
    """
    groups = -(-grid.columns // grid.group)
    if groups == 1:
        return each
    lead = [1] * rank
    each = builder.op("Unsqueeze", each, builder.constant([-1]))
    each = builder.op("Expand", each, builder.constant([*lead, 1, grid.group]))
    each = builder.reshape(each, [0] * rank + [groups * grid.group])
    return each if groups * grid.group == grid.columns else builder.first(each, grid.columns, -1)


def _with_outliers(builder: Builder, grid: Grid, ids: ir.Value, result: ir.Value) -> ir.Value:
    """The outliers of the rows that were looked up, and of no others, added to them."""
    values, columns, offsets = _csr(builder, grid)
    flat = builder.reshape(ids, [-1])
    starts = builder.op("Gather", offsets, flat, axis=0)
    ends = builder.op("Gather", builder.op("Slice", offsets, *_from(builder, 1)), flat, axis=0)
    counts = builder.op("Sub", ends, starts)
    last = builder.op("CumSum", counts, builder.constant(0))
    first = builder.op("Sub", last, counts)
    total = builder.sum(counts, 0, keepdims=True)
    row = _row_of_each(builder, last, total)
    scalar = builder.op("Squeeze", total, builder.constant([0]))
    places = builder.op("Range", builder.constant(0), scalar, builder.constant(1))
    # What a row brings stands in one piece both where it was and where it goes: one distance tells it all.
    moves = builder.op("Gather", builder.op("Sub", starts, first), row, axis=0)
    index = builder.op("Add", places, moves)
    positions = [row, builder.op("Gather", columns, index, axis=0)]
    where = builder.op("Concat", *(builder.op("Unsqueeze", p, builder.constant([-1])) for p in positions), axis=1)
    rows = builder.reshape(result, [-1, grid.columns])
    added = builder.op("ScatterND", rows, where, builder.op("Gather", values, index, axis=0), reduction="add")
    return builder.op("Reshape", added, builder.op("Shape", result))
