"""Gradients of packed weights on the Triton kernels: behind the backward of ``dequantize`` and of the packed ops.

The gradient to the values of one weight, ``[rows, columns]``, is read where it lies, in its own type, next to the
packed codes; no float twin of the weight is made beside it. Sums are in float32 over a segment
(``device/simulated.py``), in float64 over segments that share a scale, and in the same order every time.

The two products of a linear's backward are cuBLAS's: for that with the weight, the one of its layer is unpacked in the
gradient's type, and given back; that with the input is what is read here. A kernel of both in one would save writing
it once; by estimate (nothing was measured) that counts for less than how fast cuBLAS is from a few thousand tokens on,
as a step of training has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import Granularity, Scheme, WeightFormat
from . import rows, workspace
from .device import gradients as device
from .simulated import Segments


def dequantize_gradients(
    format: WeightFormat,
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :func:`prequant.runtime.reference.dequantize_gradients`; one pass over the gradient."""
    segments = Segments.of(gradient, format.group_size, False)
    terms = format.bits if format.scheme is Scheme.BCQ else 1
    gradient, codes = gradient.contiguous(), codes.contiguous()
    zeros = zero_point.detach().contiguous() if zero_point is not None and format.scheme is Scheme.AFFINE else None
    shape = (segments.rows, segments.groups)
    to_scale = torch.empty(terms, *shape, dtype=torch.float32, device=gradient.device) if needs[0] else None
    to_zero = torch.empty(1, *shape, dtype=torch.float32, device=gradient.device) if needs[1] else None
    none = codes if to_scale is None else to_scale
    with workspace.on(gradient.device):
        device.dequantize_gradients[segments.grid()](
            *(gradient, codes, none if zeros is None else zeros, none, none if to_zero is None else to_zero),
            *(segments.count, segments.elements, segments.columns, segments.size, segments.groups),
            *(0 if format.granularity is Granularity.TENSOR else segments.groups, codes.shape[-2], codes.shape[-1]),
            **constants(format, zeros is not None),
            **{"TO_SCALE": needs[0], "TO_ZERO": needs[1], "RAGGED": segments.columns % segments.size != 0},
            **segments.blocks(),
        )
    found = [] if to_scale is None else [_per_scale(to_scale, scale).to(scale.dtype)]
    if to_zero is not None and zero_point is not None:
        found.append((-_per_scale(to_zero, scale) * scale).to(zero_point.dtype))
    return found


def constants(format: WeightFormat, has_zeros: bool) -> dict[str, Any]:
    """What the kernel is compiled for of a format."""
    known = rows.format_constants(format)
    return {name: known[name] for name in ("BITS", "TERMS", "SIGNS", "BASE3", "ZERO")} | {"HAS_ZEROS": has_zeros}


def _per_scale(sums: Tensor, scale: Tensor) -> Tensor:
    """Sums ``[terms, rows, groups]`` in the shape of the scales: one for all rows is added up once more."""
    if scale.numel() == sums.numel():
        return sums.reshape(scale.shape)
    return sums.sum(dtype=torch.float64).float().reshape(scale.shape)
