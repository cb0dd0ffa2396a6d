"""Style ``matmulnbits``: ONNX Runtime's own operators on packed codes, MatMulNBits and GatherBlockQuantized.

Both read codes ``[rows, blocks, block * bits / 8]``, so that an embedding and a head that are tied share them. A block
has a power of two of columns, 16 to 256, and one scale. Scales stay as many as they are; where a row or a group has
several blocks, the graph repeats them (ONNX Runtime does that once, when it loads the file). Planes of bcq stand below
each other as further rows, and are summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from prequant.passes.weights import WeightView
from prequant.runtime import WeightFormat

from .builder import Builder, rank_of, stored
from .grid import Array, Grid, groups_of, packed_codes
from .styles import Style, StyleName, of_planes

DOMAIN = "com.microsoft"
BLOCKS = (256, 128, 64, 32, 16)


def block_of(format: WeightFormat, columns: int) -> int:
    """Columns of a block, as many as fit what shares a scale; 0 where none does.

    A row with one scale may end in a block that is not full: then it is the one with the least padding.
    """
    group = groups_of(format, columns)
    if group < columns:
        return next((block for block in BLOCKS if group % block == 0), 0)
    return min(BLOCKS, key=lambda block: (-columns % block, -block))


class MatMulNBits(Style):
    """Runs in ONNX Runtime (and what understands its operators) on the codes themselves.

    ``accuracy_level``: 4 has ONNX Runtime round the inputs of products to 8 bits, a scale for each block of a token;
    0 computes in float32. None: 4 for products whose input the Program has quantized to 8 bits, 0 for all others.
    """

    name: ClassVar[StyleName] = "matmulnbits"
    domains: ClassVar[Mapping[str, int]] = {DOMAIN: 1}

    def __init__(self, weights: Mapping[str, WeightView], opset: int, accuracy_level: int | None = None) -> None:
        super().__init__(weights, opset)
        self.accuracy_level = accuracy_level

    @classmethod
    def obstacle(cls, format: WeightFormat, columns: int) -> str:
        """See :class:`Style`."""
        if block_of(format, columns):
            return ""
        return f"groups of {format.group_size}; a block of MatMulNBits has a power of two of columns, 16 at least"

    def mapping(self, grid: Grid) -> str:
        """See :class:`Style`."""
        block = block_of(WeightFormat.parse(self.weights[grid.name].format), grid.columns)
        return f"{grid.planes} × " * (grid.planes > 1) + f"{grid.width}-bit codes in blocks of {block}"

    def _level(self, view: WeightView) -> int:
        if self.accuracy_level is not None:
            return self.accuracy_level
        return 4 if view.input_format.startswith("affine8") else 0

    def _product(self, builder: Builder, grid: Grid, input: ir.Value, bias: ir.Value | None, rounded: bool) -> ir.Value:
        codes, scale, zero_points, block = self._parts(builder, grid)
        single = grid.planes == 1
        attributes = {
            "K": grid.columns,
            "N": grid.planes * grid.rows,
            "bits": grid.width,
            "block_size": block,
            "accuracy_level": self._level(self.weights[grid.name]),
        }
        operands = [input, codes, scale, zero_points]
        if single and bias is not None:
            operands += [None, bias]
        while operands[-1] is None:
            operands.pop()
        result = builder.op("MatMulNBits", *operands, domain=DOMAIN, **attributes)
        if single:
            return result
        result = builder.reshape(result, [0] * (rank_of(input) - 1) + [grid.planes, grid.rows])
        result = builder.sum(result, -2)
        return result if bias is None else builder.op("Add", result, bias)

    def _rows(self, builder: Builder, grid: Grid, ids: ir.Value) -> ir.Value:
        codes, scale, _, block = self._parts(builder, grid)
        rank, single = rank_of(ids), grid.planes == 1
        indices = ids if single else of_planes(builder, grid, ids)
        operands = [codes, indices, builder.op("Unsqueeze", scale, builder.constant([-1]))]
        if grid.zero_point is not None:  # not packed here: there is one to a block
            each = self._per_block(grid, grid.zero_point[0], block)
            operands.append(stored(builder, f"{grid.name}.zero_points_of_blocks", each[:, :, None]))
        attributes = {"bits": grid.width, "block_size": block, "gather_axis": 0, "quantize_axis": 2}
        result = builder.op("GatherBlockQuantized", *operands, domain=DOMAIN, **attributes)
        if not single:
            result = builder.sum(result, -3)
        blocks = -(-grid.columns // block)
        result = builder.reshape(result, [0] * rank + [blocks * block])
        return result if blocks * block == grid.columns else builder.first(result, grid.columns, -1)

    def _parts(self, builder: Builder, grid: Grid) -> tuple[ir.Value, ir.Value, ir.Value | None, int]:
        """Codes, scales ``[rows, blocks]``, packed zero points, and the block."""
        block = block_of(WeightFormat.parse(self.weights[grid.name].format), grid.columns)
        rows, blocks = grid.planes * grid.rows, -(-grid.columns // block)
        codes = builder.stored(f"{grid.name}.codes")
        if codes is None:
            flat = grid.codes.reshape(rows, grid.columns)
            flat = np.pad(flat, ((0, 0), (0, blocks * block - grid.columns)))
            codes = builder.store(f"{grid.name}.codes", packed_codes(flat.reshape(rows, blocks, block), grid.width))
        zero_points = None
        if grid.zero_point is not None:
            packed = packed_codes(self._per_block(grid, grid.zero_point[0], block), grid.width)
            zero_points = stored(builder, f"{grid.name}.zero_points", packed)
        return codes, self._scales(builder, grid, rows, blocks, block), zero_points, block

    def _scales(self, builder: Builder, grid: Grid, rows: int, blocks: int, block: int) -> ir.Value:
        flat = grid.scale.reshape(-1, grid.scale.shape[-1])
        scale = stored(builder, f"{grid.name}.scale", flat)
        if flat.shape == (rows, blocks):
            return scale
        if flat.shape[1] == 1:
            return builder.op("Expand", scale, builder.constant([rows, blocks]))
        repeats, groups = grid.group // block, flat.shape[1]
        each = builder.op("Unsqueeze", scale, builder.constant([-1]))
        each = builder.op("Expand", each, builder.constant([rows, groups, repeats]))
        each = builder.reshape(each, [rows, groups * repeats])
        return each if groups * repeats == blocks else builder.first(each, blocks, 1)

    @staticmethod
    def _per_block(grid: Grid, each: Array, block: int) -> Array:
        """``[1 or rows, groups]`` as ``[rows, blocks]``."""
        blocks = -(-grid.columns // block)
        if each.shape[1] > 1:
            each = np.repeat(each, grid.group // block, axis=1)[:, :blocks]
        return np.ascontiguousarray(np.broadcast_to(each, (grid.rows, blocks)))
