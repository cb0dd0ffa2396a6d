"""Rounding to the levels of a format, its gradients, and its codes as packed bytes; scales that cover what they see.

Elements that share a scale are a *segment*: ``size`` neighbours of a row of ``columns``, of which the last of a row may
be shorter. A row without groups is one segment; where all elements share one scale, runs of any length are, whatever
the rows (``FLAT``). A program takes some segments, and goes through them by ``BLOCK`` columns. Numbers are float32,
whatever is loaded and stored. ``KIND`` is the scheme; ``ZERO`` the zero point where none is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import covering_scale, round_half_even


@triton.jit
def places_of(
    start,
    count,
    elements,
    columns,
    size,
    groups,
    FLAT: tl.constexpr,
    RAGGED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where ``BLOCK`` elements of each of a program's segments lie, from ``start`` on, and which of them there are.

    The bound of a segment is written so that the compiler sees on what multiples it lies. ``RAGGED``: groups don't fill
    rows.
    """
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    group = segment % groups
    first = (segment // groups).to(tl.int64) * columns + group * size
    column = (start + tl.arange(0, BLOCK))[None, :]
    if FLAT:
        inside = column < (elements - first)[:, None]
    elif RAGGED:
        inside = column < tl.minimum(columns - group * size, size)[:, None]
    else:
        inside = column < size
    return first[:, None] + column, inside & (segment < count)[:, None]


@triton.jit
def per_segment(values, count, groups, row_stride, SEGMENTS: tl.constexpr):
    """The value of each segment, ``[SEGMENTS, 1]``; rows have their own where ``row_stride`` is not 0."""
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    place = segment // groups * row_stride + segment % groups
    return tl.load(values + place, mask=segment < count, other=1.0).to(tl.float32)[:, None]


@triton.jit
def magnitude_of(scale, KIND: tl.constexpr, TINY: tl.constexpr):
    """``reference.positive_scale``: ``TINY`` is the smallest normal number of the type that a scale is stored in."""
    magnitude = tl.abs(scale)
    if KIND == "affine":
        magnitude = tl.where(magnitude < TINY, TINY, magnitude)  # NaN stays NaN
    return magnitude


@triton.jit
def code_of(x, scale, zero, LEVELS: tl.constexpr, KIND: tl.constexpr):
    """``reference.encode``, where ``zero`` is a ternary threshold; what has no code is NaN."""
    scale = tl.broadcast_to(scale, x.shape)
    if KIND == "affine":
        place = tl.div_rn(x, scale) + zero
        code = round_half_even(tl.minimum(tl.maximum(place, 0.0), LEVELS - 1.0))
        return tl.where(place == place, code, float("nan"))
    elif KIND == "ternary":
        code = tl.where((tl.abs(x) > zero) & (x != 0.0), tl.where(x > 0, 2.0, 0.0), 1.0)
        return tl.where(x == x, code, float("nan"))
    else:
        code = tl.where(x >= 0, 1.0, 0.0)
        return tl.where(x == x, code, float("nan"))


@triton.jit
def units_of(code, zero, KIND: tl.constexpr):
    """The value of a code in units of the scale."""
    if KIND == "affine":
        return code - zero
    elif KIND == "ternary":
        return code - 1.0
    else:
        return code * 2.0 - 1.0


@triton.jit
def zero_of(
    zeros,
    magnitude,
    count,
    groups,
    row_stride,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """The zero point of each segment, ``[SEGMENTS, 1]``; of a ternary format the threshold of rounding."""
    if HAS_ZEROS:
        return per_segment(zeros, count, groups, row_stride, SEGMENTS)
    elif KIND == "ternary":
        return magnitude * 0.5
    else:
        return tl.full((SEGMENTS, 1), ZERO, tl.float32)


@triton.jit
def fake_quantize(
    input,
    scales,
    zeros,
    output,
    count,
    elements,
    columns,
    size,
    groups,
    row_stride,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    TINY: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    FLAT: tl.constexpr,
    RAGGED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``reference.fake_quantize``, rounded to the type of ``output``."""
    scale = magnitude_of(per_segment(scales, count, groups, row_stride, SEGMENTS), KIND, TINY)
    zero = zero_of(zeros, scale, count, groups, row_stride, KIND, ZERO, HAS_ZEROS, SEGMENTS)
    for start in range(0, size, BLOCK):
        place, inside = places_of(start, count, elements, columns, size, groups, FLAT, RAGGED, SEGMENTS, BLOCK)
        x = tl.load(input + place, mask=inside, other=0.0).to(tl.float32)
        value = units_of(code_of(x, scale, zero, LEVELS, KIND), zero, KIND) * scale
        tl.store(output + place, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def fake_quantize_gradients(
    gradient,
    input,
    scales,
    zeros,
    to_input,
    to_scale,
    to_zero,
    count,
    elements,
    columns,
    size,
    groups,
    row_stride,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    TINY: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TO_INPUT: tl.constexpr,
    TO_SCALE: tl.constexpr,
    TO_ZERO: tl.constexpr,
    FLAT: tl.constexpr,
    RAGGED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``reference.fake_quantize_gradients``: that of the input, and sums for the others, one float32 a segment: for the
    scale's magnitude, and for the zero point in units of minus that magnitude. LSQ's factor is in neither.
    """
    scale = magnitude_of(per_segment(scales, count, groups, row_stride, SEGMENTS), KIND, TINY)
    zero = zero_of(zeros, scale, count, groups, row_stride, KIND, ZERO, HAS_ZEROS, SEGMENTS)
    scale_sum = tl.zeros((SEGMENTS,), tl.float32)
    zero_sum = tl.zeros((SEGMENTS,), tl.float32)
    for start in range(0, size, BLOCK):
        place, wanted = places_of(start, count, elements, columns, size, groups, FLAT, RAGGED, SEGMENTS, BLOCK)
        stored = tl.load(gradient + place, mask=wanted, other=0.0)
        g = stored.to(tl.float32)
        x = tl.load(input + place, mask=wanted, other=0.0).to(tl.float32)
        if KIND == "affine":
            ratio = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
            spot = ratio + zero
            # Half a level beyond the outermost ones is far enough to tell.
            code = round_half_even(tl.minimum(tl.maximum(spot, -1.0), LEVELS * 1.0))
            inside = (code >= 0.0) & (code <= LEVELS - 1.0) & (spot == spot)
            if TO_INPUT:
                clipped = tl.where(inside, g, 0.0).to(to_input.dtype.element_ty)
                tl.store(to_input + place, clipped, mask=wanted)
            if TO_SCALE:
                level = tl.minimum(tl.maximum(code, 0.0), LEVELS - 1.0) - zero
                slope = tl.where(spot == spot, tl.where(inside, level - ratio, level), spot)
                scale_sum += tl.sum(tl.where(wanted, g * slope, 0.0), axis=1)
            if TO_ZERO:
                zero_sum += tl.sum(tl.where(inside, 0.0, g), axis=1)
        else:
            slope = units_of(code_of(x, scale, zero, LEVELS, KIND), zero, KIND)
            scale_sum += tl.sum(tl.where(wanted, g * slope, 0.0), axis=1)
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    if TO_SCALE:
        tl.store(to_scale + segment, scale_sum, mask=segment < count)
    if TO_ZERO:
        tl.store(to_zero + segment, zero_sum, mask=segment < count)


@triton.jit
def largest(
    input,
    output,
    count,
    elements,
    columns,
    size,
    LEVELS: tl.constexpr,
    SCALE: tl.constexpr,
    FLAT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest magnitude of each segment, NaN where it has one; ``SCALE``: as the scale that covers it."""
    extent = tl.zeros((SEGMENTS,), tl.float32)
    strange = tl.zeros((SEGMENTS,), tl.int32)
    for start in range(0, size, BLOCK):
        place, inside = places_of(start, count, elements, columns, size, 1, FLAT, False, SEGMENTS, BLOCK)
        x = tl.load(input + place, mask=inside, other=0.0).to(tl.float32)
        extent = tl.maximum(extent, tl.max(tl.abs(x), axis=1))
        strange = tl.maximum(strange, tl.max((x != x).to(tl.int32), axis=1))
    result = tl.where(strange > 0, float("nan"), extent)
    if SCALE:
        result = covering_scale(result, LEVELS)
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    tl.store(output + segment, result, mask=segment < count)


@triton.jit
def quantize(
    input,
    scales,
    zeros,
    output,
    strange,
    count,
    columns,
    units,
    row_bytes,
    row_stride,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND: tl.constexpr,
    BASE3: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    CODES: tl.constexpr,
    BYTES: tl.constexpr,
    UNITS: tl.constexpr,
):
    """``reference.quantize``. A unit is the ``CODES`` codes that fill ``BYTES`` whole bytes; a row has ``units``, all
    rows ``count``. ``strange`` becomes 1 where something has no code.
    """
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    there = unit < count
    row = unit // units
    unit = unit % units
    WIDTH: tl.constexpr = 8 if BASE3 else CODES  # a tile has no five columns
    digit = tl.arange(0, WIDTH)[None, :]
    column = unit[:, None] * CODES + digit
    inside = there[:, None] & (column < columns)
    if BASE3:
        inside = inside & (digit < CODES)
    x = tl.load(input + row[:, None] * columns + column, mask=inside, other=0.0).to(tl.float32)
    group = column // GROUP if GROUP > 0 else column * 0
    place = row[:, None] * row_stride + group
    scale = tl.load(scales + place, mask=inside, other=1.0).to(tl.float32)
    zero = tl.full((UNITS, WIDTH), ZERO, tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zeros + place, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "ternary":
        zero = scale * 0.5
    if KIND == "affine":
        scale = tl.where(scale == 0.0, 1.0, scale)
    code = code_of(x, scale, zero, LEVELS, KIND)
    none = inside & (code != code)
    whole = tl.where(inside & (code == code), code, 0.0).to(tl.int32)
    if BASE3:
        power = tl.where(digit < 2, tl.where(digit == 0, 1, 3), tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81)))
        word = tl.sum(whole * power, axis=1)
    elif CODES * BITS > 31:
        word = tl.sum(whole.to(tl.int64) << (digit * BITS).to(tl.int64), axis=1)
    else:
        word = tl.sum(whole << (digit * BITS), axis=1)
    for byte in tl.static_range(BYTES):
        target = unit * BYTES + byte
        part = ((word >> (8 * byte)) & 255).to(tl.uint8)
        tl.store(output + row * row_bytes + target, part, mask=there & (target < row_bytes))
    tl.store(strange, 1, mask=tl.max(tl.max(none.to(tl.int32), axis=1), axis=0) > 0)
