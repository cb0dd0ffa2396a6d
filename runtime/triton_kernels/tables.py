"""Which tiles a packed linear runs with, by how many tokens it has and how wide the codes are.

The table of the H100 was made by counting: instructions for each weight in the compiled code against the bytes that a
multiprocessor can be given meanwhile. It is not measured.
"""

from __future__ import annotations

from typing import NamedTuple

from ..formats import Scheme, WeightFormat


class Tiles(NamedTuple):
    """How a launch is cut up: ``rows`` × ``tokens`` a program, ``split`` programs a tile, and how it is compiled."""

    rows: int
    tokens: int
    split: int
    warps: int
    stages: int


CARDS = ("H100", "H200")
"""What names of GPUs have in them that the tables are for."""

MULTIPROCESSORS = 132
"""Of such a GPU (SXM)."""

PROGRAMS_EACH = 4
"""So many programs of few tokens should be on every multiprocessor at once, to have enough loads under way."""

MAX_SPLIT = 16

UNPACKED_FROM = 1024
"""From so many tokens on, a weight is unpacked once and multiplied by cuBLAS: unpacking then costs less than what its
products gain on those of tiles that unpack as they go."""

FEW = 16
"""Tokens of the smallest tiles: the widest matrix instructions (of 64 rows of weights) take no fewer columns."""

UNPACKED_FROM_FLOAT32 = FEW + 1
"""The same for float32 inputs, which tensor cores do not multiply: larger tiles of several products spill kilobytes."""

# For tokens up to the first number: rows and tokens of a tile, warps, stages.
_Table = tuple[tuple[int, tuple[int, int, int, int]], ...]
H100: _Table = (
    (FEW, (64, 16, 4, 4)),
    (32, (64, 32, 4, 4)),
    (64, (128, 64, 8, 4)),
    (UNPACKED_FROM, (128, 128, 8, 3)),
)
H100_PLANES: _Table = ((FEW, (64, 16, 4, 4)), (32, (64, 32, 4, 4)), (UNPACKED_FROM, (128, 64, 8, 3)))
"""For formats that add up several products: larger tiles would spill."""


def planes_of(format: WeightFormat) -> int:
    """How many products a weight of this format takes: one for each plane, and one for zero points."""
    return format.bits if format.scheme is Scheme.BCQ else 1 if format.symmetric else 2


def default_tiles(
    tokens: int, rows: int, columns: int, planes: int = 1, multiprocessors: int = MULTIPROCESSORS
) -> Tiles:
    """The tiles for ``[tokens, columns]`` inputs of a ``[rows, columns]`` weight."""
    table = H100 if planes == 1 else H100_PLANES
    tile_rows, tile_tokens, warps, stages = next((tiles for most, tiles in table if tokens <= most), table[-1][1])
    tiles = -(-rows // tile_rows) * -(-tokens // tile_tokens)
    return Tiles(tile_rows, tile_tokens, splits(tiles, columns, multiprocessors), warps, stages)


def splits(tiles: int, columns: int, multiprocessors: int) -> int:
    """Over how many programs the columns of a tile are cut, so that so many tiles fill a GPU.

    Every program keeps two chunks of 128 columns at least.
    """
    wanted = -(-multiprocessors * PROGRAMS_EACH // max(tiles, 1))
    most = min(max(-(-columns // 128) // 2, 1), MAX_SPLIT)
    split = 1
    while 2 * split <= min(wanted, most):
        split *= 2
    return split
