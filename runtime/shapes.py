"""What the graph ops give, without computing it: the shapes, types and strides that tracers see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .formats import Granularity, Scheme, WeightFormat


@torch.library.register_fake("prequant::quantize", lib=ops.library)
def _(input: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str) -> Tensor:
    parsed = WeightFormat.parse(format)
    return input.new_empty((*input.shape[:-1], parsed.row_bytes(input.shape[-1])), dtype=torch.uint8)


@torch.library.register_fake("prequant::dequantize", lib=ops.library)
def _(codes: Tensor, scale: Tensor, *rest: Any, format: str, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    planes = WeightFormat.parse(format).scheme is Scheme.BCQ
    return scale.new_empty((*codes.shape[int(planes) : -1], columns), dtype=dtype or scale.dtype)


@torch.library.register_fake("prequant::dequantize_bcq", lib=ops.library)
def _(planes: Tensor, alphas: Tensor, *, format: str, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    return alphas.new_empty((*planes.shape[1:-1], columns), dtype=dtype or alphas.dtype)


@torch.library.register_fake("prequant::dequantize_gradients", lib=ops.library)
def _(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    likes = (scale, scale if zero_point is None else zero_point)
    return [like.new_empty(like.shape) for like, wanted in zip(likes, needs, strict=True) if wanted]


@torch.library.register_fake("prequant::fake_quantize", lib=ops.library)
def _(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    clipped: bool = True,
    scale_gradient: bool = True,
) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("prequant::fake_quantize_gradients", lib=ops.library)
def _(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    scale_gradient: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    # Dense, whatever the strides of the operands.
    to_input = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    likes = (to_input, scale, scale if zero_point is None else zero_point)
    return [like.new_empty(like.shape) for like, wanted in zip(likes, needs, strict=True) if wanted]


@torch.library.register_fake("prequant::dynamic_scale", lib=ops.library)
def _(input: Tensor, *, format: str) -> Tensor:
    tokens = WeightFormat.parse(format).granularity is Granularity.ROW
    dtype = torch.promote_types(input.dtype, torch.float32)
    return input.new_empty((*input.shape[:-1], 1) if tokens else [1] * input.dim(), dtype=dtype)


@torch.library.register_fake("prequant::uncalibrated", lib=ops.library)
def _(input: Tensor, *, format: str, observer: str, name: str) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("prequant::scale_gradient", lib=ops.library)
def _(input: Tensor, *, factor: float) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("prequant::add_outliers", lib=ops.library)
def _(weight: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, *, replace: bool) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("prequant::packed_linear", lib=ops.library)
def _(input: Tensor, codes: Tensor, *rest: Any, **options: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], codes.shape[-2]))


@torch.library.register_fake("prequant::packed_linears", lib=ops.library)
def _(input: Tensor, codes: Sequence[Tensor], *rest: Any, **options: Any) -> list[Tensor]:
    return [input.new_empty((*input.shape[:-1], each.shape[-2])) for each in codes]


@torch.library.register_fake("prequant::packed_embedding", lib=ops.library)
def _(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    *rest: Any,
    format: str,
    columns: int,
    padding_idx: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return scale.new_empty((*ids.shape, columns), dtype=dtype or scale.dtype)
