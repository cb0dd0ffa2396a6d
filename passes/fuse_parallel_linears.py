"""FuseParallelLinears: packed linears that read one input become one op, which reads it once."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from prequant.runtime import ops

from .base import Report, WeightPass
from .packed import LISTED, PACKED_OPS, PRODUCTS, operands_of, uses_in
from .program import Program

QUANTIZATION = ("input_scale", "input_zero_point")
OPTIONS = ("columns", "input_format")
"""What fused linears have in common beside their input: operands, and options, which nodes give by name."""
OPERANDS = ("input", *list(LISTED.values())[:8], *QUANTIZATION)
"""What a node of ``packed_linear`` gives by position, where nothing is added to its result."""


@dataclass(frozen=True)
class FuseParallelLinears(WeightPass):
    """packed_linear(x, w1), packed_linear(x, w2)  ->  packed_linears(x, [w1, w2]): query, key, value; gate and up.

    The input is quantized once, and the rows of all weights are shared out over the threads together. Linears are
    fused if they quantize the input in the same way and no other product stands between them, so that no result lies
    around for longer. Each gives what it gave before, and trains as before.
    """

    name: ClassVar[str] = "fuse-parallel-linears"

    def run(self, program: Program) -> Report:
        """Fuse every group of packed linears in scope."""
        report = self.report()
        linears = {node: name for name, node in self.packed_linear_nodes(program, report)}
        for first, *others in list(_groups(program.graph, linears)):
            group = [first]
            for node in others:
                if late := _late_operand(node, first):
                    report.keep(linears[node], f"its operand {late.name} is computed after {linears[first]} is read")
                else:
                    group.append(node)
            if len(group) > 1:
                _fuse(program.graph, group)
                report.rewrite(linears[first], f"with {', '.join(linears[n] for n in group[1:])}", linears=len(group))
        report.totals.update(fused=len(report.changes))
        return report


def _groups(graph: fx.Graph, linears: Collection[fx.Node]) -> Iterator[list[fx.Node]]:
    """Runs of two or more of ``linears`` that see the same input, with no other product between them."""
    seen: tuple[Any, ...] = ()
    group: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (*PRODUCTS, *PACKED_OPS):
            continue
        sees = _input(node)
        if sees is None or sees != seen:
            if len(group) > 1:
                yield group
            seen, group = sees or (), []
        if node in linears and operands_of(node).get("residual") is None:
            group.append(node)
    if len(group) > 1:
        yield group


def _input(node: fx.Node) -> tuple[Any, ...] | None:
    """What a packed linear sees of its input; None for another product."""
    if node.target is not ops.packed_linear:
        return None
    (use,) = uses_in(node)
    return tuple(use.operands[name] for name in ("input", *QUANTIZATION, *OPTIONS))


def _late_operand(node: fx.Node, first: fx.Node) -> fx.Node | None:
    """An operand of ``node`` that is not there yet where ``first`` stands, and can't be: stored tensors can."""
    return next((each for each in node.all_input_nodes if each.op != "get_attr" and not each < first), None)


def _fuse(graph: fx.Graph, group: list[fx.Node]) -> None:
    """One op where the first of them stands, before all that reads their results."""
    first = group[0]
    each = [use.operands for node in group for use in uses_in(node)]
    for operand in (operand for node in group[1:] for operand in node.all_input_nodes):
        if first < operand:
            first.prepend(operand)
    lists = {name: [operands[one] for operands in each] for name, one in LISTED.items()}
    options: dict[str, Any] = {name: lists.pop(name) for name in ("formats", "activations")}
    options |= {name: each[0][name] for name in OPTIONS}
    args = (each[0]["input"], *lists.values(), *(each[0][name] for name in QUANTIZATION))
    with graph.inserting_before(first):
        fused = graph.create_node("call_function", ops.packed_linears, args, options)
        results = [graph.create_node("call_function", operator.getitem, (fused, i)) for i in range(len(group))]
    stacks = [node.meta.get("module_stack", ()) for node in group]
    fused.meta["module_stack"] = tuple(level for level, *same in zip(*stacks, strict=False) if set(same) == {level})
    fused.meta["val"] = [node.meta.get("val") for node in group]
    for node, result in zip(group, results, strict=True):
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def separate_linears(program: Program) -> Program:
    """A copy in which every linear is a node of its own again: the inverse of :class:`FuseParallelLinears`."""
    program = program.copy()
    for node in list(program.graph.find_nodes(op="call_function", target=ops.packed_linears)):
        for use in uses_in(node):
            if use.consumer is node:
                continue  # nothing takes this result
            args = tuple(use.operands[name] for name in OPERANDS)
            options = {name: use.operands[name] for name in ("format", "activation", *OPTIONS)}
            with program.graph.inserting_before(node):
                linear = program.graph.create_node("call_function", ops.packed_linear, args, options)
            linear.meta = dict(use.consumer.meta)
            use.consumer.replace_all_uses_with(linear)
            program.graph.erase_node(use.consumer)
        program.graph.erase_node(node)
    program.recompile()
    return program
