"""What ``decode.py`` does to every byte, for the bytes of a register at once, in PTX.

The compiler takes vectors of bytes apart; it does not see that they can be shifted and masked together. Each function
gives the text for ``tl.inline_asm_elementwise``: results in half precision come from two bytes in the 16-bit register
``$1``, results in bytes from four in the 32-bit register ``$1``; both are in ``$0``.
"""

from __future__ import annotations

import triton


@triton.constexpr_function
def _mantissa(kind: str) -> int:
    """Digits of a mantissa: in 2^n with as many, the lowest counts 1."""
    return 10 if kind == "f16" else 7


@triton.constexpr_function
def _half(value: float, kind: str) -> int:
    """A number's bits in half precision, twice. The number has to be representable, and not 0."""
    digits, bias = (10, 15) if kind == "f16" else (7, 127)
    magnitude, exponent = abs(value), 0
    while magnitude >= 2:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1:
        magnitude, exponent = magnitude * 2, exponent - 1
    mantissa = (magnitude - 1) * 2**digits
    assert mantissa == int(mantissa), f"{value} is no {kind}"
    bits = (0x8000 if value < 0 else 0) | (exponent + bias) << digits | int(mantissa)
    return bits << 16 | bits


@triton.constexpr_function
def _block(*lines: str) -> str:
    return "{ .reg .b32 t, f, o; " + " ".join(f"{line};" for line in lines) + " }"


@triton.constexpr_function
def _to_half(position: int, mask: int, multiple: float, subtrahend: float, kind: str, shift: int) -> str:
    """``multiple * code - subtrahend`` of codes under ``mask``, which begin at bit ``position`` once the bytes are
    shifted right by ``shift``, or left if it is negative. There, in the mantissa of 2^n, they count ``2 ** position``.
    """
    digits, factor = _mantissa(kind), multiple / 2**position
    return _block(
        f"mov.b32 f, {_half(factor, kind):#x}",
        f"mov.b32 o, {_half(-(2**digits * factor + subtrahend), kind):#x}",
        "cvt.u32.u16 t, $1",
        "prmt.b32 t, t, 0, 0x4140",  # a zero behind each byte
        *((f"shr.u32 t, t, {shift}",) if shift > 0 else (f"shl.b32 t, t, {-shift}",) if shift else ()),
        f"lop3.b32 t, t, {mask << 16 | mask:#x}, {_half(2.0**digits, kind):#x}, 0xea",  # (a & b) | c
        f"fma.rn.{kind}x2 $0, t, f, o",
    )


@triton.constexpr_function
def half_of_plane(plane: int, width: int, zero: int, multiple: int, kind: str) -> str:
    """``multiple * code - zero`` of plane ``plane``: where it stands, if the mantissa reaches that far.

    Large multiples want it higher up, as there is no 64 * 1024 in float16.
    """
    place = plane * width
    position = min(max(place, 2 if multiple > 16 else 0), _mantissa(kind) - width)
    return _to_half(position, (2**width - 1) << position, float(multiple), float(zero), kind, place - position)


@triton.constexpr_function
def half_of_sign(bit: int, kind: str) -> str:
    """1 or -1 by a bit. At position 0 it would take a constant of one digit too many."""
    position = min(max(bit, 1), _mantissa(kind) - 1)
    return _to_half(position, 1 << position, 2.0, 1.0, kind, bit - position)


@triton.constexpr_function
def _four(byte: int) -> int:
    return byte * 0x01010101


@triton.constexpr_function
def codes_of_plane(plane: int, width: int) -> str:
    """The codes of a plane, each in a byte."""
    place = plane * width
    shifted = (f"shr.u32 t, $1, {place}",) if place else ("mov.b32 t, $1",)
    return _block(*shifted, f"and.b32 $0, t, {_four(2**width - 1):#x}")


@triton.constexpr_function
def bytes_of_plane(plane: int, width: int, zero: int) -> str:
    """``code - zero`` of a plane, in signed bytes: no byte borrows of another while its highest bit is set."""
    place = plane * width
    high = f"{_four(0x80):#x}"
    if width == 8:
        return _block(f"xor.b32 $0, $1, {high}")  # zero is 128
    shifted = (f"shr.u32 t, $1, {place}",) if place else ("mov.b32 t, $1",)
    masked = f"lop3.b32 t, t, {_four(2**width - 1):#x}, {high}, 0xea"
    return _block(*shifted, masked, f"sub.u32 t, t, {_four(zero):#x}", f"xor.b32 $0, t, {high}")


@triton.constexpr_function
def bytes_of_sign(bit: int) -> str:
    """1 or -1 by a bit, in signed bytes: 255 - 254 or 255 - 0."""
    shifted = (f"shr.u32 t, $1, {bit}",) if bit else ("mov.b32 t, $1",)
    return _block(*shifted, f"and.b32 t, t, {_four(1):#x}", "mad.lo.u32 $0, t, 0xffffff02, 0xffffffff")


@triton.constexpr_function
def joined(low: int) -> str:
    """Codes of ``low`` bits with more bits above them (``$2``)."""
    return _block(f"shl.b32 t, $2, {low}", "or.b32 $0, $1, t")
