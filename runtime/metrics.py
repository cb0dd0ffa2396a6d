"""How far a compressed tensor is from the original."""

from __future__ import annotations

import math

from torch import Tensor

CHUNK = 1 << 20
"""Elements that are held as float64 at once."""


def sqnr(original: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, ``10 log10(sum x^2 / sum (x - y)^2)``; ``inf`` where they are equal."""
    signal = noise = 0.0
    parts = (tensor.detach().flatten().split(CHUNK) for tensor in (original, approximation))
    for exact, close in zip(*parts, strict=True):
        exact = exact.double()
        signal += float(exact.square().sum())
        noise += float((exact - close.double()).square_().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal else -math.inf
