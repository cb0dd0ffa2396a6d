"""From a float weight to codes: choose the scales, round, pack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .errors import FormatError
from .formats import Granularity, Scheme, WeightFormat
from .metrics import all_finite
from .strategies import TILE, strategy, usable_scale

ROUNDED_AT_ONCE = 1 << 20
"""Weights that are rounded to codes at once."""

TERNARY_THRESHOLD = 0.7
"""Share of the mean magnitude under which a ternary weight becomes 0 (ternary weight networks, arXiv 1605.04711)."""


class QuantizedWeight(NamedTuple):
    """Packed codes with what gives them meaning; shapes as in :class:`WeightFormat`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class Quantizer:
    """Turns float weights ``[rows, columns]`` into one affine, ternary or binary format.

    ``strategy`` (see :mod:`prequant.runtime.strategies`) chooses the scale of affine formats. Ternary scales are
    those of ternary weight networks, binary ones the mean magnitude, both optimal or nearly so in closed form.
    """

    format: WeightFormat
    strategy: str = "mse"

    def __post_init__(self) -> None:
        if self.format.scheme is Scheme.BCQ:
            raise FormatError("bcq weights have a solver of their own: prequant.runtime.bcq")
        strategy(self.strategy)

    def refuses(self, weight: Tensor) -> str:
        """Why ``weight`` can't be quantized to this format; empty if it can."""
        if weight.dim() != 2:
            return f"a weight of {weight.dim()} dimensions; linear and embedding weights have 2"
        if not weight.is_floating_point():
            return f"of type {weight.dtype}, not a float"
        if weight.numel() == 0:
            return "empty"
        if not all_finite(weight, torch.float32):
            return "it holds NaN or infinity, in float32 at least"
        return ""

    def __call__(self, weight: Tensor) -> QuantizedWeight:
        """Quantize. Scales are float32 whatever the weight's dtype. Raises as :meth:`scales` does."""
        scale, offset = self.scales(weight)
        codes = torch.cat([self._codes(*part) for part in self._row_parts(weight.detach(), scale, offset)])
        return QuantizedWeight(codes, scale, None if self.format.scheme is Scheme.TERNARY else offset)

    def _codes(self, rows: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return reference.quantize(rows.float(), scale, offset, self.format)

    @staticmethod
    def _row_parts(
        weight: Tensor, scale: Tensor, offset: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The weight a few rows after the others, with their scales and offsets: rounding takes several copies."""
        step = max(1, ROUNDED_AT_ONCE // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            rows = slice(start, start + step)
            per_row = rows if scale.shape[0] == weight.shape[0] else slice(None)
            yield weight[rows], scale[per_row], None if offset is None else offset[per_row]

    def scales(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point that ``quantize`` and ``fake_quantize`` take to give the codes of this quantizer.

        The zero point of a ternary format is its threshold, None is that of the other symmetric ones.
        Raises :class:`FormatError` where :meth:`refuses` says why.
        """
        if reason := self.refuses(weight):
            raise FormatError(f"weight {tuple(weight.shape)} can't become {self.format}: {reason}")
        scale, zero_point, threshold = self._scales(weight.detach().float())
        return scale, zero_point if threshold is None else threshold

    def _scales(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scale, zero point and ternary threshold, each in the shape of the format."""
        chosen = [self._scales_of(block) for block in _blocks(weight, self.format)]
        shape = self.format.scale_shape(*weight.shape)
        columns = [[part if part is None else part.reshape(shape[0], -1) for part in parts] for parts in chosen]
        joined = [None if parts[0] is None else torch.cat(parts, -1) for parts in zip(*columns, strict=True)]
        return joined[0], joined[1], joined[2]  # type: ignore[return-value]

    def _scales_of(self, block: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same, each ``[n, 1]``, for a ``block`` ``[n, weights per scale]``, a few rows after the others."""
        chunks = block.split(max(1, TILE // block.shape[1]))
        parts = zip(*map(self._restored, chunks), strict=True)
        joined = [None if part[0] is None else torch.cat(part) for part in parts]
        return joined[0], joined[1], joined[2]  # type: ignore[return-value]

    def _restored(self, block: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same, found on rows brought to magnitudes near 1 by a power of two, which leaves their digits alone."""
        magnitude = block.abs()
        exponent = torch.frexp(magnitude.amax(1, keepdim=True)).exponent.clamp(-126, 126)
        unit = torch.ldexp(torch.ones_like(exponent, dtype=block.dtype), exponent)
        if self.format.scheme is Scheme.AFFINE:
            scale, zero_point = strategy(self.strategy)(block / unit, self.format)
            return usable_scale(_scaled_back(scale, unit)), zero_point, None
        scale, threshold = self._scale_of(magnitude.div_(unit))
        return _scaled_back(scale, unit), None, None if threshold is None else threshold * unit

    def _scale_of(self, magnitude: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and threshold of each row of a block whose magnitudes these are; they are overwritten."""
        mean = magnitude.mean(1, keepdim=True)
        if self.format.scheme is Scheme.BINARY:
            return mean, None
        threshold = TERNARY_THRESHOLD * mean
        large = magnitude > threshold
        # An all-zero row has no large weight: its scale is 0, not 0 / 0.
        return magnitude.mul_(large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp(min=1), threshold


def _scaled_back(scale: Tensor, unit: Tensor) -> Tensor:
    return (scale * unit).clamp(max=torch.finfo(scale.dtype).max)


def _blocks(weight: Tensor, format: WeightFormat) -> list[Tensor]:
    """The weight as matrices whose rows share one scale: one, and a second for shorter last groups if there are any."""
    if format.granularity is Granularity.TENSOR:
        return [weight.reshape(1, -1)]
    if format.granularity is Granularity.ROW:
        return [weight]
    whole = weight.shape[1] // format.group_size * format.group_size
    blocks = [weight[:, :whole].reshape(-1, format.group_size)] if whole else []
    return blocks + ([weight[:, whole:]] if whole < weight.shape[1] else [])
