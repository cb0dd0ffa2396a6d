"""The vocabulary of compressed weights: what a block of packed bytes means.

Every format reads the same way, row by row. A linear weight is ``[out_features, in_features]``: a row is an output
channel.

=========  ==============================  ===========================================  ======================
scheme     codes, uint8                    scale                                        value of code ``u``
=========  ==============================  ===========================================  ======================
affine     ``[out, ceil(in * bits / 8)]``  ``[1, 1]``, ``[out, 1]``, ``[out, groups]``  ``(u - zero_point) * scale``
ternary    ``[out, ceil(in / 4 or 5)]``    the same                                     ``(u - 1) * scale``
binary     ``[out, ceil(in / 8)]``         the same                                     ``(2 u - 1) * scale``
bcq        ``[planes, out, ceil(in / 8)]`` ``[planes, out, 1 or groups]``               ``sum_i (2 u_i - 1) * scale_i``
=========  ==============================  ===========================================  ======================

Symmetric affine formats have the implied zero point ``2 ** (bits - 1)``; asymmetric ones store one (float) beside
each scale. Codes of one row form one little-endian bit stream: code ``i`` begins at bit ``i * bits``, and a row starts
on a byte. Base-3 ternary stores five codes a byte, ``sum_i u_i * 3 ** i``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TypeVar

from .errors import FormatError

LAYOUT_VERSION = 1
"""Version of the byte layout above. A reader refuses every version it does not know."""

TRITS_PER_BYTE = 5


class Scheme(str, Enum):
    """How a code becomes a number."""

    AFFINE = "affine"
    TERNARY = "ternary"
    BINARY = "binary"
    BCQ = "bcq"


class Granularity(str, Enum):
    """How many weights share one scale: the whole matrix, a row (output channel), or a group along ``in_features``."""

    TENSOR = "tensor"
    ROW = "row"
    GROUP = "group"


@dataclass(frozen=True)
class WeightFormat:
    """What a block of codes means; ops and files carry it as text, which :meth:`parse` turns back.

    ``bits`` is the code width of an affine format (1-8), the number of planes of a bcq one (1-8), 2 for ternary and 1
    for binary. ``group_size`` is 0 unless the granularity is ``group``. ``base3`` packs ternary codes five to a byte
    (1.6 bits each).

    >>> str(WeightFormat.affine(4, "group", 64, symmetric=False))
    'affine4:group64:asym'
    """

    scheme: Scheme
    bits: int
    granularity: Granularity = Granularity.ROW
    group_size: int = 0
    symmetric: bool = True
    base3: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheme", _enum(Scheme, self.scheme, "scheme"))
        object.__setattr__(self, "granularity", _enum(Granularity, self.granularity, "granularity"))
        for name, value in (("bits", self.bits), ("group_size", self.group_size)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise FormatError(f"{name}={value!r} must be an integer")
        low, high = {Scheme.AFFINE: (2, 8), Scheme.BCQ: (1, 8), Scheme.TERNARY: (2, 2), Scheme.BINARY: (1, 1)}[
            self.scheme
        ]
        if not low <= self.bits <= high:
            raise FormatError(f"bits={self.bits} is not possible for {self.scheme.value} weights: use {low} to {high}")
        if self.group_size < 0 or (self.granularity is Granularity.GROUP) != (self.group_size > 0):
            raise FormatError(
                f"group_size={self.group_size} with granularity={self.granularity.value!r}: "
                "a group size above 0 goes with granularity 'group', and only with it"
            )
        if not self.symmetric and self.scheme is not Scheme.AFFINE:
            raise FormatError(f"{self.scheme.value} weights are symmetric; symmetric=False is for affine ones")
        if self.base3 and self.scheme is not Scheme.TERNARY:
            raise FormatError(f"base-3 storage is for ternary weights, not {self.scheme.value} ones")
        if self.scheme is Scheme.BCQ and self.granularity is Granularity.TENSOR:
            raise FormatError("bcq weights have one alpha per row or group, not per tensor")

    # ---- construction ------------------------------------------------------------------------------------------------

    @classmethod
    def affine(
        cls, bits: int, granularity: Granularity | str = Granularity.ROW, group_size: int = 0, symmetric: bool = True
    ) -> WeightFormat:
        """Uniform levels, 2 to 8 bits."""
        return cls(Scheme.AFFINE, bits, granularity, group_size, symmetric)  # type: ignore[arg-type]

    @classmethod
    def ternary(
        cls, granularity: Granularity | str = Granularity.ROW, group_size: int = 0, base3: bool = False
    ) -> WeightFormat:
        """Levels -1, 0, 1 times the scale; two bits a code, or 1.6 with ``base3``."""
        return cls(Scheme.TERNARY, 2, granularity, group_size, base3=base3)  # type: ignore[arg-type]

    @classmethod
    def binary(cls, granularity: Granularity | str = Granularity.ROW, group_size: int = 0) -> WeightFormat:
        """Levels -1 and 1 times the scale; one bit a code."""
        return cls(Scheme.BINARY, 1, granularity, group_size)  # type: ignore[arg-type]

    @classmethod
    def bcq(cls, planes: int, group_size: int = 0) -> WeightFormat:
        """Binary coding: a sum of ``planes`` binary matrices, each with alphas per row, or per group of a size."""
        return cls(Scheme.BCQ, planes, Granularity.GROUP if group_size else Granularity.ROW, group_size)

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """The inverse of ``str``. Raises :class:`FormatError` on anything else."""
        if not isinstance(text, str):
            raise FormatError(f"a weight format is text, got {text!r}")
        return _parse(text)

    def __str__(self) -> str:
        head = self.scheme.value + (str(self.bits) if self.scheme in (Scheme.AFFINE, Scheme.BCQ) else "")
        parts = [head, self.granularity.value + (str(self.group_size) if self.group_size else "")]
        if not self.symmetric:
            parts.append("asym")
        if self.base3:
            parts.append("base3")
        return ":".join(parts)

    # ---- what follows from it ----------------------------------------------------------------------------------------

    @property
    def levels(self) -> int:
        """How many different codes there are (per plane for bcq)."""
        return {Scheme.AFFINE: 2**self.bits, Scheme.TERNARY: 3}.get(self.scheme, 2)

    @property
    def implied_zero_point(self) -> float:
        """The code that stands for 0 in a symmetric affine or ternary format. Binary and bcq formats have none."""
        return 1.0 if self.scheme is Scheme.TERNARY else float(2 ** (self.bits - 1))

    @property
    def bits_per_weight(self) -> float:
        """Bits that the codes of one weight take on disk, scales not counted."""
        return 8 / TRITS_PER_BYTE if self.base3 else float(self.bits)

    def groups(self, columns: int) -> int:
        """How many scales a row of ``columns`` weights has (the last group may be shorter)."""
        return -(-columns // self.group_size) if self.granularity is Granularity.GROUP else 1

    def row_bytes(self, columns: int) -> int:
        """Bytes that one row of codes takes (one plane's row for bcq)."""
        if self.base3:
            return -(-columns // TRITS_PER_BYTE)
        return -(-columns * (1 if self.scheme is Scheme.BCQ else self.bits) // 8)

    def codes_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the uint8 codes of a ``[rows, columns]`` weight."""
        shape = (rows, self.row_bytes(columns))
        return (self.bits, *shape) if self.scheme is Scheme.BCQ else shape

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales (alphas) of a ``[rows, columns]`` weight; a zero point has the same shape."""
        if self.granularity is Granularity.TENSOR:
            return (1, 1)
        shape = (rows, self.groups(columns))
        return (self.bits, *shape) if self.scheme is Scheme.BCQ else shape


_Kind = TypeVar("_Kind", Scheme, Granularity)


def _enum(kind: type[_Kind], value: object, name: str) -> _Kind:
    try:
        return kind(value)
    except ValueError:
        raise FormatError(f"{name}={value!r}: expected one of {[member.value for member in kind]}") from None


_TEXT = re.compile(r"(affine|bcq|ternary|binary)(\d?):(tensor|row|group)(\d*)(:asym)?(:base3)?")


@lru_cache(maxsize=1024)
def _parse(text: str) -> WeightFormat:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise FormatError(
            f"{text!r} is not a weight format; examples: 'affine4:row', 'affine4:group64:asym', 'ternary:row:base3'"
        )
    scheme, bits, granularity, group, asymmetric, base3 = match.groups()
    width = int(bits) if bits else {"ternary": 2, "binary": 1}.get(scheme, 0)
    parsed = WeightFormat(
        Scheme(scheme), width, Granularity(granularity), int(group or 0), asymmetric is None, base3 is not None
    )
    if str(parsed) != text:
        raise FormatError(f"{text!r} is not a weight format; did you mean {str(parsed)!r}?")
    return parsed
