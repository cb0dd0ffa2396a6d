"""A Program as a networkx graph: for analysis, for pictures, for whatever reads graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx
import sympy
import torch
from torch import Tensor, fx

from .blocks import is_data
from .packed import operands_of, packed_uses
from .printing import dtype_text, node_text, target_text
from .program import Program
from .shapes import propagate_shapes
from .weights import weights

NO_MODULE = "_empty_nn_module_stack"
"""How the path begins that torch.export writes for what is from no module's code."""
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def to_networkx(program: Program) -> nx.DiGraph:
    """The graph of a Program with a node for each of its own, by name, in its order; an edge from each operand.

    Attributes of a node, of the graph as it is:

    * ``op``: ``placeholder`` (an input), ``get_attr`` (a tensor), ``call_function`` or ``output``;
    * ``target``: what it calls (``linear``, ``add.Tensor``, ``packed_linear``), or the name of its input or tensor;
    * ``text``: the right-hand side of its line in :func:`prequant.passes.readable`;
    * ``module``, ``module_class``: path and class of the innermost module whose code it is from; empty outside one;
    * ``modules``: ``(path, class)`` of all modules around it, outermost first;
    * ``shape``, ``dtype``: of its value. A dynamic axis is the text of its name in the signature, or of an expression
      of such names. None where its value is no tensor (a size, several tensors);
    * ``data``: whether it is a value: no size, no arithmetic on sizes, no check;
    * ``bytes``: of a tensor of the Program (``get_attr``); 0 elsewhere;
    * ``weight``: the name of the weight that it reads as a linear or an embedding, that its tensor belongs to, or that
      it makes of such tensors; None elsewhere. Of a node that computes with several, the first;
    * ``format``, ``bits``, ``lowered``: of that weight; its bits are those stored per element, with scales and
      outliers. None elsewhere;
    * ``fused``: whether it computes more than the product with its weight: an activation, a sum with a residual.

    An edge has ``operands``: the names of the operands that the source is (``("input",)``), as in the schema of the
    op; positions as text where there is none.

    The nodes' shapes are computed anew, on a copy. Raises :class:`~prequant.passes.PassError` where they don't fit.
    """
    shaped = program.copy()
    names = {axis: sympy.Symbol(name) for name, axis in propagate_shapes(shaped).axes.items()}
    graph = nx.DiGraph()
    for node in shaped.graph.nodes:
        graph.add_node(node.name, **_attributes(shaped, node, names))
        for operand, value in _operands(node).items():
            for source in _nodes_in(value):
                if graph.has_edge(source.name, node.name):
                    graph.edges[source.name, node.name]["operands"] += (operand,)
                else:
                    graph.add_edge(source.name, node.name, operands=(operand,))
    _add_weights(graph, shaped)
    _add_fusions(graph, shaped)
    return graph


def _attributes(program: Program, node: fx.Node, names: Mapping[Any, sympy.Symbol]) -> dict[str, Any]:
    stack = node.meta.get("module_stack", ())
    levels = tuple((str(path), str(kind)) for path, kind in stack if not path.startswith(NO_MODULE))
    path, kind = levels[-1] if levels else ("", "")
    value = node.meta.get("val")
    held = program.tensor(str(node.target)) if node.op == "get_attr" else None
    return {
        "op": node.op,
        "target": target_text(node) if node.op == "call_function" else str(node.target),
        "text": node_text(program, node) if node.op == "call_function" else str(node.target),
        "module": path,
        "module_class": kind,
        "modules": levels,
        "shape": tuple(_axis(size, names) for size in value.shape) if isinstance(value, Tensor) else None,
        "dtype": dtype_text(value.dtype) if isinstance(value, Tensor) else None,
        "data": is_data(node) or node.op == "output",
        "bytes": held.numel() * held.element_size() if held is not None else 0,
        "weight": None,
        "format": None,
        "bits": None,
        "lowered": None,
        "fused": False,
    }


def _axis(size: Any, names: Mapping[Any, sympy.Symbol]) -> int | str:
    if not isinstance(size, SYMBOLIC):
        return int(size)
    expression = size.node.expr
    return int(expression) if expression.is_number else str(expression.xreplace(names))


def _operands(node: fx.Node) -> dict[str, Any]:
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return operands_of(node)
    return {str(position): value for position, value in enumerate(node.args)} | dict(node.kwargs)


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda node: found.append(node))
    return found


def _add_weights(graph: nx.DiGraph, program: Program) -> None:
    tensors = {str(node.target): node.name for node in program.graph.find_nodes(op="get_attr")}
    for view in weights(program):
        # The results of an op with several linears are taken apart by nodes of their own, which are the consumers.
        readers = {node for node in view.consumers if not _takes_apart(node)}
        readers |= {node.all_input_nodes[0] for node in view.consumers if _takes_apart(node)}
        facts = {
            "format": view.format,
            "bits": 8 * view.bytes / max(1, view.shape[0] * view.shape[1]),
            "lowered": view.lowered,
        }
        held = [tensors[name] for name in view.tensors.values() if name in tensors]
        made = [reader for name in held for reader in graph.successors(name)]  # what makes values of its tensors
        for name in (*held, *(node.name for node in (*view.consumers, *readers)), *made):
            if graph.nodes[name]["weight"] is None:
                graph.nodes[name].update(weight=view.name, **facts)


def _add_fusions(graph: nx.DiGraph, program: Program) -> None:
    for use in packed_uses(program.graph):
        if use.operands.get("activation") or use.operands.get("residual") is not None:
            graph.nodes[use.consumer.name]["fused"] = True


def _takes_apart(node: fx.Node) -> bool:
    return target_text(node) == "operator.getitem"
