"""Gradients to the scales (alphas) and zero points of packed weights, from those to their values."""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import units_at
from .simulated import per_segment, places_of


@triton.jit
def dequantize_gradients(
    gradient,
    codes,
    zeros,
    to_scale,
    to_zero,
    count,
    elements,
    columns,
    size,
    groups,
    row_stride,
    table_rows,
    row_bytes,
    BITS: tl.constexpr,
    TERMS: tl.constexpr,
    SIGNS: tl.constexpr,
    BASE3: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TO_SCALE: tl.constexpr,
    TO_ZERO: tl.constexpr,
    RAGGED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``to_scale[term, segment]`` is the sum of gradients times units, ``to_zero[segment]`` that of gradients alone.

    Segments are those of ``simulated.py``.
    """
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    row = (segment // groups).to(tl.int64)[:, None]
    first = (segment % groups * size)[:, None]
    zero = tl.zeros((SEGMENTS, 1), tl.float32)
    if HAS_ZEROS:
        zero = per_segment(zeros, count, groups, row_stride, SEGMENTS)
    if TO_SCALE:
        for term in tl.static_range(TERMS):
            sums = tl.zeros((SEGMENTS,), tl.float32)
            for start in range(0, size, BLOCK):
                place, wanted = places_of(start, count, elements, columns, size, groups, False, RAGGED, SEGMENTS, BLOCK)
                g = tl.load(gradient + place, mask=wanted, other=0.0).to(tl.float32)
                column = first + start + tl.arange(0, BLOCK)[None, :]
                units = units_at(
                    codes, row, column, zero, table_rows, row_bytes, wanted,
                    term, BITS, SIGNS, BASE3, HAS_ZEROS, ZERO,
                )  # fmt: skip
                sums += tl.sum(tl.where(wanted, g * units, 0.0), axis=1)
            tl.store(to_scale + term * count + segment, sums, mask=segment < count)
    if TO_ZERO:
        total = tl.zeros((SEGMENTS,), tl.float32)
        for start in range(0, size, BLOCK):
            place, wanted = places_of(start, count, elements, columns, size, groups, False, RAGGED, SEGMENTS, BLOCK)
            total += tl.sum(tl.load(gradient + place, mask=wanted, other=0.0).to(tl.float32), axis=1)
        tl.store(to_zero + segment, total, mask=segment < count)
