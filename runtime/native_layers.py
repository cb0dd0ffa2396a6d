"""Layers as the steps of plans name them: addresses of what the native library runs, and what has to live with them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import native_linear, native_rows
from .errors import FormatError
from .formats import _parse
from .native_weight import NeutralWeight
from .plan import MOST_LINEARS, Linears
from .reference import Outliers

_INPUT = torch.empty(0, dtype=torch.float32, device="cpu")
"""What the inputs of a plan's layers are like."""


@dataclass(frozen=True)
class Layer:
    """``address`` is good for as long as this lives and its tensors do not change."""

    address: int
    kept: tuple[Any, ...]


def takes_linear(
    *,
    format: str,
    columns: int,
    codes: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_format: str = "",
    **_: object,
) -> bool:
    """Whether there is a kernel for :func:`linear` with these arguments."""
    parsed, parsed_input = _parse(format), _parse(input_format) if input_format else None
    operands = (scale, None, None, None, input_scale, input_zero_point, columns, parsed_input)
    return native_linear.accepts(parsed, _INPUT, codes, *operands)


def takes_embedding(*, format: str, scale: Tensor, **_: object) -> bool:
    """Whether there is a kernel for :func:`embedding` with these arguments."""
    return native_rows.accepts(_parse(format), scale)


def linear(
    *,
    format: str,
    columns: int,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_row_offsets: Tensor | None = None,
    outliers_replace: bool,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    input_format: str,
    activation: str,
) -> Layer:
    """A ``prequant_linear`` of a ``packed_linear`` on float32 inputs."""
    outliers = _outliers(outlier_values, outlier_columns, outlier_row_offsets, outliers_replace)
    parsed, parsed_input = _parse(format), _parse(input_format) if input_format else None
    operands = (scale, zero_point, outliers, bias, input_scale, input_zero_point, columns, parsed_input)
    layer = native_linear.layer_of(parsed, _INPUT, codes, *operands, activation)
    return Layer(layer.address, (layer,))


def together(linears: Sequence[Layer]) -> Layer:
    """A ``prequant_linears`` of linears that read one input."""
    addresses = (layer.address for layer in linears)
    structure = Linears(len(linears), (ctypes.c_void_p * MOST_LINEARS)(*addresses))
    return Layer(ctypes.addressof(structure), (structure, *linears))


def embedding(
    *,
    format: str,
    columns: int,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    outlier_values: Tensor | None = None,
    outlier_columns: Tensor | None = None,
    outlier_row_offsets: Tensor | None = None,
    outliers_replace: bool,
) -> Layer:
    """A ``prequant_weight`` of a ``packed_embedding``. Raises :class:`FormatError` for outliers outside of it."""
    parsed = _parse(format)
    outliers = _outliers(outlier_values, outlier_columns, outlier_row_offsets, outliers_replace)
    if outliers is not None:
        _check_places(outliers, columns)
    weight = NeutralWeight(parsed, codes, scale, zero_point, columns, outliers)
    return Layer(weight.address, (weight, codes))


def _check_places(outliers: Outliers, columns: int) -> None:
    """Raise :class:`FormatError` for outliers outside of their matrix: steps write where these say. Of linears the
    library sees to that.
    """
    places, offsets = outliers.columns.to(torch.int32), outliers.row_offsets
    counted = offsets[0] == 0 and offsets[-1] == len(places) and bool((offsets.diff() >= 0).all())
    if not counted or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < columns):
        raise FormatError(f"the outliers of an embedding are not all within its rows of {columns} columns")


def _outliers(
    values: Tensor | None, columns: Tensor | None, row_offsets: Tensor | None, replace: bool
) -> Outliers | None:
    if values is None or columns is None or row_offsets is None:
        return None
    return Outliers(values, columns, row_offsets, replace)
