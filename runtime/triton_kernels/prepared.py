"""Weights in the kernels' order, made when they are first used and kept while their tensors live and do not change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..backends import records_gradients
from ..formats import Scheme, WeightFormat
from ..reference import Outliers
from ..versions import version_of
from .layout import arrange_codes, arrange_scales
from .rows import unpacked, values_at
from .workspace import lasting


@dataclass(frozen=True)
class Sparse:
    """Outliers as values to add, whatever they were; all three as :class:`Outliers` has them, columns in int32."""

    values: Tensor
    columns: Tensor
    row_offsets: Tensor


@dataclass
class Scales:
    """What goes with arranged codes: scales and zero points as ``layout.arrange_scales`` has them, and outliers.

    ``zeros`` are relative to ``zero_point_of`` the format. ``sums`` are :func:`row_sums`, once they are asked for.
    ``kept``: for later calls as well.
    """

    scales: Tensor
    zeros: Tensor | None
    sparse: Sparse | None
    sums: Tensor | None = None
    kept: bool = False


@dataclass
class _Kept:
    """The codes of one tensor, and what has gone with them, by the tensors (of scales, of outlier values) it came from.

    ``states`` tell whether these tensors are what they were; ``memory`` holds on to theirs, so that nothing else can
    come to be at their addresses.
    """

    codes: Tensor
    state: tuple[Any, ...]
    memory: Tensor
    scales: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By tensors of codes."""


def zero_point_of(format: WeightFormat) -> int:
    """What the kernels subtract from every code; a stored zero point counts from there."""
    return 0 if format.scheme in (Scheme.BINARY, Scheme.BCQ) else int(format.implied_zero_point)


def arranged_codes(format: WeightFormat, codes: Tensor, columns: int) -> Tensor:
    """Codes in the kernels' order; arranged if they are new, or not what they were."""
    return _entry(format, codes, columns).codes


def _entry(format: WeightFormat, codes: Tensor, columns: int) -> _Kept:
    state = (format.scheme, format.bits, format.base3, columns, _state(codes))
    kept = _kept.get(codes)
    if kept is None or kept.state != state:
        arranged = lasting(lambda: arrange_codes(codes, format, columns), codes.device)
        kept = _kept[codes] = _Kept(arranged, state, codes.detach())
    return kept


def arranged_scales(
    format: WeightFormat,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
) -> Scales:
    """What goes with the codes; arranged if it is new, or not what it was. While it trains it is not kept."""
    if records_gradients(scale, zero_point, None if outliers is None else outliers.values):
        return _arrange(format, codes, scale, zero_point, outliers, columns)
    tensors = (scale, zero_point, *(outliers[:3] if outliers is not None else ()))
    state = (format, outliers is not None and outliers.replace, *map(_state, tensors))
    by_values = _entry(format, codes, columns).scales.setdefault(scale, WeakIdKeyDictionary())
    key = scale if outliers is None else outliers.values
    known = by_values.get(key)
    if known is None or known[0] != state:
        memory = [None if tensor is None else tensor.detach() for tensor in tensors]
        weight = (format, codes, scale, zero_point, outliers, columns)
        known = by_values[key] = (state, lasting(lambda: _arrange(*weight), codes.device), memory)
        known[1].kept = True
    return known[1]


def _arrange(
    format: WeightFormat,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
) -> Scales:
    zeros = None
    if zero_point is not None and format.scheme is Scheme.AFFINE:  # a ternary one is the threshold of rounding
        zeros = arrange_scales(zero_point, format) - zero_point_of(format)
    sparse = None
    if outliers is not None and outliers.values.numel():
        sparse = _differences(format, codes, scale, zero_point, outliers, columns)
    return Scales(arrange_scales(scale, format), zeros, sparse)


def _differences(
    format: WeightFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, outliers: Outliers, columns: int
) -> Sparse:
    values = outliers.values.detach().float()
    if outliers.replace:
        values = values - values_at(format, codes, scale.detach(), zero_point, outliers.positions())
    return Sparse(
        values.contiguous(),
        outliers.columns.to(torch.int32).contiguous(),
        outliers.row_offsets.to(torch.int32).contiguous(),
    )


def row_sums(
    scales: Scales,
    format: WeightFormat,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
) -> Tensor:
    """Sums of the rows of a weight, ``[rows]`` float32: what an input's zero point is multiplied by."""

    def made() -> Tensor:
        weight = unpacked(format, codes, scale.detach(), zero_point, outliers, columns, torch.float32)
        return weight.sum(-1, dtype=torch.float64).float()

    if scales.sums is None:
        scales.sums = lasting(made, codes.device) if scales.kept else made()
    return scales.sums


def _state(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """What changes when a tensor does: where it is, and how often it was written to."""
    return None if tensor is None else (tensor.device, tensor.data_ptr(), version_of(tensor))
