"""Floating-point types: a graph has the one it was traced in built in; this makes it the graph of another.

What comes from the model's tensors, or from inputs of floats, is in the model's type and moves along. What is computed
of positions, masks and constants alone (angles of rotary embeddings, buckets of distances) stays as exact as it was
traced, and is rounded where it meets a value of the model. The largest number of a type, which masks are made of, is
that of the new type.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program

aten = torch.ops.aten


def set_dtype(program: Program, old: torch.dtype, new: torch.dtype, constants: Collection[str]) -> None:
    """Let the graph of ``program`` compute in ``new`` what it computes in ``old``, in place.

    Every node's ``meta["val"]`` has to be what it was in ``old``. The tensors named ``constants`` stay in their type.
    """
    rewrite = _Rewrite(program.graph, old, new)
    for node in list(program.graph.nodes):
        if node.op == "placeholder":
            rewrite.note(node, of_model=True)
        elif node.op == "get_attr":
            rewrite.note(node, of_model=str(node.target) not in constants)
        elif node.op == "call_function":
            rewrite.call(node)
    signature = program.signature
    inputs = tuple(replace(item, dtype=new) if item.dtype is old else item for item in signature.inputs)
    program.update_info(signature=replace(signature, inputs=inputs))


class _Rewrite:
    def __init__(self, graph: fx.Graph, old: torch.dtype, new: torch.dtype) -> None:
        self._graph, self._old, self._new = graph, old, new
        self._of_model: set[fx.Node] = set()
        self._of_constants: set[fx.Node] = set()
        self._rounded: dict[fx.Node, fx.Node] = {}
        ends = torch.finfo(old), torch.finfo(new)
        self._ends = {ends[0].min: ends[1].min, ends[0].max: ends[1].max}

    def note(self, node: fx.Node, of_model: bool) -> None:
        """Remember what a float node is made of."""
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, Tensor) and item.dtype is self._old for item in values):
            (self._of_model if of_model else self._of_constants).add(node)

    def call(self, node: fx.Node) -> None:
        """Rewrite one call."""
        operands = set(node.all_input_nodes)
        of_model = bool(operands & self._of_model)
        if of_model and node.target is not operator.getitem:
            rounded = {operand: self._round(operand) for operand in operands & self._of_constants}
            node.args = fx.map_arg(node.args, lambda operand: rounded.get(operand, operand))
            node.kwargs = fx.map_arg(node.kwargs, lambda operand: rounded.get(operand, operand))
        node.args = _mapped(node.args, lambda value: self._value(value, of_model))
        node.kwargs = {name: _mapped(value, lambda v: self._value(v, of_model)) for name, value in node.kwargs.items()}
        self.note(node, of_model)

    def _value(self, value: Any, of_model: bool) -> Any:
        if of_model and value is self._old:
            return self._new
        return self._ends.get(value, value) if isinstance(value, float) else value

    def _round(self, operand: fx.Node) -> fx.Node:
        if operand not in self._rounded:
            with self._graph.inserting_after(operand):
                rounded = self._graph.call_function(aten.to.dtype, (operand, self._new))
            self._rounded[operand] = rounded
        return self._rounded[operand]


def _mapped(value: Any, change: Any) -> Any:
    """An operand with ``change`` done to what is in it; lists and tuples stay what they are."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)
