"""Packed ops in a lowered graph, seen one weight at a time, whether an op computes with one or with several."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from prequant.runtime import PrequantError, ops

from .program import Program
from .sites import WeightSite

aten = torch.ops.aten

PRODUCTS = (
    aten.linear.default,
    aten.embedding.default,
    aten.embedding_bag.default,
    aten.embedding_bag.padding_idx,
    aten.addmm.default,
    aten.mm.default,
    aten.mv.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.bilinear.default,
    aten.einsum.default,
    aten.scaled_dot_product_attention.default,
)
"""Every op of ATen that multiplies matrices or looks up rows."""

PACKED_OPS: dict[Any, str] = {
    ops.packed_linear: "linear",
    ops.packed_linears: "linear",
    ops.packed_embedding: "embedding",
}
"""Ops that compute on packed weights, and what they are of each."""

SHARED = ("input", "input_scale", "input_zero_point", "columns", "input_format")
"""Operands of ``packed_linears`` that all of its linears have in common."""
LISTED = {
    "codes": "codes",
    "scales": "scale",
    "zero_points": "zero_point",
    "outlier_values": "outlier_values",
    "outlier_columns": "outlier_columns",
    "outlier_row_offsets": "outlier_row_offsets",
    "outliers_replace": "outliers_replace",
    "biases": "bias",
    "formats": "format",
    "activations": "activation",
}
"""Its lists, in the order of the schema, and what ``packed_linear`` calls an element of each."""


@dataclass(frozen=True)
class PackedUse:
    """One weight in one packed op: ``operands`` under the names that ``packed_linear`` or ``packed_embedding`` has for
    them, defaults included.

    ``consumer`` is the node whose value is the result: the op's, or the ``getitem`` of an op with several results (if
    nothing takes one of these, the op's again).
    """

    node: fx.Node
    consumer: fx.Node
    kind: str
    operands: dict[str, Any]


def packed_uses(graph: fx.Graph) -> list[PackedUse]:
    """Every use of a packed weight, in the order of the graph."""
    return [use for node in graph.nodes for use in uses_in(node)]


def uses_in(node: fx.Node) -> list[PackedUse]:
    """The uses that a node makes of packed weights; none if it is no packed op.

    Raises :class:`PrequantError` for a ``packed_linears`` whose lists do not have one length.
    """
    if node.op != "call_function" or node.target not in PACKED_OPS:
        return []
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    kind, operands = PACKED_OPS[node.target], {**defaults, **operands_of(node)}
    if node.target is not ops.packed_linears:
        return [PackedUse(node, node, kind, operands)]
    shared = {name: operands[name] for name in SHARED}
    lengths = {name: len(operands[name]) for name in LISTED}
    if len(set(lengths.values())) > 1:
        raise PrequantError(f"%{node.name} has lists of different lengths: {lengths}")
    taken = dict[int, fx.Node]()
    for user in node.users:
        if user.target is operator.getitem and isinstance(user.args[1], int):
            taken.setdefault(user.args[1], user)
    each = zip(*(operands[name] for name in LISTED), strict=True)
    return [
        PackedUse(node, taken.get(i, node), kind, {**shared, **dict(zip(LISTED.values(), values, strict=True))})
        for i, values in enumerate(each)
    ]


def uses_of(tensor: fx.Node) -> Iterator[tuple[PackedUse, str]]:
    """The uses that packed ops make of a value, each with the name of the operand that it is."""
    for user in tensor.users:
        for use in uses_in(user):
            for name, value in use.operands.items():
                if value is tensor:
                    yield use, name


def packed_weight_name(use: PackedUse) -> str:
    """The name of the weight that is used: what the names of its tensors begin with."""
    return str(use.operands["codes"].target).rpartition(".")[0]


def operands_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op's node by the names in its schema; those that are not given are left out."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    return {argument.name: value for argument, value in zip(arguments, node.args, strict=False)} | dict(node.kwargs)


def scoped(program: Program, name: str, consumers: tuple[fx.Node, ...]) -> WeightSite:
    """What a scope sees of any parameter, and of a weight that may be lowered: its name and its consumers."""
    return WeightSite(program, name, consumers[0], consumers[0], consumers)
