"""Dynamo's graph as a module with parameters of its own, which can be traced like any other.

Dynamo hands over parameters, buffers and sizes as inputs, each with the way that leads to it from the arguments of the
function that was called. What is stored becomes a tensor of the module again, under the name that the way spells; a
size is read from the input that has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import TensorPropertySource
from torch._dynamo.symbolic_convert import TensorifyState

from prequant.runtime import PrequantError

_STORED = re.compile(r"\._(modules|parameters|buffers)\['([^']+)'\]")


class CompileError(PrequantError):
    """A graph that can't be compressed on the way, or options that make no sense."""


@dataclass(frozen=True)
class Bound:
    """A graph over its own tensors.

    ``inputs``: what it is called with, by name, as examples. ``positions``: where these stand among Dynamo's inputs.
    ``axes``: which of their axes are dynamic, by name. ``stored``: positions and names of the tensors that modules
    hold.
    """

    module: fx.GraphModule
    inputs: dict[str, Tensor]
    positions: tuple[int, ...]
    axes: dict[str, dict[int, str]]
    stored: tuple[tuple[int, str], ...]


def bind(graph_module: fx.GraphModule, examples: Sequence[Any]) -> Bound:
    """The graph over its own tensors; ``examples`` are Dynamo's, one for each of its inputs.

    Raises :class:`CompileError` for an input that is neither tensor nor the size of one.
    """
    _fix_numbers(graph_module.graph)
    graph, root = fx.Graph(), nn.Module()
    values: dict[fx.Node, fx.Node] = {}
    inputs: dict[str, Tensor] = {}
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    positions, stored, names = [], [], dict[int, str]()
    for position, (node, example) in enumerate(zip(placeholders, examples, strict=True)):
        if isinstance(example, Tensor) and not (name := _stored_name(node, example)):
            values[node] = graph.placeholder(node.name)
            inputs[node.name] = example
            positions.append(position)
        elif isinstance(example, Tensor):
            if id(example) not in names:
                names[id(example)] = _store(root, name, example)
            values[node] = graph.get_attr(names[id(example)])
            stored.append((position, name))
    by_source = {_source(node): values[node] for node in placeholders if node.name in inputs}
    for node in placeholders:
        if node not in values:
            values[node] = _size(graph, node, by_source)
    for name, child in graph_module.named_children():
        root.add_module(f"dynamo_{name}", child)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            values[node] = graph.get_attr(_store(root, node.target, _attribute(graph_module, node.target)))
    output = graph.graph_copy(graph_module.graph, values)
    graph.output(output)
    module = fx.GraphModule(root, graph)
    axes = {node.name: _axes(node) for node in placeholders if node.name in inputs}
    return Bound(module, inputs, tuple(positions), axes, tuple(stored))


def _fix_numbers(graph: fx.Graph) -> None:
    """Numbers that modules hold, as a norm its epsilon, are constants: Dynamo starts over, and guards them.

    This is what Inductor asks of it for those that can't be tensors.
    """
    restart = False
    for node in graph.find_nodes(op="placeholder"):
        memo = getattr(node.meta.get("example_value"), "item_memo", None)
        name = getattr(getattr(getattr(memo, "node", None), "_expr", None), "name", None)
        if name is not None and not TensorifyState.should_specialize(name):
            TensorifyState.specialize(name)
            restart = True
    if restart:
        raise TensorifyScalarRestartAnalysis


def _source(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    return "" if source is None else str(source.name)


def _stored_name(node: fx.Node, value: Tensor) -> str:
    """The name of a tensor that a module holds; empty for one that the caller passes."""
    parts = _STORED.findall(_source(node))
    if parts and parts[-1][0] != "modules":
        return ".".join(name for _, name in parts)
    return node.name if isinstance(value, nn.Parameter) else ""


def _store(root: nn.Module, name: str, value: Any) -> str:
    """Put a tensor where its name says; two models in one graph may have the same names."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    while hasattr(owner, leaf):
        leaf += "_"
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)
    return ".".join((*path, leaf))


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _size(graph: fx.Graph, node: fx.Node, by_source: dict[str, fx.Node]) -> fx.Node:
    source = getattr(node, "_dynamo_source", None)
    if isinstance(source, TensorPropertySource) and source.idx is not None:
        owner = by_source.get(str(source.base.name))
        if owner is not None and source.prop.name == "SIZE":
            return graph.call_function(torch.ops.aten.sym_size.int, (owner, source.idx))
    raise CompileError(
        f"the compiled function takes {_source(node) or node.name!r}, which is neither a tensor nor the size of one: "
        "pass it as a tensor, or compile with dynamic=False"
    )


def _axes(node: fx.Node) -> dict[int, str]:
    """Dynamic axes, by the symbol that Dynamo has for the size: equal ones are equal sizes."""
    axes = {}
    for axis, size in enumerate(node.meta["example_value"].shape):
        if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
            continue
        if not size.node.expr.is_Symbol:
            raise CompileError(
                f"axis {axis} of {_source(node)} has the size {size.node.expr}: compile with dynamic=False, or pass it "
                "with a size of its own"
            )
        axes[axis] = str(size.node.expr)
    return axes
