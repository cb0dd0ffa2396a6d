"""The simulated ops on the Triton kernels: ``quantize``, ``fake_quantize`` and its gradients, ``dynamic_scale``.

Each reads its operands once, and writes its results once. Values, codes, scales and the gradients to inputs are the
reference's, to the last bit. What sums up, the gradients to scales and zero points, is added up in an order of its own,
the same every time: in float32 over the elements of a segment (``device/simulated.py``), in float64 over segments that
share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import reference
from ..errors import FormatError
from ..formats import TRITS_PER_BYTE, Granularity, Scheme, WeightFormat
from . import workspace
from .device import simulated as device

RUN = 4096
"""Elements of a segment where all share one scale."""

TILE = 2048
"""Elements that a program has in registers at once."""


@dataclass(frozen=True)
class Segments:
    """How an input of ``elements`` falls into segments: ``count``, in rows of ``columns``, with ``groups`` of ``size``.

    ``flat``: one segment after the other, whatever the rows.
    """

    elements: int
    columns: int
    size: int
    groups: int
    flat: bool

    @classmethod
    def of(cls, input: Tensor, group_size: int, one: bool) -> Segments:
        """``one``: all elements are together, else those of a row, or of groups of some size in it."""
        if one:
            return cls(input.numel(), RUN, RUN, 1, True)
        columns = input.shape[-1]
        size = group_size or columns
        return cls(input.numel(), columns, size, -(-columns // size), False)

    @property
    def rows(self) -> int:
        return -(-self.elements // self.columns)

    @property
    def count(self) -> int:
        return self.rows * self.groups

    def blocks(self) -> dict[str, int]:
        """What a kernel is compiled for, and by which a launch is cut up."""
        block = min(triton.next_power_of_2(self.size), TILE)
        return {"SEGMENTS": max(TILE // block, 1), "BLOCK": block}

    def grid(self) -> tuple[int]:
        return (triton.cdiv(self.count, self.blocks()["SEGMENTS"]),)


class _Scales:
    """Scales and zero points as the kernels read them: some for each row, or the same for all."""

    def __init__(self, format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self.groups = format.groups(input.shape[-1])
        self.shared = scale.numel() == self.groups
        self._rows = input.shape[:-1]
        self.scales = self._spread(scale)
        self.zeros = None if zero_point is None else self._spread(zero_point)
        self.row_stride = 0 if self.shared else self.groups
        self._shape = scale.shape

    def _spread(self, values: Tensor) -> Tensor:
        values = values.detach()
        return (values if self.shared else values.expand(*self._rows, self.groups)).contiguous()

    def per_scale(self, sums: Tensor) -> Tensor:
        """Sums of segments ``[rows, groups]``, float32, as those of each scale; added up in float64."""
        if self.shared:
            return sums.sum(0, dtype=torch.float64).float().reshape(self._shape)
        sums = sums.reshape(*self._rows, self.groups)
        return sums if sums.shape == self._shape else sums.double().sum_to_size(self._shape).float()


def format_constants(format: WeightFormat, scale: Tensor, zero_point: Tensor | None) -> dict[str, Any]:
    """What a kernel is compiled for of a format."""
    affine = format.scheme is Scheme.AFFINE
    return {
        "LEVELS": format.levels,
        "KIND": format.scheme.value,
        "ZERO": format.implied_zero_point if affine else 0.0,
        "HAS_ZEROS": zero_point is not None and format.scheme is not Scheme.BINARY,
        "TINY": torch.finfo(scale.dtype).tiny,
    }


def fake_quantize(format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """See :func:`prequant.runtime.reference.fake_quantize`; one pass over the input."""
    elements, output = input.contiguous(), torch.empty_like(input)
    written = output if output.is_contiguous() else torch.empty_like(elements)
    scales = _Scales(format, input, scale, zero_point)
    segments = Segments.of(input, format.group_size, scale.numel() == 1)
    with workspace.on(input.device):
        device.fake_quantize[segments.grid()](
            *(elements, scales.scales, scales.scales if scales.zeros is None else scales.zeros, written),
            *(segments.count, segments.elements, segments.columns, segments.size, segments.groups, scales.row_stride),
            **format_constants(format, scale, zero_point),
            **shape_constants(segments),
        )
    return written if written is output else output.copy_(written)


def fake_quantize_gradients(
    format: WeightFormat,
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scale_gradient: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :func:`prequant.runtime.reference.fake_quantize_gradients`; one pass over the gradient and the input."""
    gradient, elements = gradient.contiguous(), input.contiguous()
    scales = _Scales(format, input, scale, zero_point)
    segments = Segments.of(input, format.group_size, scale.numel() == 1)
    to_input = torch.empty_like(gradient) if needs[0] else None
    to_scale, to_zero = (
        torch.empty(segments.rows, segments.groups, dtype=torch.float32, device=input.device) if wanted else None
        for wanted in needs[1:]
    )
    with workspace.on(input.device):
        device.fake_quantize_gradients[segments.grid()](
            *(gradient, elements, scales.scales, scales.scales if scales.zeros is None else scales.zeros),
            *(scales.scales if sums is None else sums for sums in (to_input, to_scale, to_zero)),
            *(segments.count, segments.elements, segments.columns, segments.size, segments.groups, scales.row_stride),
            **format_constants(format, scale, zero_point),
            **dict(zip(("TO_INPUT", "TO_SCALE", "TO_ZERO"), needs, strict=True)),
            **shape_constants(segments),
        )
    factor = reference.lsq_factor(input, scale, format) if scale_gradient else 1.0
    found = [] if to_input is None else [to_input]
    if to_scale is not None:
        to_magnitude = scales.per_scale(to_scale)
        found.append((torch.where(scale < 0, -to_magnitude, to_magnitude) * factor).to(scale.dtype))
    if to_zero is not None and zero_point is not None:
        clipped = scales.per_scale(to_zero) * reference.positive_scale(scale, format)
        found.append((clipped * -factor).to(zero_point.dtype))
    return found


def shape_constants(segments: Segments) -> dict[str, Any]:
    """What a kernel is compiled for of its segments."""
    ragged = segments.columns % segments.size != 0
    return {"FLAT": segments.flat, "RAGGED": ragged, **segments.blocks()}


def dynamic_scale(format: WeightFormat, input: Tensor) -> Tensor:
    """See :func:`prequant.runtime.reference.dynamic_scale`; float32. That of a tensor takes a second, short launch."""
    elements = input.detach().contiguous()
    if format.granularity is Granularity.ROW:
        scales = torch.empty(*input.shape[:-1], 1, dtype=torch.float32, device=input.device)
        _largest(elements, scales, format, Segments.of(input, 0, False), True)
        return scales
    runs = Segments.of(input, 0, True)
    extents = torch.empty(runs.count, dtype=torch.float32, device=input.device)
    _largest(elements, extents, format, runs, False)
    scale = torch.empty([1] * input.dim(), dtype=torch.float32, device=input.device)
    _largest(extents, scale, format, Segments.of(extents, 0, False), True)
    return scale


def _largest(input: Tensor, output: Tensor, format: WeightFormat, segments: Segments, scale: bool) -> None:
    with workspace.on(input.device):
        device.largest[segments.grid()](
            *(input, output, segments.count, segments.elements, segments.columns, segments.size),
            **{"LEVELS": format.levels, "SCALE": scale, "FLAT": segments.flat, **segments.blocks()},
        )


def quantize(format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """See :func:`prequant.runtime.reference.quantize`; one pass over the input.

    Raises :class:`FormatError` for NaN, which waits for a GPU. Not while a graph is captured, when nothing can be
    waited for: there NaN gets code 0, and shows in a dynamic scale alone.
    """
    columns = input.shape[-1]
    units = unit_constants(format)
    per_row = -(-columns // units["CODES"])
    count = input.numel() // columns * per_row
    row_bytes = format.row_bytes(columns)
    output = torch.empty(*input.shape[:-1], row_bytes, dtype=torch.uint8, device=input.device)
    strange = torch.zeros(1, dtype=torch.int32, device=input.device)
    scales = _Scales(format, input, scale, zero_point)
    constants = format_constants(format, scale, zero_point)
    del constants["TINY"]
    with workspace.on(input.device):
        device.quantize[(triton.cdiv(count, units["UNITS"]),)](
            *(input.detach().contiguous(), scales.scales, scales.scales if scales.zeros is None else scales.zeros),
            *(output, strange, count, columns, per_row, row_bytes, scales.row_stride),
            **{"BITS": format.bits, "BASE3": format.base3, "GROUP": format.group_size, **constants, **units},
        )
    if not workspace.capturing(input.device) and int(strange):
        raise FormatError(f"the input of quantize holds what has no code in {format}: nan")
    return output


def unit_constants(format: WeightFormat) -> dict[str, int]:
    """How many codes fill how many whole bytes, and how many such units a program takes."""
    if format.base3:
        codes, size = TRITS_PER_BYTE, 1
    else:
        codes = 8 // format.bits if 8 % format.bits == 0 else 8
        size = codes * format.bits // 8
    return {"CODES": codes, "BYTES": size, "UNITS": TILE // 2 // triton.next_power_of_2(codes)}
