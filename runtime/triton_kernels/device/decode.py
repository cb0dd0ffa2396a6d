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

from . import assembly


@triton.constexpr_function
def kind_of(dtype):
    """What assembly calls a half-precision type."""
    return "f16" if dtype == tl.float16 else "bf16"


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
def to_half(bytes, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers in half precision by what ``assembly.py`` says of four bytes."""
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(ASM, "=r,h", [bytes], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(ASM, "=r,h", [bytes], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def to_bytes(bytes, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Bytes by what ``assembly.py`` says of four bytes."""
    if DTYPE == tl.int8:
        return tl.inline_asm_elementwise(ASM, "=r,r", [bytes], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(ASM, "=r,r", [bytes], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def number(code, ZERO: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """``code - ZERO`` of whole ``code`` in uint8, as ``DTYPE``, exactly."""
    if DTYPE == tl.float32:
        return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)
    elif DTYPE == tl.bfloat16:
        return (code.to(tl.float32) - ZERO).to(tl.bfloat16)
    elif NATIVE and DTYPE == tl.int8:
        return to_bytes(code, assembly.bytes_of_plane(0, BITS, ZERO), tl.int8)
    elif DTYPE == tl.int8:
        return (code.to(tl.int16) - ZERO).to(tl.int8)
    else:
        return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + ZERO)


@triton.jit
def sign(bytes, BIT: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """1 for a set bit ``BIT`` of every byte, -1 for a bit that is not set."""
    if NATIVE and DTYPE == tl.int8:
        return to_bytes(bytes, assembly.bytes_of_sign(BIT), tl.int8)
    elif NATIVE and DTYPE != tl.float32:
        return to_half(bytes, assembly.half_of_sign(BIT, kind_of(DTYPE)), DTYPE)
    elif DTYPE == tl.int8:
        return ((bytes >> BIT) & 1).to(tl.int8) * 2 - 1
    else:
        return (((bytes >> BIT) & 1).to(tl.float32) * 2.0 - 1.0).to(DTYPE)


@triton.jit
def plane(
    bytes,
    PLANE: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    ZERO: tl.constexpr,
    MULTIPLE: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """One plane of every byte, as numbers; as the bare codes where ``DTYPE`` is uint8.

    ``MULTIPLE`` other than 1 is for compiled code in half precision.
    """
    if SIGNS:
        return sign(bytes, PLANE, DTYPE, NATIVE)
    elif WIDTH == 8 and DTYPE == tl.bfloat16:  # more than a mantissa of 2^7 has room for
        return number(bytes, ZERO, 8, DTYPE, NATIVE)
    elif NATIVE and DTYPE == tl.uint8:
        return to_bytes(bytes, assembly.codes_of_plane(PLANE, WIDTH), tl.uint8)
    elif NATIVE and DTYPE == tl.int8:
        return to_bytes(bytes, assembly.bytes_of_plane(PLANE, WIDTH, ZERO), tl.int8)
    elif NATIVE and DTYPE != tl.float32:
        return to_half(bytes, assembly.half_of_plane(PLANE, WIDTH, ZERO, MULTIPLE, kind_of(DTYPE)), DTYPE)
    else:
        code = (bytes >> (PLANE * WIDTH)) & (2**WIDTH - 1)
        if DTYPE == tl.uint8:
            return code
        else:
            return number(code, ZERO, WIDTH, DTYPE, NATIVE)


@triton.jit
def above(code, high, LOW: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of ``LOW`` bits with ``high`` above them."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            assembly.joined(LOW), "=r,r,r", [code, high], dtype=tl.uint8, is_pure=True, pack=4
        )
    else:
        return code | (high << LOW)


@triton.jit
def planes(
    bytes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    SIGNS: tl.constexpr,
    ZERO: tl.constexpr,
    MULTIPLE: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """All numbers ``[ROWS, COLUMNS]`` of what :func:`load_field` gave, in the order of their columns.

    ``FIRST`` is the first plane that is meant. Joining and permuting names registers anew; nothing moves.
    """
    UNIT: tl.constexpr = 128 // WIDTH
    COUNT: tl.constexpr = 8 // WIDTH if COLUMNS >= UNIT else COLUMNS // 16
    BLOCKS: tl.constexpr = COLUMNS // UNIT if COLUMNS >= UNIT else 1
    first = plane(bytes, FIRST, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE)
    if COUNT == 1:
        joined = first
    elif COUNT == 2:
        joined = tl.join(first, plane(bytes, FIRST + 1, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE))
    elif COUNT == 4:
        even = tl.join(first, plane(bytes, FIRST + 2, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE))
        odd = tl.join(
            plane(bytes, FIRST + 1, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
            plane(bytes, FIRST + 3, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
        )
        joined = tl.join(even, odd)
    else:
        tl.static_assert(COUNT == 8)
        p04 = tl.join(first, plane(bytes, 4, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE))
        p26 = tl.join(
            plane(bytes, 2, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
            plane(bytes, 6, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
        )
        p15 = tl.join(
            plane(bytes, 1, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
            plane(bytes, 5, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
        )
        p37 = tl.join(
            plane(bytes, 3, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
            plane(bytes, 7, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE),
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
    MULTIPLE: tl.constexpr,
    DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Load and unpack one field of a segment, ``[ROWS, COLUMNS]``."""
    bytes = load_field(codes, start, rows, row_count, WIDTH, SEGMENT, COLUMNS)
    FIRST: tl.constexpr = SEGMENT * COLUMNS % (128 // WIDTH) // 16
    return planes(bytes, ROWS, COLUMNS, FIRST, WIDTH, SIGNS, ZERO, MULTIPLE, DTYPE, NATIVE)


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
    HALF: tl.constexpr = NATIVE and (DTYPE == tl.float16 or DTYPE == tl.bfloat16)
    LOW: tl.constexpr = 2 if BITS == 3 else 4
    HIGH: tl.constexpr = 2 if BITS >= 6 else 1
    if SIGNS:
        start = field_bytes * TERM + stride * chunk
        return field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, 1, True, ZERO, 1, DTYPE, NATIVE)
    elif BITS == 1 or BITS == 2 or BITS == 4 or BITS == 8:
        start = stride * chunk * BITS
        return field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, BITS, False, ZERO, 1, DTYPE, NATIVE)
    else:
        # Whole codes are put together, or, in half precision, the numbers that their parts stand for are added.
        PART: tl.constexpr = DTYPE if HALF else tl.uint8
        start = stride * chunk * LOW
        low = field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, LOW, False, ZERO, 1, PART, NATIVE)
        start = field_bytes * LOW + stride * chunk * HIGH
        high = field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, HIGH, False, 0, 2**LOW, PART, NATIVE)
        whole = low + high if HALF else above(low, high, LOW, NATIVE)
        if BITS == 7:
            start = field_bytes * 6 + stride * chunk
            top = field(codes, start, rows, row_count, SEGMENT, ROWS, COLUMNS, 1, False, 0, 64, PART, NATIVE)
            whole = whole + top if HALF else above(whole, top, 6, NATIVE)
        if HALF:
            return whole
        else:
            return number(whole, ZERO, BITS, DTYPE, NATIVE)
