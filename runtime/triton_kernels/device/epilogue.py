"""What a packed linear does to its result before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """By the exponential of a magnitude, which can't overflow; NaN stays NaN."""
    small = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """``reference.ACTIVATIONS[NAME]``, in float32."""
    if NAME == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif NAME == "gelu":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return x * (0.5 + 0.5 * tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        return x
