"""Outliers over a float weight: ScatterND puts them into it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .builder import Builder


def with_outliers(builder: Builder, node: ir.Node, replace: bool) -> ir.Value:
    """The float weight ``[rows, columns]`` of a node AddOutliers with its sparse values added, or put in its place.

    Positions are fixed; they are stored as ScatterND takes them.
    """
    weight, values, columns, row_offsets = node.inputs
    assert weight is not None and values is not None and columns is not None and row_offsets is not None
    assert columns.const_value is not None and row_offsets.const_value is not None
    offsets = row_offsets.const_value.numpy().astype(np.int64)
    rows = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    positions = np.stack([rows, columns.const_value.numpy().astype(np.int64)], axis=1)
    where = builder.store(f"{values.name}.positions", positions)
    if values.dtype is not ir.DataType.FLOAT:
        values = builder.op("Cast", values, to=ir.DataType.FLOAT)
    return builder.op("ScatterND", weight, where, values, reduction="none" if replace else "add")
