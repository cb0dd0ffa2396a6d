"""Which nodes write into their operands, and which only give another view of them, by the schemas of their ops."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

COPIES_WHERE_NEEDED = frozenset(
    (
        aten.reshape.default,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.flatten.using_ints,
    )
)
"""Ops whose result is a view of the operand or a copy, as it happens."""


def mutated(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that a node writes into."""
    for argument, value in _operands(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values = value if isinstance(value, (list, tuple)) else (value,)
            yield from (item for item in values if isinstance(item, fx.Node))


def is_view(node: fx.Node) -> bool:
    """Whether a node's result can share memory with its operands: a view of one, or one that it wrote into."""
    return any(argument.alias_info is not None for argument, _ in _operands(node)) or node.target is operator.getitem


def storage_source(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` is certainly a view of: itself, where it computes one or may have copied."""
    while node.op == "call_function" and node.target not in COPIES_WHERE_NEEDED:
        if node.target is operator.getitem:
            viewed = list(node.all_input_nodes)
        else:
            viewed = [v for a, v in _operands(node) if a.alias_info is not None and isinstance(v, fx.Node)]
        if len(viewed) != 1:
            break
        node = viewed[0]
    return node


def _operands(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The schema's arguments with the node's values for them; nothing for a node that has no schema."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    arguments = node.target._schema.arguments
    yield from zip(arguments, node.args, strict=False)
    for argument in arguments:
        if argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]
