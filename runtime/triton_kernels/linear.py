"""``packed_linear`` on the Triton kernels: how a call becomes launches."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

from .. import ops, reference
from ..formats import Granularity, Scheme, WeightFormat
from ..reference import Outliers
from . import prepared, tables, tuning, workspace
from .device import linear as device
from .layout import CHUNK, chunks_of, has_layout
from .rounding import rounded_tokens
from .rows import unpacked

NATIVE = not triton.knobs.runtime.interpret
"""Whether kernels are compiled; the interpreter lacks arithmetic on bfloat16."""

MAX_COLUMNS_INT8 = 1 << 17
"""So many products of 8-bit codes and inputs fit an int32 sum for sure."""


def packed_linear(
    format: WeightFormat,
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    columns: int,
    input_format: WeightFormat | None,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """See :func:`prequant.runtime.reference.packed_linear`; ``[..., rows]`` in the input's dtype.

    Sums are in float32 (int32 of 8-bit inputs), and only the result is rounded. With many tokens, or groups that no
    tile can work on as a whole, the weight is unpacked first, in the input's dtype, as the reference has it.
    """
    rows, tokens = codes.shape[-2], input.numel() // max(columns, 1)
    if not (tokens and rows and columns):
        return _of_nothing(input, rows, bias, activation, residual)
    weight = (format, codes, scale, zero_point, outliers, columns)
    integers = input_format is not None and _takes_integers(input_format, columns)
    if not has_layout(format) or tokens >= _unpacked_from(input.dtype, integers):
        dense = unpacked(*weight, input.dtype)
        seen = ops.quantized_input(input, input_scale, input_zero_point, input_format)
        return reference.unpacked_linear(dense, seen, bias, None, None, None, activation, residual)
    token_scales = token_zeros = None
    if integers and input_format is not None:
        seen, token_scales, token_zeros = rounded_tokens(input, input_scale, input_zero_point, input_format)
    else:
        seen = ops.quantized_input(input, input_scale, input_zero_point, input_format).contiguous()
    output = input.new_empty((*input.shape[:-1], rows))
    run = partial(launch, *weight, seen, token_scales, token_zeros, bias, activation, residual, output)
    run(tiles_for(format, rows, seen, run))
    return output


def tiles_for(format: WeightFormat, rows: int, input: Tensor, run: Callable[[tables.Tiles], None]) -> tables.Tiles:
    """The tiles of ``tables.py``, or, on a card that it was not made for, the fastest of some, by trying ``run``.

    Nothing is tried while a graph is captured.
    """
    columns, device = input.shape[-1], input.device
    tokens, card = input.numel() // columns, workspace.other_card(device)
    planes, processors = tables.planes_of(format), workspace.multiprocessors(device)
    tiles = tables.default_tiles(tokens, rows, columns, planes, processors)
    if card is None:
        return tiles
    size = f"{rows}x{columns}x{triton.next_power_of_2(tokens)}"
    key = f"{card}, triton {triton.__version__}, {format}, {input.dtype}, {size}"
    if workspace.capturing(device):
        return tuning.remembered(key) or tiles
    return tuning.tuned(key, tuning.candidates(tiles, columns), lambda tiles: seconds(run, tiles))


def seconds(run: Callable[[tables.Tiles], None], tiles: tables.Tiles) -> float:
    """Median time of a launch; infinite where a card has not the registers or the memory for it."""
    try:
        return float(triton.testing.do_bench(lambda: run(tiles), warmup=5, rep=20, return_mode="median")) / 1000
    except triton.runtime.errors.OutOfResources:
        return math.inf


def launch(
    format: WeightFormat,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outliers: Outliers | None,
    columns: int,
    input: Tensor,
    token_scales: Tensor | None,
    token_zeros: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    output: Tensor,
    tiles: tables.Tiles,
) -> None:
    """Run the kernel of tiles for a contiguous input ``[..., columns]``, in floats or in int8 with a scale a token."""
    rows, tokens = codes.shape[-2], input.numel() // columns
    arranged = prepared.arranged_codes(format, codes, columns)
    scales = prepared.arranged_scales(format, codes, scale, zero_point, outliers, columns)
    sums = None
    if token_zeros is not None:
        sums = prepared.row_sums(scales, format, codes, scale, zero_point, outliers, columns)
    sparse = scales.sparse
    count = triton.cdiv(rows, tiles.rows) * triton.cdiv(tokens, tiles.tokens)
    partial, counters = workspace.of_split(tiles.split, tokens * rows, count, input.device)
    none = scales.scales  # stands for what a call does not have; the kernel does not look at it
    with workspace.on(input.device):
        device.packed_linear[(count, tiles.split)](
            *(input, arranged, scales.scales, none if scales.zeros is None else scales.zeros),
            *((none, none, none) if sparse is None else (sparse.values, sparse.columns, sparse.row_offsets)),
            *(none if tensor is None else tensor.contiguous() for tensor in (bias, residual)),
            *(none if tensor is None else tensor for tensor in (token_scales, token_zeros, sums)),
            *(output, none if partial is None else partial, none if counters is None else counters),
            *(tokens, rows, columns, chunks_of(columns)),
            **format_constants(format),
            **call_constants(scales, bias, activation, residual, token_scales, token_zeros),
            WHOLE=columns % CHUNK == 0,
            **tile_constants(tiles),
        )


def format_constants(format: WeightFormat) -> dict[str, Any]:
    """What the kernel is compiled for of a format."""
    return {
        "BITS": format.bits,
        "TERMS": format.bits if format.scheme is Scheme.BCQ else 1,
        "SIGNS": format.scheme in (Scheme.BINARY, Scheme.BCQ),
        "ZERO": prepared.zero_point_of(format),
        "GROUP": format.group_size,
        "SHARED": format.granularity is Granularity.TENSOR,
    }


def call_constants(
    scales: prepared.Scales,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    token_scales: Tensor | None,
    token_zeros: Tensor | None,
) -> dict[str, Any]:
    """What the kernel is compiled for of the operands of a call."""
    return {
        "HAS_ZEROS": scales.zeros is not None,
        "HAS_OUTLIERS": scales.sparse is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "QUANTIZED": token_scales is not None,
        "HAS_TOKEN_ZEROS": token_zeros is not None,
        "ACTIVATION": activation,
    }


def tile_constants(tiles: tables.Tiles) -> dict[str, Any]:
    """What the kernel is compiled for of its tiles."""
    return {
        "ROWS": tiles.rows,
        "TOKENS": tiles.tokens,
        "SPLIT": tiles.split,
        "STAGES": tiles.stages,
        "NATIVE": NATIVE,
        "num_warps": tiles.warps,
    }


def _takes_integers(format: WeightFormat, columns: int) -> bool:
    """Whether inputs go to the kernel as int8: those on an affine grid with a scale a token, or one for all."""
    grid = format.scheme is Scheme.AFFINE and format.granularity is not Granularity.GROUP
    return grid and columns <= MAX_COLUMNS_INT8


def _unpacked_from(dtype: torch.dtype, integers: bool) -> int:
    return tables.UNPACKED_FROM_FLOAT32 if dtype is torch.float32 and not integers else tables.UNPACKED_FROM


def _of_nothing(input: Tensor, rows: int, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """The result where there is nothing to multiply."""
    output = input.new_zeros((*input.shape[:-1], rows))
    output = reference.ACTIVATIONS[activation](output if bias is None else output + bias.to(output.dtype))
    return output if residual is None else output + residual
