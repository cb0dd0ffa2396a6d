"""lifted: a Program as a plain function of its inputs: by its plan, or else with its tensors looked up once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from .program import Program


def lifted(program: Program) -> Callable[..., tuple[Any, ...]]:
    """A function from the flat inputs to the flat results, over the tensors that the program holds now.

    The code of a graph reads every tensor anew, module by module; where a graph runs once per token, that takes as long
    as a good part of its operators. What is written into the tensors shows; what replaces them later does not.
    """
    module, tensors = without_tensors(program)
    forward, runner = module.forward, program.runner

    def call(*inputs: Tensor) -> tuple[Any, ...]:
        plan = runner.plan(program, inputs) if runner is not None else None
        if plan is not None:
            return plan(*inputs)
        results: tuple[Any, ...] = forward(*inputs, *tensors)
        return results

    return call


def without_tensors(program: Program) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph as a module that holds no tensor: it takes those that it reads, which come with it, behind the flat
    inputs.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph, values)
    graph.output(result)
    tensors: list[Tensor] = []
    last = list(graph.find_nodes(op="placeholder"))[-1:]
    for node in list(graph.find_nodes(op="get_attr")):
        tensors.append(program.tensor(str(node.target)))
        with graph.inserting_after(last[0]) if last else graph.inserting_before():
            placeholder = graph.placeholder(f"tensor_{len(tensors) - 1}")
        last = [placeholder]
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
    return fx.GraphModule({}, graph, "Lifted"), tensors
