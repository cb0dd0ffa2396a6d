"""Style: what stands for a linear and an embedding of packed codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir

from prequant.passes.weights import WeightView
from prequant.runtime import WeightFormat

from ..errors import ExportError
from .builder import Builder
from .corrections import corrected_linear, corrected_rows
from .grid import Grid, grid

StyleName = Literal["qdq", "matmulnbits"]
Array = np.ndarray[Any, Any]


class Style(ABC):
    """Puts nodes in the place of opaque ones; every weight is stored once, whatever reads it."""

    name: ClassVar[StyleName]
    domains: ClassVar[Mapping[str, int]] = {}
    """Operator sets beside ONNX's own."""

    def __init__(self, weights: Mapping[str, WeightView], opset: int) -> None:
        self.weights, self.opset = weights, opset
        self._grids: dict[str, Grid] = {}
        self.mappings: dict[str, str] = {}
        """What each weight has become, by name."""

    @classmethod
    @abstractmethod
    def obstacle(cls, format: WeightFormat, columns: int) -> str:
        """Why a weight of a format can't be exported; empty if it can."""

    @abstractmethod
    def mapping(self, grid: Grid) -> str:
        """What a weight becomes, for tables."""

    def check(self) -> None:
        """Raise :class:`ExportError` for the first weight that this style has no form for."""
        for view in self.weights.values():
            if reason := self.obstacle(WeightFormat.parse(view.format), view.shape[1]):
                node = view.consumers[0].name
                raise ExportError(f"{view.name} (%{node}, {view.format}) can't be exported as {self.name}: {reason}")

    def linear(self, builder: Builder, weight: str, input: ir.Value, bias: ir.Value | None, rounded: bool) -> ir.Value:
        """``[..., rows]``: the product of ``input`` ``[..., columns]`` and a weight."""
        found = self._grid(weight)
        return corrected_linear(builder, found, input, self._product(builder, found, input, bias, rounded))

    def embedding(self, builder: Builder, weight: str, ids: ir.Value) -> ir.Value:
        """``[*ids.shape, columns]``: rows of a weight."""
        found = self._grid(weight)
        return corrected_rows(builder, found, ids, self._rows(builder, found, ids))

    def release(self, weight: str) -> None:
        """Forget the unpacked codes of a weight that nothing is going to read again."""
        self._grids.pop(weight, None)

    def _grid(self, weight: str) -> Grid:
        if weight not in self._grids:
            self._grids[weight] = found = grid(self.weights[weight])
            self.mappings[weight] = self.mapping(found) + _beside(found)
        return self._grids[weight]

    def _is_tied(self, grid: Grid) -> bool:
        return "+" in self.weights[grid.name].kind

    @abstractmethod
    def _product(self, builder: Builder, grid: Grid, input: ir.Value, bias: ir.Value | None, rounded: bool) -> ir.Value:
        """The product with the codes, and the bias."""

    @abstractmethod
    def _rows(self, builder: Builder, grid: Grid, ids: ir.Value) -> ir.Value:
        """The rows of the codes."""


def _beside(grid: Grid) -> str:
    offset = " + an offset of each group" if grid.offset is not None else ""
    return offset + (" + sparse outliers" if grid.outliers is not None else "")


def of_planes(builder: Builder, grid: Grid, ids: ir.Value) -> ir.Value:
    """Ids in a table of all planes, one below the other: ``[*ids.shape, planes]``."""
    starts = builder.constant([plane * grid.rows for plane in range(grid.planes)])
    wide = builder.op("Cast", ids, to=ir.DataType.INT64)
    return builder.op("Add", builder.op("Unsqueeze", wide, builder.constant([-1])), starts)
