"""A packed weight on the grid that ONNX has: codes of 2, 4 or 8 bits whose middle is 0.

=====================  ==========================================================================================
affine, 2 to 8 bits    the next width; ``code + 2^(width-1) - 2^(bits-1)``, so that the implied zero point is the middle
... asymmetric         integers as zero points stay beside the codes; others become an offset of the group
ternary                2 bits, ``code + 1``: 1, 2, 3 for -1, 0, 1
binary                 2 bits, 1 and 3 for -1 and 1
bcq                    as binary, plane by plane; the planes are summed
... uniform            planes whose alphas double from one to the next: one affine code; a constant plane: an offset
outliers               a sparse matrix beside it; of those that replace, the codes below become 0
=====================  ==========================================================================================

Every number stays what it is: ``weight = sum over planes of (code - zero_point) * scale, + offset, + outliers``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from prequant.passes.weights import WeightView
from prequant.runtime import Granularity, Outliers, Scheme, WeightFormat
from prequant.runtime.packing import unpack
from prequant.runtime.reference import dequantize

Array = np.ndarray[Any, Any]


def width_of(format: WeightFormat) -> int:
    """Bits of a code on the grid: 2, 4 or 8; of bcq, of each plane."""
    return 2 if format.scheme is Scheme.BCQ else next(width for width in (2, 4, 8) if width >= format.bits)


@dataclass(frozen=True)
class Sparse:
    """Outliers by rows (CSR), all to be added: float ``values``, ``columns``, ``row_offsets`` ``[rows + 1]``."""

    values: Array
    columns: Array
    row_offsets: Array


@dataclass(frozen=True)
class Grid:
    """``codes``: uint8 ``[planes, rows, columns]`` below ``2 ** width``. ``scale``: float32 ``[planes, rows, groups]``
    (one for all: ``[1, 1, 1]``), each for ``group`` columns. ``zero_point``: uint8 ``[1, rows, groups]`` (``[1, 1, 1]``
    likewise), or None for the middle. ``offset``: float32 ``[rows, groups]``, what every weight of the group
    gets added.
    """

    name: str
    width: int
    group: int
    codes: Array
    scale: Array
    zero_point: Array | None
    offset: Array | None
    outliers: Sparse | None

    @property
    def planes(self) -> int:
        """How many products or rows are summed."""
        return int(self.codes.shape[0])

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return int(self.codes.shape[1])

    @property
    def columns(self) -> int:
        """Columns of the weight."""
        return int(self.codes.shape[2])


def grid(view: WeightView) -> Grid:
    """The grid of a weight whose tensors are codes."""
    format, (rows, columns) = WeightFormat.parse(view.format), view.shape
    parts = {part: view.program.tensor(name).detach() for part, name in view.tensors.items()}
    is_bcq = format.scheme is Scheme.BCQ
    packed, scale = (parts["planes"], parts["alphas"]) if is_bcq else (parts["codes"], parts["scale"])
    codes = unpack(packed, format, columns).reshape(format.bits if is_bcq else 1, rows, columns).numpy()
    scales = scale.reshape(format.bits if is_bcq else 1, *scale.shape[-2:]).numpy()
    width = width_of(format)
    middle, zero_point, offset = 1 << (width - 1), None, None
    if is_bcq:
        codes, scales, offset, width = _merged(codes, scales)
    elif format.scheme is Scheme.BINARY:
        codes = 2 * codes + 1
    elif format.symmetric:
        codes = codes + np.uint8(middle - int(format.implied_zero_point))
    else:
        given = parts["zero_point"].float().numpy()
        if bool(((given == np.round(given)) & (given >= 0) & (given < format.levels)).all()):
            zero_point = given.astype(np.uint8)[None]
        else:
            shift = middle - (1 << (format.bits - 1))
            codes = codes + np.uint8(shift)
            # Of groups: a matrix with one scale has one group a row.
            each = ((middle - shift) - given.astype(np.float64)) * scale.double().numpy()
            offset = np.ascontiguousarray(np.broadcast_to(each, (rows, each.shape[1])), dtype=np.float32)
    found = Grid(view.name, width, groups_of(format, columns), codes, scales, zero_point, offset, None)
    if "outliers.values" not in parts:
        return found
    values, positions, offsets = (parts[f"outliers.{part}"] for part in ("values", "columns", "row_offsets"))
    return _with_outliers(found, Outliers(values, positions, offsets, view.outliers_replace), view)


def _merged(bits: Array, alphas: Array) -> tuple[Array, Array, Array | None, int]:
    """Planes ``[planes, rows, columns]`` of 0 and 1 as codes, scales, offset and width: one affine code where alphas
    double from plane to plane, to the last bit; else each plane on its own. Planes that are all ones become an offset.
    """
    constant = bits.min(axis=(1, 2)) == bits.max(axis=(1, 2))
    offset = np.zeros(alphas.shape[1:], np.float32)
    if constant.all():
        constant[:] = False
    for plane in np.flatnonzero(constant):
        offset += alphas[plane] * np.float32(2.0 * bits[plane, 0, 0] - 1)
    bits, alphas = bits[~constant], alphas[~constant]
    order = np.argsort(np.abs(alphas).mean(axis=(1, 2)), kind="stable")
    doubled = all((alphas[j] == 2 * alphas[i]).all() for i, j in pairwise(order))
    count = len(order)
    if count < 2 or not doubled:
        return 2 * bits + 1, alphas, offset if constant.any() else None, 2
    width = next(width for width in (2, 4, 8) if width >= count)
    low = alphas[order[0]]
    # sum_i 2^i low (2 u_i - 1) = 2 low (u - 2^(count-1)) + low
    codes = sum(bits[plane] << i for i, plane in enumerate(order)) + np.uint8((1 << (width - 1)) - (1 << (count - 1)))
    offset = offset + low
    return codes[None], 2 * low[None], offset if offset.any() else None, width


def _with_outliers(grid: Grid, outliers: Outliers, view: WeightView) -> Grid:
    """The grid with outliers that are all to be added: the codes below those that replace become 0, or are subtracted
    where no code is 0.
    """
    values, codes = outliers.values, grid.codes
    if outliers.replace:
        at = tuple(index.numpy() for index in outliers.positions())
        if grid.planes > 1 or grid.offset is not None or WeightFormat.parse(view.format).scheme is Scheme.BINARY:
            values = values.float() - _decoded(view)[outliers.positions()]
        else:
            zero = np.full((1, 1), 1 << (grid.width - 1), np.uint8) if grid.zero_point is None else grid.zero_point[0]
            each = np.broadcast_to(zero, (grid.rows, zero.shape[1]))
            codes = codes.copy()
            codes[0][at] = each[at[0], at[1] // grid.group if each.shape[1] > 1 else 0]
    columns = outliers.columns
    narrow = columns.view(torch.int16).numpy().view(np.uint16) if columns.dtype is torch.uint16 else columns.numpy()
    sparse = Sparse(values.numpy(), narrow, outliers.row_offsets.to(torch.int32).numpy())
    return replace(grid, codes=codes, outliers=sparse)


def _decoded(view: WeightView) -> torch.Tensor:
    """What the codes of a weight alone stand for."""
    parts = {part: view.program.tensor(name).detach() for part, name in view.tensors.items()}
    codes, scale = (parts["planes"], parts["alphas"]) if "planes" in parts else (parts["codes"], parts["scale"])
    return dequantize(codes, scale, parts.get("zero_point"), WeightFormat.parse(view.format), view.shape[1])


def groups_of(format: WeightFormat, columns: int) -> int:
    """Columns that share a scale; all of them for a scale of a row or of the whole matrix."""
    grouped = format.granularity is Granularity.GROUP and format.group_size < columns
    return format.group_size if grouped else columns


def packed_codes(codes: Array, width: int) -> Array:
    """Codes below ``2 ** width`` along the last axis, ``8 / width`` to a byte, the first in its low bits.

    The last byte is filled up with zeros.
    """
    per_byte = 8 // width
    if per_byte == 1:
        return np.ascontiguousarray(codes)
    padding = -codes.shape[-1] % per_byte
    if padding:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], padding), np.uint8)], axis=-1)
    packed = codes[..., ::per_byte].copy()
    for i in range(1, per_byte):
        packed |= codes[..., i::per_byte] << (width * i)
    return packed
