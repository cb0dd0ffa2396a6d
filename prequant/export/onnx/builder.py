"""Building the nodes that take the place of an opaque one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

Array = np.ndarray[Any, Any]


class Builder:
    """Nodes in order, and initializers of the graph that they read, each made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._tape = tape.Tape()

    @property
    def nodes(self) -> list[ir.Node]:
        """What has been built so far."""
        return list(self._tape.nodes)

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one result."""
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def stored(self, name: str) -> ir.Value | None:
        """An initializer by name, if there is one."""
        return self.graph.initializers.get(name)

    def store(self, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer under a name of its own. Arrays of narrower numbers (``dtype``) hold one a byte."""
        assert name not in self.graph.initializers, name
        tensor = ir.tensor(array, dtype=dtype, name=name) if dtype is None else _narrow(array, dtype, name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def constant(self, values: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant, shared by all that read the same."""
        array = np.array(values, dtype=dtype)
        text = "_".join(map(str, array.flatten())) if array.ndim else str(array)
        name = f"constant.{array.dtype}{array.ndim}.{text}"
        return self.stored(name) or self.store(name, array)

    # ---- what several mappings need -------------------------------------------------------------------------------

    def reshape(self, value: ir.Value, shape: list[int]) -> ir.Value:
        """0 keeps an axis, -1 takes what is left."""
        return self.op("Reshape", value, self.constant(shape))

    def first(self, value: ir.Value, count: int, axis: int) -> ir.Value:
        """The first of an axis."""
        return self.op(
            "Slice", value, self.constant([0]), self.constant([count]), self.constant([axis]), self.constant([1])
        )

    def sum(self, value: ir.Value, axis: int, keepdims: bool = False) -> ir.Value:
        """The sum over one axis."""
        return self.op("ReduceSum", value, self.constant([axis]), keepdims=int(keepdims))


def _narrow(array: Array, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    return ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)


def rank_of(value: ir.Value) -> int:
    """Dimensions of a value that the exporter gave a shape."""
    assert value.shape is not None
    return len(value.shape)


def stored(builder: Builder, name: str, array: Array, dtype: ir.DataType | None = None) -> ir.Value:
    """An initializer that several nodes may read."""
    return builder.stored(name) or builder.store(name, array, dtype)
