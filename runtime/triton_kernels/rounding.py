"""Inputs of packed linears become 8-bit integers, with a scale for each token."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import reference
from ..formats import Granularity, WeightFormat
from . import workspace
from .device import rounding as device
from .simulated import dynamic_scale

BLOCK = 4096
"""Columns that a program has in registers at once."""


def rounded_tokens(
    input: Tensor, scale: Tensor | None, zero_point: Tensor | None, format: WeightFormat
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(codes, scales, zeros)``: int8 ``[..., columns]``, and float32 ``[tokens]``, of an affine format per row or
    tensor. An element is ``(code - zero) * scale``; there are no zeros without a zero point.
    """
    columns = input.shape[-1]
    tokens = input.numel() // columns
    if scale is None and format.granularity is Granularity.TENSOR:
        scale = dynamic_scale(format, input)
    input = input.contiguous()
    codes = torch.empty_like(input, dtype=torch.int8)
    scales = torch.empty(tokens, dtype=torch.float32, device=input.device)
    given = scales if scale is None else _by_token(reference.positive_scale(scale.detach(), format), input)
    zeros = None if zero_point is None else _by_token(zero_point.detach(), input)
    with workspace.on(input.device):
        device.round_tokens[(tokens,)](
            *(input, given, scales if zeros is None else zeros, codes, scales, columns),
            LEVELS=format.levels,
            DYNAMIC=scale is None,
            HAS_ZEROS=zeros is not None,
            BLOCK=min(triton.next_power_of_2(columns), BLOCK),
        )
    return codes, scales, None if zeros is None else zeros - format.levels // 2


def _by_token(values: Tensor, input: Tensor) -> Tensor:
    """A scale or zero point that broadcasts against the input, once for each token."""
    if values.numel() == 1:
        values = values.reshape([1] * input.dim())
    return values.float().expand(*input.shape[:-1], 1).reshape(-1).contiguous()
