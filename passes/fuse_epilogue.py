"""FuseEpilogue: what follows a packed linear (an activation, a sum with another value) becomes a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from prequant.runtime import ops

from .base import Report, WeightPass
from .noops import same_sizes
from .packed import operands_of
from .program import Program
from .shapes import propagate_shapes

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseEpilogue(WeightPass):
    """gelu(packed_linear(x, ...)) + y  ->  packed_linear(x, ..., residual=y, activation="gelu"); each part alone, too.

    The kernels then write each result once, instead of reading it again for every step. Only a value that nothing else
    reads is fused away, and a dropout in between keeps what follows it apart. A fused Program still trains: the
    gradients compute the value before the activation again.
    """

    name: ClassVar[str] = "fuse-epilogue"

    def run(self, program: Program) -> Report:
        """Fuse an activation, then a sum, into every packed linear that has one."""
        report = self.report()
        if any("val" not in node.meta for node in program.graph.nodes):
            propagate_shapes(program)  # a Program from a file, say: sums are fused where shapes are known to be equal
        for weight, node in self.packed_linear_nodes(program, report):
            parts = []
            if (reader := _only_reader(node)) is not None and (activation := _activation(node, reader)):
                node = _fused(program.graph, node, reader, node.args, {**node.kwargs, "activation": activation})
                parts.append(activation)
            if (reader := _only_reader(node)) is not None and (residual := _residual(node, reader)) is not None:
                node = _fused(program.graph, node, reader, (*node.args[:11], residual), node.kwargs)
                parts.append("residual")
            if parts:
                report.rewrite(weight, " + ".join(parts))
        report.totals.update(fused=len(report.changes))
        return report


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(linear: fx.Node, reader: fx.Node) -> str:
    """What the op calls the activation that ``reader`` is; empty if it is none that the op knows."""
    if linear.kwargs.get("activation") or len(linear.args) > 11:
        return ""
    if reader.target is aten.relu.default:
        return "relu"
    if reader.target is aten.gelu.default:
        return "gelu" if operands_of(reader).get("approximate", "none") == "none" else "gelu_tanh"
    return ""


def _residual(linear: fx.Node, reader: fx.Node) -> fx.Node | None:
    """What ``reader`` adds to the linear, if it is a sum of two values of one shape and type."""
    if reader.target is not aten.add.Tensor or len(linear.args) > 11:
        return None
    operands = operands_of(reader)
    if operands.get("alpha", 1) != 1:
        return None
    values = [operands["self"], operands["other"]]
    other: Any = values[1] if values[0] is linear else values[0]
    if not isinstance(other, fx.Node) or other is linear:
        return None
    mine, its = linear.meta.get("val"), other.meta.get("val")
    if not (isinstance(mine, torch.Tensor) and isinstance(its, torch.Tensor)):
        return None
    return other if mine.dtype == its.dtype and same_sizes(mine.shape, its.shape) else None


def _fused(graph: fx.Graph, linear: fx.Node, reader: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    """One node in the place of two, where the second was: there all operands exist."""
    with graph.inserting_before(reader):
        node = graph.create_node("call_function", ops.packed_linear, tuple(args), dict(kwargs))
    node.meta = dict(linear.meta)
    reader.replace_all_uses_with(node)
    graph.erase_node(reader)
    graph.erase_node(linear)
    return node
