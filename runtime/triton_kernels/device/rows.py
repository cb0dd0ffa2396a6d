"""Rows of codes in the neutral layout become floats."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stored_code(codes, row_start, columns, row_bytes, wanted, BITS: tl.constexpr, BASE3: tl.constexpr):
    """Codes of ``columns`` of the rows that begin at byte ``row_start``, int32."""
    if BASE3:
        byte = tl.load(codes + row_start + columns // 5, mask=wanted, other=0).to(tl.int32)
        digit = columns % 5
        power = tl.where(digit < 2, tl.where(digit == 0, 1, 3), tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81)))
        return byte // power % 3
    else:
        bit = columns * BITS
        at = bit // 8
        word = tl.load(codes + row_start + at, mask=wanted, other=0).to(tl.int32)
        if 8 % BITS != 0:
            more = wanted & (bit % 8 + BITS > 8) & (at + 1 < row_bytes)
            word = word | (tl.load(codes + row_start + at + 1, mask=more, other=0).to(tl.int32) << 8)
        return (word >> (bit % 8)) & (2**BITS - 1)


@triton.jit
def units_at(
    codes,
    rows,
    columns,
    zero,
    table_rows,
    row_bytes,
    wanted,
    TERM: tl.constexpr,
    BITS: tl.constexpr,
    SIGNS: tl.constexpr,
    BASE3: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
):
    """What the codes at ``rows`` (int64) and ``columns``, which broadcast, stand for in units of a scale: that of plane
    ``TERM``. ``zero`` is read where the format ``HAS_ZEROS``.
    """
    code = stored_code(codes, (rows + TERM * table_rows) * row_bytes, columns, row_bytes, wanted, BITS, BASE3)
    if SIGNS:
        return (2 * code - 1).to(tl.float32)
    elif HAS_ZEROS:
        return code.to(tl.float32) - zero
    else:
        return (code - ZERO).to(tl.float32)


@triton.jit
def unpack_rows(
    codes,
    scales,
    zeros,
    ids,
    output,
    count,
    table_rows,
    columns,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    TERMS: tl.constexpr,
    SIGNS: tl.constexpr,
    BASE3: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """``output[i]`` is the row ``ids[i]`` (or ``i``) of a weight in the neutral layout; of an id outside it, NaN."""
    places = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    inside = (places[:, None] < count) & (column < columns)
    rows = places.to(tl.int64)
    if HAS_IDS:
        rows = tl.load(ids + places, mask=places < count, other=0).to(tl.int64)
    there = ((rows >= 0) & (rows < table_rows))[:, None]
    wanted = inside & there
    group = column // GROUP if GROUP > 0 else column * 0
    value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for term in tl.static_range(TERMS):
        term_rows = rows[:, None] + term * table_rows
        place = 0 * term_rows + 0 * column if SHARED else term_rows * groups + group
        zero = tl.load(zeros + place, mask=wanted, other=0.0) if HAS_ZEROS else 0.0
        units = units_at(
            codes, rows[:, None], column, zero, table_rows, row_bytes, wanted,
            term, BITS, SIGNS, BASE3, HAS_ZEROS, ZERO,
        )  # fmt: skip
        value += units * tl.load(scales + place, mask=wanted, other=0.0)
    value = tl.where(there, value, float("nan"))
    target = places[:, None].to(tl.int64) * columns + column
    tl.store(output + target, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def scatter_outliers(
    output,
    values,
    outlier_columns,
    row_offsets,
    ids,
    table_rows,
    columns,
    REPLACE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the outliers of row ``ids[i]`` (or ``i``) into float32 ``output[i]``; a program a row."""
    place = tl.program_id(0).to(tl.int64)
    row = place
    if HAS_IDS:
        row = tl.load(ids + place).to(tl.int64)
    there = (row >= 0) & (row < table_rows)
    begin = tl.load(row_offsets + row, mask=there, other=0)
    end = tl.load(row_offsets + row + 1, mask=there, other=0)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        wanted = at < end
        value = tl.load(values + at, mask=wanted, other=0.0).to(tl.float32)
        target = output + place * columns + tl.load(outlier_columns + at, mask=wanted, other=0).to(tl.int32)
        if not REPLACE:
            value += tl.load(target, mask=wanted, other=0.0)
        tl.store(target, value, mask=wanted)


@triton.jit
def values_at(
    codes,
    scales,
    zeros,
    rows,
    columns,
    output,
    count,
    table_rows,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    TERMS: tl.constexpr,
    SIGNS: tl.constexpr,
    BASE3: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``output[i]`` is the element of a weight in the neutral layout at ``rows[i]`` and ``columns[i]``, both int64."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = at < count
    row = tl.load(rows + at, mask=wanted, other=0)
    column = tl.load(columns + at, mask=wanted, other=0)
    group = column // GROUP if GROUP > 0 else column * 0
    value = tl.zeros((BLOCK,), tl.float32)
    for term in tl.static_range(TERMS):
        place = 0 * row if SHARED else (row + term * table_rows) * groups + group
        zero = tl.load(zeros + place, mask=wanted, other=0.0) if HAS_ZEROS else 0.0
        units = units_at(
            codes, row, column, zero, table_rows, row_bytes, wanted, term, BITS, SIGNS, BASE3, HAS_ZEROS, ZERO
        )
        value += units * tl.load(scales + place, mask=wanted, other=0.0)
    tl.store(output + at, value, mask=wanted)
