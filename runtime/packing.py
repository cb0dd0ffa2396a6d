"""Codes to bytes and back: the one ISA-neutral layout (see formats.py) of files, training and the reference kernels.

Both directions work on words of two, four or eight codes at once. Unpacked, the codes of a word lie 8 bits apart, one
to a byte; packed, ``bits`` apart at the word's low end. A word gets from one to the other by halving: its upper half
of codes moves, then the upper half of each half, and so on, which is one shift and two masks a step for all words
together.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FormatError
from .formats import TRITS_PER_BYTE, Scheme, WeightFormat

if sys.byteorder != "little":
    raise ImportError("prequant reads words of bytes in little-endian order; this machine's order is big-endian")


def pack(codes: Tensor, format: WeightFormat) -> Tensor:
    """Pack whole-number ``codes`` ``[..., columns]`` into uint8 ``[..., row_bytes]``; planes of bcq are packed apart.

    Raises :class:`FormatError` if a code is outside ``[0, format.levels)``, or NaN.
    """
    if codes.numel():
        low, high = (float(end) for end in codes.aminmax())
        if not (low >= 0 and high < format.levels):  # written so that NaN is refused
            raise FormatError(f"codes reach from {low:g} to {high:g}; {format} has levels 0 to {format.levels - 1}")
    codes = codes.to(torch.uint8)
    if format.base3:
        digits = _pad(codes, TRITS_PER_BYTE).unflatten(-1, (-1, TRITS_PER_BYTE))
        powers = torch.tensor([3**i for i in range(TRITS_PER_BYTE)], dtype=torch.uint8, device=codes.device)
        return (digits * powers).sum(-1, dtype=torch.uint8)
    return _pack_bits(codes, _width(format))


def unpack(packed: Tensor, format: WeightFormat, columns: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 codes ``[..., columns]``."""
    if format.base3:
        trits = torch.nn.functional.embedding(packed.to(torch.int32), _trits_of_bytes(packed.device))
        return trits.flatten(-2)[..., :columns]
    return _unpack_bits(packed, _width(format), columns)


def _width(format: WeightFormat) -> int:
    return 1 if format.scheme is Scheme.BCQ else format.bits


def _pad(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % multiple))


def _trits_of_bytes(device: torch.device) -> Tensor:
    """The five digits of every byte, ``[256, 5]``."""
    powers = torch.tensor([3**i for i in range(TRITS_PER_BYTE)], device=device)
    return (torch.arange(256, device=device).unsqueeze(1) // powers % 3).to(torch.uint8)


# ---- codes of 1 to 8 bits --------------------------------------------------------------------------------------------


class _Halving(NamedTuple):
    """One step of spreading: of every ``2 n`` codes ``low`` masks the lower ``n``; the upper move to bit ``lane``."""

    low: int
    shift: int
    lane: int


@lru_cache(maxsize=8)
def _plan(bits: int) -> tuple[torch.dtype, int, int, tuple[_Halving, ...]]:
    """Type of a word, how many codes it holds, the bytes these take when packed, and the steps that spread it."""
    # The fewest codes that fill whole bytes: those of one byte if `bits` divides 8, else eight codes in `bits` bytes.
    codes = 8 // bits if 8 % bits == 0 else 8
    steps, half = [], codes // 2
    while half:
        fields = range(0, 8 * codes, 16 * half)
        steps.append(_Halving(sum((2 ** (half * bits) - 1) << field for field in fields), half * (8 - bits), half * 8))
        half //= 2
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[codes], codes, codes * bits // 8, tuple(steps)


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes.contiguous()
    dtype, per_word, size, steps = _plan(bits)
    row_bytes = -(-codes.shape[-1] * bits // 8)
    word = _pad(codes, per_word).unflatten(-1, (-1, per_word)).contiguous().view(dtype)
    for low, shift, lane in reversed(steps):
        word = (word & low) | ((word >> shift) & (low << (lane - shift)))
    return word.view(torch.uint8)[..., :size].flatten(-2)[..., :row_bytes].contiguous()


def _unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    if bits == 8:
        return packed[..., :columns]
    dtype, per_word, size, steps = _plan(bits)
    if size == 1:
        word = packed.to(dtype, memory_format=torch.contiguous_format)
    else:
        words = _pad(packed, size).unflatten(-1, (-1, size))
        word = torch.nn.functional.pad(words, (0, per_word - size)).contiguous().view(dtype).squeeze(-1)
    for low, shift, lane in steps:
        upper = (word << shift).bitwise_and_(low << lane)
        word = word.bitwise_and_(low).bitwise_or_(upper)
    return word.view(torch.uint8)[..., :columns]
