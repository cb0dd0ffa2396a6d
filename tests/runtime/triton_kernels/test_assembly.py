"""The assembly of unpacking, evaluated by hand: on all bytes it gives what decode.py says in Python.

A GPU may not be at hand, and the interpreter runs no assembly.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from prequant.runtime.triton_kernels.device import assembly

WHOLE = 0xFFFFFFFF


def prmt(first: int, second: int, select: int) -> int:
    places = [*first.to_bytes(4, "little"), *second.to_bytes(4, "little")]
    return int.from_bytes(bytes(places[select >> 4 * i & 7] for i in range(4)), "little")


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([word & 0xFFFF, word >> 16]).to(torch.uint16).view(dtype)


def fma(kind: str) -> Callable[[int, int, int], int]:
    dtype = torch.float16 if kind == "f16" else torch.bfloat16

    def run(a: int, b: int, c: int) -> int:
        exact = halves(a, dtype).double() * halves(b, dtype).double() + halves(c, dtype).double()  # rounded once
        low, high = exact.to(dtype).view(torch.uint16).tolist()
        return int(high << 16 | low)

    return run


def lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for index in range(8):  # bit `index` of the table is the result for those bits of a, b and c
        if table >> index & 1:
            picked = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result |= picked
    return result & WHOLE


OPERATIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "cvt.u32.u16": lambda a: a & 0xFFFF,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & WHOLE,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "sub.u32": lambda a, b: a - b & WHOLE,
    "mad.lo.u32": lambda a, b, c: a * b + c & WHOLE,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.f16x2": fma("f16"),
    "fma.rn.bf16x2": fma("bf16"),
}


def evaluate(text: str, *inputs: int) -> int:
    """``$0`` of a block, from ``$1`` and on."""
    registers = {f"${i + 1}": value for i, value in enumerate(inputs)}
    body = re.fullmatch(r"\{ \.reg \.b32 t, f, o; (.*); \}", text)
    assert body is not None, text
    for line in body[1].split("; "):
        name, operands = line.split(" ", 1)
        target, *sources = operands.split(", ")
        values = [registers[each] if each in registers else int(each, 0) for each in sources]
        registers[target] = OPERATIONS[name](*values)
    return registers["$0"]


def word_of(values: list[int]) -> int:
    return int.from_bytes(bytes(values), "little")


def halves_of_all_bytes(text: str, kind: str) -> list[float]:
    """Each byte's number, beside another byte in either half."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    found = []
    for byte in range(256):
        other = 255 - byte
        low, high = (halves(evaluate(text, word_of(pair)), dtype) for pair in ([byte, other], [other, byte]))
        assert low[0] == high[1]
        found.append(float(low[0]))
    return found


def bytes_of_all_bytes(text: str) -> list[int]:
    """Each byte's number, among others in all four places."""
    found = []
    for byte in range(256):
        results = set()
        for place in range(4):
            values = [255 - byte] * 4
            values[place] = byte
            results.add(evaluate(text, word_of(values)) >> 8 * place & 255)
        (result,) = results
        found.append(result)
    return found


@pytest.mark.parametrize(
    ("kind", "width"), [("f16", 1), ("f16", 2), ("f16", 4), ("f16", 8), ("bf16", 1), ("bf16", 2), ("bf16", 4)]
)
def test_planes_in_half_precision(kind: str, width: int) -> None:
    parts: list[Any] = [(zero, 1) for zero in {0, 1, 2 ** (width - 1), 64 if width == 4 else 0}]
    parts += [(0, 4), (0, 16), (0, 64)] if width < 4 else []  # the upper bits of wider codes
    for plane in range(8 // width):
        for zero, multiple in parts:
            found = halves_of_all_bytes(assembly.half_of_plane(plane, width, zero, multiple, kind), kind)
            assert found == [(byte >> plane * width & 2**width - 1) * multiple - zero for byte in range(256)]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_signs_in_half_precision(kind: str) -> None:
    for bit in range(8):
        found = halves_of_all_bytes(assembly.half_of_sign(bit, kind), kind)
        assert found == [1.0 if byte >> bit & 1 else -1.0 for byte in range(256)]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_planes_in_bytes(width: int) -> None:
    for plane in range(8 // width):
        codes = [byte >> plane * width & 2**width - 1 for byte in range(256)]
        assert bytes_of_all_bytes(assembly.codes_of_plane(plane, width)) == codes
        for zero in {1, 2 ** (width - 1)} if width < 8 else {128}:
            found = bytes_of_all_bytes(assembly.bytes_of_plane(plane, width, zero))
            assert found == [code - zero & 255 for code in codes]


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_whole_codes_in_bytes(bits: int) -> None:
    text, zero = assembly.bytes_of_plane(0, bits, 2 ** (bits - 1)), 2 ** (bits - 1)
    assert bytes_of_all_bytes(text)[: 2**bits] == [code - zero & 255 for code in range(2**bits)]


def test_signs_in_bytes() -> None:
    for bit in range(8):
        found = bytes_of_all_bytes(assembly.bytes_of_sign(bit))
        assert found == [1 if byte >> bit & 1 else 255 for byte in range(256)]


@pytest.mark.parametrize("low", [2, 4, 6])
def test_bits_above_others(low: int) -> None:
    text, high = assembly.joined(low), [0, 1, 2 ** (7 - low), 2 ** (8 - low) - 1]
    codes = [2**low - 1, 0, 1, 2 ** (low - 1)]
    assert evaluate(text, word_of(codes), word_of(high)) == word_of(
        [code | above << low for code, above in zip(codes, high, strict=True)]
    )
