"""What a tensor holds, and how far a compressed one is from the original."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 20
"""Elements that are held as float64 at once."""


def all_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a tensor holds no NaN and no infinity, nor would if its values were cast to ``dtype``.

    Both show in the extremes, which one pass over it finds; ``isfinite`` takes four, and latent weights are asked in
    each step of a training.
    """
    if not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).to(dtype or tensor.dtype).isfinite().all())


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
