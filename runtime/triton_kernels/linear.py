"""``packed_linear`` and ``packed_linears`` on the Triton kernels: how a call becomes launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor

from .. import ops, reference
from ..formats import Granularity, Scheme, WeightFormat
from ..reference import Outliers
from . import prepared, tables, tuning, workspace
from .backends import check_operands
from .device import linear as device
from .layout import CHUNK, chunks_of, has_layout
from .rounding import rounded_tokens
from .rows import unpacked

NATIVE = not triton.knobs.runtime.interpret
"""Whether kernels are compiled; the interpreter lacks arithmetic on bfloat16."""

MAX_COLUMNS_INT8 = 1 << 17
"""So many products of 8-bit codes and inputs fit an int32 sum for sure."""

MOST_LINEARS = 8
"""That one launch is for: a kernel is compiled for each number of them."""


class Linear(NamedTuple):
    """A weight with what comes after its product."""

    format: WeightFormat
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    outliers: Outliers | None
    columns: int
    bias: Tensor | None
    activation: str

    @property
    def rows(self) -> int:
        return int(self.codes.shape[-2])

    @property
    def weight(self) -> tuple[WeightFormat, Tensor, Tensor, Tensor | None, Outliers | None, int]:
        """What ``rows.py`` and ``prepared.py`` take of it."""
        return self[:6]

    def kind(self) -> tuple[Any, ...]:
        """What linears have in common that one launch can be for."""
        sparse = self.outliers is not None and self.outliers.values.numel() > 0
        return self.format, sparse, None if self.bias is None else self.bias.dtype, self.activation, self.rows > 0


class Input:
    """What linears read ``[..., columns]``, quantized once for all of them."""

    def __init__(
        self, floats: Tensor, scale: Tensor | None, zero_point: Tensor | None, format: WeightFormat | None
    ) -> None:
        self.floats, self.columns = floats, floats.shape[-1]
        self.tokens = floats.numel() // max(self.columns, 1)
        self.integers = format is not None and _takes_integers(format, self.columns)
        self._quantization = (scale, zero_point, format)

    @cached_property
    def quantized(self) -> Tensor:
        """In floats."""
        return ops.quantized_input(self.floats, *self._quantization)

    @cached_property
    def seen(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As the kernel of tiles takes it: contiguous, in floats, or in int8 with scales and zeros of tokens."""
        scale, zero_point, format = self._quantization
        if self.integers and format is not None:
            return rounded_tokens(self.floats, scale, zero_point, format)
        return self.quantized.contiguous(), None, None


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
    linear = Linear(format, codes, scale, zero_point, outliers, columns, bias, activation)
    return _together([linear], Input(input, input_scale, input_zero_point, input_format), residual)[0]


def packed_linears(format: None, input: Tensor, calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """``calls`` of :func:`packed_linear` on one input, which is quantized once; those of a kind are one launch."""
    linears = []
    for each in calls:
        check_operands("packed_linear", each[1:])
        own_format, _, codes, scale, zero_point, outliers, bias, _, _, columns, _, activation, _ = each
        linears.append(Linear(own_format, codes, scale, zero_point, outliers, columns, bias, activation))
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for place, linear in enumerate(linears):
        kinds.setdefault(linear.kind(), []).append(place)
    *_, input_scale, input_zero_point, _, input_format, _, _ = calls[0]
    shared = Input(input, input_scale, input_zero_point, input_format)
    results: dict[int, Tensor] = {}
    for places in kinds.values():
        for first in range(0, len(places), MOST_LINEARS):
            few = places[first : first + MOST_LINEARS]
            results.update(zip(few, _together([linears[place] for place in few], shared, None), strict=True))
    return [results[place] for place in range(len(linears))]


def _together(linears: Sequence[Linear], input: Input, residual: Tensor | None) -> list[Tensor]:
    """The results of linears of a kind; if they are several, there is no residual."""
    format, floats = linears[0].format, input.floats
    if not (input.tokens and input.columns and linears[0].rows):
        return [_of_nothing(floats, each.rows, each.bias, each.activation, residual) for each in linears]
    if not has_layout(format) or input.tokens >= _unpacked_from(floats.dtype, input.integers):
        seen, asked = input.quantized, (None, None, None)
        return [
            reference.unpacked_linear(
                unpacked(*each.weight, floats.dtype), seen, each.bias, *asked, each.activation, residual
            )
            for each in linears
        ]
    outputs = [floats.new_empty((*floats.shape[:-1], each.rows)) for each in linears]
    run = partial(launch, linears, *input.seen, residual, outputs)
    run(tiles_for(format, [each.rows for each in linears], input.seen[0], run))
    return outputs


def tiles_for(
    format: WeightFormat, rows: Sequence[int], input: Tensor, run: Callable[[tables.Tiles], None]
) -> tables.Tiles:
    """The tiles of ``tables.py``, or, on a card that it was not made for, the fastest of some, by trying ``run``.

    ``rows`` are those of each linear. Nothing is tried while a graph is captured.
    """
    columns, device = input.shape[-1], input.device
    tokens, card = input.numel() // columns, workspace.other_card(device)
    planes, processors = tables.planes_of(format), workspace.multiprocessors(device)
    tiles = tables.default_tiles(tokens, sum(rows), columns, planes, processors)
    if card is None:
        return tiles
    size = f"{'+'.join(map(str, rows))}x{columns}x{triton.next_power_of_2(tokens)}"
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
    linears: Sequence[Linear],
    input: Tensor,
    token_scales: Tensor | None,
    token_zeros: Tensor | None,
    residual: Tensor | None,
    outputs: Sequence[Tensor],
    tiles: tables.Tiles,
) -> None:
    """Run the kernel of tiles for linears of a kind, and a contiguous input ``[..., columns]``, in floats or in int8
    with a scale a token.
    """
    first, columns = linears[0], input.shape[-1]
    rows, tokens = [each.rows for each in linears], input.numel() // columns
    arranged = [prepared.arranged_codes(each.format, each.codes, columns) for each in linears]
    scales = [prepared.arranged_scales(*each.weight) for each in linears]
    none = scales[0].scales  # stands for what a call does not have; the kernel does not look at it
    sums = [
        none if token_zeros is None else prepared.row_sums(each, *linear.weight)
        for each, linear in zip(scales, linears, strict=True)
    ]
    sparse = [prepared.Sparse(none, none, none) if each.sparse is None else each.sparse for each in scales]
    count = sum(triton.cdiv(each, tiles.rows) for each in rows) * triton.cdiv(tokens, tiles.tokens)
    partial, counters = workspace.of_split(tiles.split, tokens * sum(rows), count, input.device)
    with workspace.on(input.device):
        device.packed_linear[(count, tiles.split)](
            *(input, tuple(arranged), tuple(each.scales for each in scales)),
            tuple(none if each.zeros is None else each.zeros for each in scales),
            *(tuple(each.values for each in sparse), tuple(each.columns for each in sparse)),
            tuple(each.row_offsets for each in sparse),
            tuple(none if each.bias is None else each.bias.contiguous() for each in linears),
            none if residual is None else residual.contiguous(),
            *(none if tensor is None else tensor for tensor in (token_scales, token_zeros)),
            *(tuple(sums), tuple(outputs)),
            *(none if tensor is None else tensor for tensor in (partial, counters)),
            *(tuple(rows), tokens, columns, chunks_of(columns)),
            **format_constants(first.format),
            **call_constants(scales[0], first.bias, first.activation, residual, token_scales, token_zeros),
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
