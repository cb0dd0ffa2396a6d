"""How much the nodes of a graph compute: multiplications, each with its addition, counted from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from prequant.runtime import ops

from .base import PassError
from .packed import operands_of
from .program import Program
from .shapes import Shapes

aten = torch.ops.aten

PACKED_LINEARS = (ops.packed_linear, ops.packed_linears)


def multiply_adds(program: Program, shapes: Shapes, sizes: Mapping[str, int] | None = None) -> dict[fx.Node, int]:
    """Multiply-adds of every node that multiplies matrices: linears, packed ones, products, attention, convolutions.

    ``shapes`` are the Program's, which has them in its nodes; ``sizes`` are those of its dynamic axes, by name; where
    none is given, that of the trace. Raises :class:`PassError` for a name that is no dynamic axis, a size below one,
    and a shape that hangs on data.
    """
    for name, size in (sizes or {}).items():
        if name not in shapes.axes:
            raise PassError(f"the Program has no dynamic axis {name!r}; it has {', '.join(shapes.axes) or 'none'}")
        if size < 1:
            raise PassError(f"the axis {name!r} can't have the size {size}")
    known = {**_traced_sizes(program), **{shapes.axes[name]: size for name, size in (sizes or {}).items()}}
    counts = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (count := _count(node, known)):
            counts[node] = count
    return counts


def _traced_sizes(program: Program) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                found[size.node.expr] = size.node.hint
    return found


def _count(node: fx.Node, known: Mapping[Any, int]) -> int:
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    operands, result = operands_of(node), node.meta.get("val")
    if node.target in PACKED_LINEARS:
        results = result if isinstance(result, (list, tuple)) else [result]
        return sum(prod(_shape(node, each, known)) for each in results) * int(operands["columns"])
    if node.target is aten.linear.default:
        return prod(_shape(node, result, known)) * _shape(node, operands["weight"], known)[-1]
    if node.target is aten.matmul.default:
        return prod(_shape(node, result, known)) * _shape(node, operands["self"], known)[-1]
    if node.target is aten.scaled_dot_product_attention.default:
        query, key, value = (_shape(node, operands[name], known) for name in ("query", "key", "value"))
        return prod(query[:-1]) * key[-2] * (key[-1] + value[-1])
    formula = flop_registry.get(node.target.overloadpacket)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: _shape(node, operand, known))
    return int(formula(*args, **kwargs, out_val=_shape(node, result, known))) // 2  # it counts additions as well


def _shape(node: fx.Node, value: Any, known: Mapping[Any, int]) -> tuple[int, ...]:
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    if not isinstance(value, Tensor):
        return ()
    shape: Any = value.shape
    sizes: list[Any] = [size.node.expr.xreplace(known) if isinstance(size, torch.SymInt) else size for size in shape]
    if any(not isinstance(size, int) and not size.is_number for size in sizes):
        raise PassError(f"what %{node.name} computes hangs on the data", node=node)
    return tuple(map(int, sizes))
