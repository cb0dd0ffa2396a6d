"""The figures of one weight: what it takes, how far it is from the original, how its values and codes are spread."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from prequant.passes.sites import OUTLIER_PREFIX
from prequant.passes.weights import BCQ_PARTS, WeightView, float_bytes
from prequant.runtime import Outliers, Scheme, WeightFormat, sqnr
from prequant.runtime.metrics import all_finite
from prequant.runtime.packing import unpack

from .record import Histogram, WeightRecord

BINS = 64
MARKED_LEVELS = 64
"""So many levels can be told apart in a histogram; more are not marked."""
COUNTED_CODES = 256


def weight_record(view: WeightView, original: Tensor | None, recorded: float | None) -> WeightRecord:
    """The figures of a weight; ``original``: its value before anything was done to it, ``recorded``: its error in dB as
    written down when it was saved, where the original is not at hand.
    """
    value = view.value().detach()
    outliers = _outliers(view)
    parts = {part: view.program.tensor(name).detach() for part, name in view.tensors.items()}
    format = WeightFormat.parse(view.format) if ":" in view.format else None
    error = sqnr(original, value) if original is not None else recorded
    return WeightRecord(
        name=view.name,
        kind=view.kind,
        format=view.format,
        input_format=view.input_format,
        shape=view.shape,
        bytes=view.bytes,
        float_bytes=float_bytes(view),
        bits=8 * view.bytes / max(1, view.shape[0] * view.shape[1]),
        outliers=0 if outliers is None else outliers.values.numel(),
        lowered=view.lowered,
        sqnr=error,
        recorded=original is None and recorded is not None,
        histogram=_histogram(value, original, outliers),
        levels=_levels(parts, format) if format is not None else (),
        codes=_codes(parts, format, view.shape[1]) if format is not None else (),
        scales=_scales(parts),
    )


def _outliers(view: WeightView) -> Outliers | None:
    names = [view.tensors.get(OUTLIER_PREFIX + part) for part in ("values", "columns", "row_offsets")]
    if any(name is None for name in names):
        return None
    values, columns, offsets = (view.program.tensor(str(name)).detach() for name in names)
    return Outliers(values, columns, offsets, view.outliers_replace)


def _histogram(value: Tensor, original: Tensor | None, outliers: Outliers | None) -> Histogram | None:
    """None for a weight without finite values to count."""
    both = [item.float() for item in (value, original) if item is not None and item.numel()]
    if not both or not all(map(all_finite, both)):
        return None
    low = min(float(item.min()) for item in both)
    high = max(float(item.max()) for item in both)
    if low == high:  # one value: a bin's width around it
        low, high = low - 0.5, high + 0.5
    return Histogram(
        low,
        high,
        None if original is None else _counts(original, low, high),
        _counts(value, low, high),
        None if outliers is None else _counts(value[outliers.positions()], low, high),
    )


def _counts(values: Tensor, low: float, high: float) -> tuple[int, ...]:
    return tuple(int(count) for count in torch.histc(values.float(), BINS, low, high).tolist())


def _levels(parts: dict[str, Tensor], format: WeightFormat) -> tuple[float, ...]:
    """Values of the codes at the median scale, ascending; nothing where they are too many to mark."""
    if format.scheme is Scheme.BCQ:
        alphas = [float(plane.median()) for plane in parts[BCQ_PARTS[1]].float()]
        if 2 ** len(alphas) > MARKED_LEVELS:
            return ()
        sums = {
            sum(a * sign for a, sign in zip(alphas, signs, strict=True))
            for signs in product((-1, 1), repeat=len(alphas))
        }
        return tuple(sorted(sums))
    scale = float(parts["scale"].float().median())
    if format.scheme is Scheme.BINARY:
        return (-scale, scale)
    zero = float(parts["zero_point"].float().median()) if "zero_point" in parts else format.implied_zero_point
    if format.levels > MARKED_LEVELS:
        return ()
    return tuple((code - zero) * scale for code in range(format.levels))


def _codes(parts: dict[str, Tensor], format: WeightFormat, columns: int) -> tuple[int, ...]:
    if "codes" not in parts or format.levels > COUNTED_CODES:
        return ()
    codes = unpack(parts["codes"], format, columns)
    return tuple(int(count) for count in torch.bincount(codes.flatten(), minlength=format.levels).tolist())


def _scales(parts: dict[str, Tensor]) -> tuple[float, float, float] | None:
    scale: Any = parts.get("scale", parts.get("alphas"))
    if scale is None or not scale.numel():
        return None
    scale = scale.float()
    return float(scale.min()), float(scale.median()), float(scale.max())
