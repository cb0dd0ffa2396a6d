"""Packed codes become numbers in registers: the device functions that the kernels of packed linears share.

They read codes as ``layout.py`` arranges them. A byte holds one code of each of ``8 / width`` *planes*, and 16 bytes in
a row hold 16 neighbours of each plane, so a plane is a shift and a mask away for all bytes alike, and a lane that has
loaded neighbouring bytes has neighbouring codes, two of which make one register of a tensor core's operand.

Small whole numbers are put together instead of converted: a code in the low bits of the mantissa of 2^n is 2^n + code,
so one logical operation and one subtraction (for two half-precision numbers at once) make a float of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide(count):
    """A whole number as int64, also where the compiler was told that it is 1."""
    return tl.zeros((), tl.int64) + count


@triton.jit
def load_field(
    codes,
    start,
    rows,
    row_count,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Bytes ``[rows, ...]`` that hold one field of ``COLUMNS`` columns of a chunk, from segment ``SEGMENT`` on.

    ``start`` is where the field of this chunk begins. Where a byte's planes reach beyond the segment, all come along.
    """
    UNIT: tl.constexpr = 128 // WIDTH  # columns of 16 bytes
    BYTES: tl.constexpr = COLUMNS // UNIT * 16 if COLUMNS >= UNIT else 16
    FIRST: tl.constexpr = SEGMENT * COLUMNS // UNIT * 16
    places = rows[:, None] * (16 * WIDTH) + (FIRST + tl.arange(0, BYTES))[None, :]
    return tl.load(codes + start + places, mask=rows[:, None] < row_count, other=0)


@triton.jit
def number(code, ZERO: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """``code - ZERO`` of whole ``code`` in uint8, as ``DTYPE``, exactly."""
    if DTYPE == tl.int8 and BITS == 8:
        return (code ^ 128).to(tl.int8, bitcast=True)
    elif DTYPE == tl.int8:
        return code.to(tl.int8, bitcast=True) - ZERO
    elif DTYPE == tl.float16:
        return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
    elif DTYPE == tl.bfloat16 and BITS == 8:  # more than a mantissa of 2^7 has room for
        return (code.to(tl.float32) - ZERO).to(tl.bfloat16)
    elif DTYPE == tl.bfloat16 and NATIVE:
        return (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + ZERO)
    elif DTYPE == tl.bfloat16:  # the interpreter can't subtract bfloat16
        raised = (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True).to(tl.float32)
        return (raised - (128.0 + ZERO)).to(tl.bfloat16)
    else:
        return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def sign(bytes, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    """1 for a set bit ``PLANE`` of every byte, -1 for a bit that is not set."""
    if DTYPE == tl.int8:
        return ((bytes >> PLANE) & 1).to(tl.int8, bitcast=True) * 2 - 1
    elif DTYPE == tl.float16:
        flipped = (bytes.to(tl.uint16) << (15 - PLANE)) & 0x8000
        return (flipped ^ 0xBC00).to(tl.float16, bitcast=True)
    elif DTYPE == tl.bfloat16:
        flipped = (bytes.to(tl.uint16) << (15 - PLANE)) & 0x8000
        return (flipped ^ 0xBF80).to(tl.bfloat16, bitcast=True)
    else:
        flipped = (bytes.to(tl.uint32) << (31 - PLANE)) & 0x80000000
        return (flipped ^ 0xBF800000).to(tl.float32, bitcast=True)


@triton.jit
def plane(
    bytes,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One plane of every byte, as numbers; as the bare codes where ``DTYPE`` is uint8."""
    SHIFT: tl.constexpr = PLANE * WIDTH
    MASK: tl.constexpr = 2**WIDTH - 1
    if SIGNS:
        return sign(bytes, SHIFT, DTYPE)
    elif DTYPE == tl.float16:
        # Where it stands in the byte, a code counts 2^SHIFT times. A multiplication is one with the subtraction.
        raised = ((bytes.to(tl.int16) & (MASK << SHIFT)) | 0x6400).to(tl.float16, bitcast=True)
        return raised * (1.0 / 2**SHIFT) - (1024.0 / 2**SHIFT + ZERO)
    else:
        code = (bytes >> SHIFT) & MASK
        if DTYPE == tl.uint8:
            return code
        else:
            return number(code, ZERO, WIDTH, DTYPE, NATIVE)


@triton.jit
def planes(
    bytes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """All numbers ``[ROWS, COLUMNS]`` of what :func:`load_field` gave, in the order of their columns.

    ``FIRST`` is the first plane that is meant. Joining and permuting names registers anew; nothing moves.
    """
    UNIT: tl.constexpr = 128 // WIDTH
    COUNT: tl.constexpr = 8 // WIDTH if COLUMNS >= UNIT else COLUMNS // 16
    BLOCKS: tl.constexpr = COLUMNS // UNIT if COLUMNS >= UNIT else 1
    first = plane(bytes, FIRST, WIDTH, SIGNS, ZERO, DTYPE, NATIVE)
    if COUNT == 1:
        joined = first
    elif COUNT == 2:
        joined = tl.join(first, plane(bytes, FIRST + 1, WIDTH, SIGNS, ZERO, DTYPE, NATIVE))
    elif COUNT == 4:
        even = tl.join(first, plane(bytes, FIRST + 2, WIDTH, SIGNS, ZERO, DTYPE, NATIVE))
        odd = tl.join(
            plane(bytes, FIRST + 1, WIDTH, SIGNS, ZERO, DTYPE, NATIVE),
            plane(bytes, FIRST + 3, WIDTH, SIGNS, ZERO, DTYPE, NATIVE),
        )
        joined = tl.join(even, odd)
    else:
        tl.static_assert(COUNT == 8)
        p04 = tl.join(first, plane(bytes, 4, WIDTH, SIGNS, ZERO, DTYPE, NATIVE))
        p26 = tl.join(
            plane(bytes, 2, WIDTH, SIGNS, ZERO, DTYPE, NATIVE), plane(bytes, 6, WIDTH, SIGNS, ZERO, DTYPE, NATIVE)
        )
        p15 = tl.join(
            plane(bytes, 1, WIDTH, SIGNS, ZERO, DTYPE, NATIVE), plane(bytes, 5, WIDTH, SIGNS, ZERO, DTYPE, NATIVE)
        )
        p37 = tl.join(
            plane(bytes, 3, WIDTH, SIGNS, ZERO, DTYPE, NATIVE), plane(bytes, 7, WIDTH, SIGNS, ZERO, DTYPE, NATIVE)
        )
        joined = tl.join(tl.join(p04, p26), tl.join(p15, p37))
    apart = joined.reshape(ROWS, BLOCKS, 16, COUNT)
    return apart.permute(0, 1, 3, 2).reshape(ROWS, COLUMNS)


@triton.jit
def field(
    codes,
    start,
    rows,
    row_count,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Load and unpack one field of a segment, ``[ROWS, COLUMNS]``."""
    bytes = load_field(codes, start, rows, row_count, WIDTH, SEGMENT, COLUMNS)
    FIRST: tl.constexpr = SEGMENT * COLUMNS % (128 // WIDTH) // 16
    return planes(bytes, ROWS, COLUMNS, FIRST, WIDTH, SIGNS, ZERO, DTYPE, NATIVE)


@triton.jit
def weights(
    codes,
    chunk,
    rows,
    row_count,
    field_bytes,
    TERM: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    SIGNS: tl.constexpr,
    ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Segment ``SEGMENT`` of a chunk, ``[ROWS, COLUMNS]``: codes less ``ZERO``, or signs of plane ``TERM``.

    ``field_bytes`` is what a field of width 1 takes for the whole matrix. Codes of 3, 5, 6 and 7 bits are in two or
    three fields, of which the first holds the low bits.
    """
    stride = wide(row_count) * 16  # bytes of a chunk of width 1
    if SIGNS:
        start = field_bytes * TERM + stride * chunk
        return field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, 1, True, ZERO, DTYPE, NATIVE)
    elif BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        start = stride * chunk * BITS
        return field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, BITS, False, ZERO, DTYPE, NATIVE)
    else:
        LOW: tl.constexpr = 2 if BITS == 3 else 4
        HIGH: tl.constexpr = 2 if BITS >= 6 else 1
        start = stride * chunk * LOW
        code = field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, LOW, False, ZERO, tl.uint8, NATIVE)
        start = field_bytes * LOW + stride * chunk * HIGH
        high = field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, HIGH, False, ZERO, tl.uint8, NATIVE)
        code = code | (high << LOW)
        if BITS == 7:
            start = field_bytes * 6 + stride * chunk
            top = field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, 1, False, ZERO, tl.uint8, NATIVE)
            code = code | (top << 6)
        return number(code, ZERO, BITS, DTYPE, NATIVE)
