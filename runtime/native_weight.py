"""A weight in the neutral layout, described to the native library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native
from .formats import Granularity, Scheme, WeightFormat
from .reference import Outliers


class NeutralWeight:
    """``prequant_weight`` for a weight; :attr:`address` is good for as long as this lives, as the tensors are.

    Every format is a sum of terms ``(multiple * u - zero) * scale``: binary is ``2 u - 1``, binary coding one binary
    term for each plane, all others one term.
    """

    def __init__(
        self,
        format: WeightFormat,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        columns: int,
        outliers: Outliers | None = None,
    ) -> None:
        one_bit = format.scheme in (Scheme.BINARY, Scheme.BCQ)
        if format.scheme is Scheme.TERNARY:
            zero_point = None  # the threshold of rounding, which codes have behind them
        codes, scales, zeros = codes.contiguous(), float_copy(scale), float_copy(zero_point)
        values = places = offsets = None
        if outliers is not None:
            values = float_copy(outliers.values)
            places, offsets = (t.to(torch.int32).contiguous() for t in (outliers.columns, outliers.row_offsets))
        self._tensors = (codes, scales, zeros, values, places, offsets)
        self._weight = native.Weight(
            rows=codes.shape[-2],
            columns=columns,
            group_size=format.group_size,
            bits=1 if one_bit else format.bits,
            terms=format.bits if format.scheme is Scheme.BCQ else 1,
            base3=format.base3,
            multiple=2 if one_bit else 1,
            subtrahend=1 if one_bit else int(format.implied_zero_point),
            shared_scale=format.granularity is Granularity.TENSOR,
            outliers_replace=outliers is not None and outliers.replace,
            codes=codes.data_ptr(),
            scales=address_of(scales),
            zeros=address_of(zeros),
            outliers=0 if values is None else values.numel(),
            outlier_values=address_of(values),
            outlier_columns=address_of(places),
            outlier_offsets=address_of(offsets),
        )
        self.address = ctypes.addressof(self._weight)
        self._text = f"a weight {list(codes.shape)} of {format}"

    def __str__(self) -> str:
        return self._text


def float_copy(tensor: Tensor | None) -> Tensor | None:
    """The tensor in float32, contiguous and free of autograd: itself, if that is what it is."""
    return None if tensor is None else tensor.detach().float().contiguous()


def address_of(tensor: Tensor | None) -> int | None:
    """Where a tensor's values begin, as ctypes takes it."""
    return None if tensor is None else tensor.data_ptr()
