"""Tokens become 8-bit integers with a scale."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(x):
    """The nearest whole number of a magnitude under 2^22: float32 has no place for more behind 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def covering_scale(extent, LEVELS: tl.constexpr):
    """``reference.dynamic_scale`` of what reaches as far as ``extent``; not finite where that is not."""
    scale = tl.div_rn(extent, tl.full(extent.shape, LEVELS // 2 - 1.0, tl.float32))
    return tl.where(scale < 1.1754943508222875e-38, 1.0, scale)  # no smaller than a normal number


@triton.jit
def round_tokens(
    input,
    scales,
    zeros,
    output,
    token_scales,
    columns,
    LEVELS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes of one token less ``LEVELS / 2``, int8; a program a token, rounded as ``reference.encode`` does.

    ``scales`` and ``zeros`` have one value a token. ``DYNAMIC``: the scale is ``reference.dynamic_scale``. What has a
    NaN gets NaN for a scale in ``token_scales``, and so shows in the result.
    """
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = LEVELS // 2
    extent, strange = 0.0, 0
    for start in range(0, columns, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(input + token * columns + places, mask=places < columns, other=0.0).to(tl.float32)
        extent = tl.maximum(extent, tl.max(tl.abs(x), axis=0))
        strange = tl.maximum(strange, tl.max((x != x).to(tl.int32), axis=0))
    scale = covering_scale(extent, LEVELS) if DYNAMIC else tl.load(scales + token)
    scale = tl.where(strange > 0, float("nan"), scale)
    tl.store(token_scales + token, scale)
    zero = HALF * 1.0
    if HAS_ZEROS:
        zero = tl.load(zeros + token)
    for start in range(0, columns, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(input + token * columns + places, mask=places < columns, other=0.0).to(tl.float32)
        code = tl.div_rn(x, tl.broadcast_to(scale, (BLOCK,))) + zero
        code = tl.where(code == code, code, 0.0)  # converting NaN is undefined
        code = round_half_even(tl.minimum(tl.maximum(code, 0.0), LEVELS - 1.0)) - HALF
        tl.store(output + token * columns + places, code.to(tl.int8), mask=places < columns)
