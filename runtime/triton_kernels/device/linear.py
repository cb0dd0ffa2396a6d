"""The kernel of packed linears: tiles of packed weights times tiles of inputs, on tensor cores.

One program computes ``[ROWS, TOKENS]`` of the transposed result, over all chunks of columns or, where there are too few
programs to fill a GPU, over some (``SPLIT`` programs a tile; the last one to finish adds up what the others left). The
weight is the left operand, unpacked in registers, so that even one token wastes little: tensor cores want 64 (or 16)
rows of the left operand but only 8 columns of the right one. Several linears on one input share a launch: their tiles
stand in one row, and a program picks the operands of its own. Codes enter products as whole numbers, which half
precision and 8-bit integers hold exactly; scales multiply float32 sums of a group, so no weight is ever rounded.

Sums of a chunk are waited for before the next one's weights are unpacked. Triton 3.7 would let matrix instructions that
add to the same sums run on, and unpack into the registers that they still read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import weights, wide
from .epilogue import activate


@triton.jit
def dot(left, right, accumulator, NATIVE: tl.constexpr):
    """``accumulator + left @ right``, in float32 or int32."""
    if left.dtype == tl.int8:
        return tl.dot(left, right, accumulator, out_dtype=tl.int32)
    elif left.dtype == tl.bfloat16 and not NATIVE:  # the interpreter multiplies bfloat16 by its bits
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def outlier_sums(
    input,
    values,
    columns,
    offsets,
    rows,
    tokens,
    row_count,
    token_count,
    column_count,
    part,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What sparse values add to a tile; of each row's, part ``part`` of ``SPLIT``."""
    begin = tl.load(offsets + rows, mask=rows < row_count, other=0)
    end = tl.load(offsets + rows + 1, mask=rows < row_count, other=0)
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for at in range(part, tl.max(end - begin, axis=0), SPLIT):
        there = begin + at < end
        value = tl.load(values + begin + at, mask=there, other=0.0)
        column = tl.load(columns + begin + at, mask=there, other=0)
        places = tokens[None, :] * column_count + column[:, None]
        seen = tl.load(input + places, mask=there[:, None] & (tokens[None, :] < token_count), other=0)
        sums += value[:, None] * seen.to(tl.float32)
    return sums


@triton.jit
def pick(values, which):
    """The element ``which`` of a tuple, of one element for each linear."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(which >= i, values[i], found)
    return found


@triton.jit
def packed_linear(
    input,
    codes,
    scales,
    zeros,
    outlier_values,
    outlier_columns,
    outlier_offsets,
    bias,
    residual,
    token_scales,
    token_zeros,
    row_sums,
    output,
    partial,
    counters,
    row_counts,
    token_count,
    column_count,
    chunk_count,
    BITS: tl.constexpr,
    TERMS: tl.constexpr,
    SIGNS: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZED: tl.constexpr,
    HAS_TOKEN_ZEROS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """``output[token, row]``, with ``input`` ``[token_count, column_count]`` contiguous, in half precision, float32, or
    (``QUANTIZED``) int8 with ``token_scales`` and, ``HAS_TOKEN_ZEROS``, ``token_zeros``.

    What a linear has of its own, ``row_counts`` among it, comes in tuples; only a linear alone has a residual.
    ``codes``, ``scales`` and ``zeros`` are laid out as in layout.py. ``GROUP`` is 0 where a row (or the whole weight:
    ``SHARED``) has one scale. ``zeros`` and ``ZERO`` add up to a weight's zero point. Outliers are added; ``row_sums``
    are those of the weight with them. ``WHOLE``: columns fill their chunks. ``partial`` is ``[SPLIT, token, row]`` of
    float32 for one linear after the other, ``counters`` one int32 a tile, 0 before and after.
    """
    DTYPE: tl.constexpr = input.dtype.element_ty
    SUMS: tl.constexpr = tl.int32 if QUANTIZED else tl.float32
    COLUMNS: tl.constexpr = 128 if GROUP == 0 or GROUP > 128 else GROUP
    ALIKE: tl.constexpr = GROUP == 0 and TERMS == 1  # all chunks of a row have one scale
    ONCE: tl.constexpr = ALIKE and QUANTIZED  # which is multiplied at the end
    program = tl.program_id(0)
    part = tl.program_id(1)
    which, first, rows_before = 0, 0, 0
    start, above = 0, 0
    for i in tl.static_range(1, len(row_counts)):
        start += tl.cdiv(row_counts[i - 1], ROWS) * tl.cdiv(token_count, TOKENS)
        above += row_counts[i - 1]
        which = tl.where(program >= start, i, which)
        first = tl.where(program >= start, start, first)
        rows_before = tl.where(program >= start, above, rows_before)
    codes, scales, zeros = pick(codes, which), pick(scales, which), pick(zeros, which)
    row_count, output = pick(row_counts, which), pick(output, which)
    tile = program - first
    row_tiles = tl.cdiv(row_count, ROWS)
    rows = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    tokens = tile // row_tiles * TOKENS + tl.arange(0, TOKENS)
    field_bytes = wide(row_count) * chunk_count * 16
    groups = tl.cdiv(column_count, GROUP) if GROUP > 0 else 1

    total = tl.zeros((ROWS, TOKENS), tl.float32)
    running = tl.zeros((ROWS, TOKENS), SUMS)
    running_input = tl.zeros((ROWS, TOKENS), SUMS)
    ones = tl.full((ROWS, COLUMNS), 1, tl.float32).to(DTYPE)
    if ALIKE:
        place = 0 * rows if SHARED else rows
        scale = tl.load(scales + place, mask=rows < row_count, other=0.0)
        if HAS_ZEROS:
            zero = tl.load(zeros + place, mask=rows < row_count, other=0.0)
    share = tl.cdiv(chunk_count, SPLIT)
    for chunk in tl.range(part * share, tl.minimum(part * share + share, chunk_count), num_stages=STAGES):
        for segment in tl.static_range(128 // COLUMNS):
            columns = chunk * 128 + segment * COLUMNS + tl.arange(0, COLUMNS)
            wanted = tokens[:, None] < token_count
            if not WHOLE:
                wanted = wanted & (columns[None, :] < column_count)
            seen = tl.load(input + tokens[:, None] * column_count + columns[None, :], mask=wanted, other=0)
            right = tl.trans(seen)
            group = (chunk * 128 + segment * COLUMNS) // GROUP if GROUP > 0 else 0
            # A segment of nothing but filling has no group.
            in_rows = (rows < row_count) & (group < groups)
            for term in tl.static_range(TERMS):
                left = weights(
                    codes, chunk, rows, row_count, field_bytes,
                    term, segment, ROWS, COLUMNS, BITS, SIGNS, ZERO, DTYPE, NATIVE,
                )  # fmt: skip
                if ONCE:
                    running = dot(left, right, running, NATIVE)
                    if HAS_ZEROS:
                        running_input = dot(ones, right, running_input, NATIVE)
                else:
                    if not ALIKE:
                        place = (term * groups + group) * row_count + rows
                        scale = tl.load(scales + place, mask=in_rows, other=0.0)
                    sums = dot(left, right, tl.zeros((ROWS, TOKENS), SUMS), NATIVE).to(tl.float32)
                    if HAS_ZEROS:
                        if not ALIKE:
                            zero = tl.load(zeros + place, mask=in_rows, other=0.0)
                        sums -= zero[:, None] * dot(ones, right, tl.zeros((ROWS, TOKENS), SUMS), NATIVE).to(tl.float32)
                    total += sums * scale[:, None]

    if ONCE:
        total = running.to(tl.float32)
        if HAS_ZEROS:
            total -= zero[:, None] * running_input.to(tl.float32)
        total *= scale[:, None]
    if HAS_OUTLIERS:
        total += outlier_sums(
            input, pick(outlier_values, which), pick(outlier_columns, which), pick(outlier_offsets, which),
            rows, tokens, row_count, token_count, column_count, part, SPLIT, ROWS, TOKENS,
        )  # fmt: skip

    places = tokens[:, None].to(tl.int64) * row_count + rows[None, :]
    inside = (tokens[:, None] < token_count) & (rows[None, :] < row_count)
    result = tl.trans(total)
    last = True
    if SPLIT > 1:
        plane = wide(token_count) * row_count
        partial += wide(token_count) * SPLIT * rows_before
        tl.store(partial + part * plane + places, result, mask=inside)
        # All threads have stored before one of them counts, which releases what they stored to whoever counts last.
        tl.debug_barrier()
        last = tl.atomic_add(counters + program, 1, sem="acq_rel") == SPLIT - 1
        if last:
            result = tl.zeros((TOKENS, ROWS), tl.float32)
            for other in range(SPLIT):  # in this order whoever is last, so that results are the same every time
                result += tl.load(partial + other * plane + places, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counters + program, 0)
    if last:
        in_tokens, in_rows = tokens < token_count, rows < row_count
        if QUANTIZED:
            if HAS_TOKEN_ZEROS:
                zero = tl.load(token_zeros + tokens, mask=in_tokens, other=0.0)
                result -= zero[:, None] * tl.load(pick(row_sums, which) + rows, mask=in_rows, other=0.0)[None, :]
            result *= tl.load(token_scales + tokens, mask=in_tokens, other=0.0)[:, None]
        if HAS_BIAS:
            result += tl.load(pick(bias, which) + rows, mask=in_rows, other=0.0).to(tl.float32)[None, :]
        result = activate(result, ACTIVATION)
        if HAS_RESIDUAL:
            result += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + places, result.to(output.dtype.element_ty), mask=inside)
