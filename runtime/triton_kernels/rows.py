"""Rows of packed codes become floats: behind ``dequantize``, ``packed_embedding``, and linears of many tokens.

The kernels read the neutral layout, so nothing is arranged for a table of which a call takes a few rows. Values are the
reference's, to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .. import reference
from ..formats import Granularity, Scheme, WeightFormat
from ..reference import Outliers
from . import workspace
from .device import rows as device

BLOCK_ROWS, BLOCK_COLUMNS = 4, 512
"""What a program unpacks."""

BLOCK_OUTLIERS = 128

BLOCK_VALUES = 512


def unpacked(
    format: WeightFormat,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
    dtype: torch.dtype,
    ids: Tensor | None = None,
) -> Tensor:
    """The float weight, ``[rows, columns]``, or its rows ``ids`` ``[n]``, ``[n, columns]``."""
    rows = codes.shape[-2]
    count = rows if ids is None else ids.shape[0]
    sparse = None if outliers is None or not outliers.values.numel() else outliers
    # Outliers come to the value before it is rounded.
    output = torch.empty(count, columns, dtype=torch.float32 if sparse is not None else dtype, device=codes.device)
    if not output.numel():
        return output.to(dtype)
    codes, scale = codes.contiguous(), scale.float().contiguous()
    zeros = zero_point.float().contiguous() if zero_point is not None and format.scheme is Scheme.AFFINE else None
    ids = None if ids is None else ids.contiguous()
    with workspace.on(codes.device):
        device.unpack_rows[(triton.cdiv(count, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS))](
            *(codes, scale, scale if zeros is None else zeros, codes if ids is None else ids, output),
            *(count, rows, columns, codes.shape[-1], scale.shape[-1]),
            **format_constants(format),
            HAS_ZEROS=zeros is not None,
            HAS_IDS=ids is not None,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=min(triton.next_power_of_2(columns), BLOCK_COLUMNS),
        )
    if sparse is not None:
        _scatter(output, sparse, rows, ids)
    return output.to(dtype)


def values_at(
    format: WeightFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, positions: tuple[Tensor, Tensor]
) -> Tensor:
    """The elements of a weight at some rows and columns, int64 ``[n]`` each, in float32 ``[n]``."""
    where = [part.contiguous() for part in positions]
    output = torch.empty(where[0].shape, dtype=torch.float32, device=codes.device)
    codes, scale = codes.contiguous(), scale.float().contiguous()
    zeros = zero_point.float().contiguous() if zero_point is not None and format.scheme is Scheme.AFFINE else None
    with workspace.on(codes.device):
        device.values_at[(triton.cdiv(output.numel(), BLOCK_VALUES),)](
            *(codes, scale, scale if zeros is None else zeros, *where, output),
            *(output.numel(), codes.shape[-2], codes.shape[-1], scale.shape[-1]),
            **format_constants(format),
            HAS_ZEROS=zeros is not None,
            BLOCK=BLOCK_VALUES,
        )
    return output


def _scatter(output: Tensor, outliers: Outliers, rows: int, ids: Tensor | None) -> None:
    """Put the outliers of a weight of so many rows into a contiguous float32 one, or into its rows ``ids``."""
    with workspace.on(output.device):
        device.scatter_outliers[(output.shape[0],)](
            *(output, outliers.values.detach().contiguous(), outliers.columns.contiguous()),
            *(outliers.row_offsets.contiguous(), outliers.row_offsets if ids is None else ids, rows, output.shape[1]),
            REPLACE=outliers.replace,
            HAS_IDS=ids is not None,
            BLOCK=BLOCK_OUTLIERS,
        )


def add_outliers(format: None, weight: Tensor, outliers: Outliers) -> Tensor:
    """See :func:`prequant.runtime.reference.add_outliers`, for a float32 weight."""
    output = weight.clone(memory_format=torch.contiguous_format)
    if output.numel() and outliers.values.numel():
        _scatter(output, outliers, weight.shape[0], None)
    return output if weight.is_contiguous() else torch.empty_like(weight).copy_(output)


def format_constants(format: WeightFormat) -> dict[str, Any]:
    """What the kernel is compiled for of a format."""
    signs = format.scheme in (Scheme.BINARY, Scheme.BCQ)
    return {
        "BITS": 1 if signs else format.bits,
        "TERMS": format.bits if format.scheme is Scheme.BCQ else 1,
        "SIGNS": signs,
        "BASE3": format.base3,
        "ZERO": 0 if signs else int(format.implied_zero_point),
        "GROUP": format.group_size,
        "SHARED": format.granularity is Granularity.TENSOR,
    }


def dequantize(
    format: WeightFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    """See :func:`prequant.runtime.reference.dequantize`."""
    return unpacked(format, codes, scale, zero_point, None, columns, dtype)


def packed_embedding(
    format: WeightFormat,
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`prequant.runtime.reference.packed_embedding`.

    Ids are looked at only where that does not wait for a GPU; there, one outside the table gives a row of NaN.
    """
    flat = ids.reshape(-1)
    if flat.device.type == "cpu":
        reference.check_ids(flat, codes.shape[-2])
    taken = unpacked(format, codes, scale, zero_point, outliers, columns, dtype, flat)
    return taken.reshape(*ids.shape, columns)
