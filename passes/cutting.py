"""The graph of a Program in parts: what each part computes, reads, takes and hands on.

Parts are runs of the graph between borders. What a part reads of an earlier one, it takes as an input, or computes
again: what hangs on the model's own inputs without its parameters (masks, rotary tables, sizes), and what is made of
stored tensors alone (a tied weight of its codes). The first is a few bytes a token where it comes from and many more
where it is read, the second would be a whole weight. All else crosses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn

from .base import PassError
from .blocks import is_data
from .functional import writes
from .nesting import OutputTree
from .program import Input, Program, ProgramInfo, Signature
from .shapes import Shapes

aten = torch.ops.aten

HIDDEN_STATES = "hidden_states"
"""What the value between two blocks is called where it enters a part."""


@dataclass
class Contents:
    """What one part holds. ``nodes``: those that it computes, sizes aside. ``inputs``: of the model's own, those that
    it reads. ``taken``: values of earlier parts. ``sizes``: sizes that it reads, each with an input and the axis of it.
    """

    nodes: set[fx.Node] = field(default_factory=set)
    inputs: set[fx.Node] = field(default_factory=set)
    taken: set[fx.Node] = field(default_factory=set)
    sizes: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)


class Parts:
    """A graph in parts that end with ``borders``, values in the order of the graph; the last part ends with the graph.

    The Program is one whose shapes were propagated. Raises :class:`PassError` where its graph writes into a value.
    """

    def __init__(self, program: Program, shapes: Shapes, borders: Sequence[fx.Node]) -> None:
        if writes(program.graph):
            raise PassError("the graph writes into some of its values: canonicalize it before it is cut")
        self.program, self.shapes, self.borders = program, shapes, tuple(borders)
        self.order = {node: number for number, node in enumerate(program.graph.nodes)}
        self.ends = [self.order[border] for border in borders]
        self.again = computed_again(program, borders)
        self.roots: list[list[fx.Node]] = [[] for _ in range(len(borders) + 1)]
        for node in program.graph.nodes:
            if node.op == "output" or (node.op == "call_function" and (node not in self.again or not node.users)):
                self.roots[self.part_of(node)].append(node)

    def part_of(self, node: fx.Node) -> int:
        """The number of the part in which a node stands."""
        return bisect_left(self.ends, self.order[node])

    def tensors(self, part: int) -> set[str]:
        """Names of the tensors that a part reads."""
        seen: set[fx.Node] = set()
        pending = list(self.roots[part])
        while pending:
            for operand in pending.pop().all_input_nodes:
                if operand not in seen and (operand.op == "get_attr" or operand in self.again):
                    seen.add(operand)
                    pending.append(operand)
        return {str(node.target) for node in seen if node.op == "get_attr"}

    def contents(self) -> list[Contents]:
        """What every part holds. A value that a later part reads goes through all in between."""
        found: list[Contents] = []
        handed_on: set[fx.Node] = set()
        for part in reversed(range(len(self.roots))):
            taken = {node for node in handed_on if self.part_of(node) < part}
            if part:
                taken.add(self.borders[part - 1])
            found.append(self._contents(part, taken))
            handed_on = found[-1].taken
        return found[::-1]

    def _contents(self, part: int, taken: set[fx.Node]) -> Contents:
        held = Contents(set(self.roots[part]), taken=taken)
        pending, sizes = list(self.roots[part]), set[fx.Node]()
        while pending or sizes:
            if pending:
                node = pending.pop()
                for operand in node.all_input_nodes:
                    if _is_size(operand):
                        sizes.add(operand)
                    elif operand.op == "placeholder":
                        held.inputs.add(operand)
                    elif operand.op == "call_function" and operand not in self.again and self.part_of(operand) < part:
                        held.taken.add(operand)
                    elif operand not in held.nodes:
                        held.nodes.add(operand)
                        pending.append(operand)
                continue
            # Sizes last of all, when it is known what there is whose size they can be.
            size = min(sizes, key=self.order.__getitem__)
            sizes.remove(size)
            if size in held.sizes or size in held.nodes:
                continue
            if source := self._source(size, held):
                held.sizes[size] = source
            else:
                held.nodes.add(size)
                pending.append(size)
        return held

    def _source(self, size: fx.Node, held: Contents) -> tuple[fx.Node, int] | None:
        """An input of the part and its axis that always has this size; None where it has to be taken of what it was."""
        if size.target is not aten.sym_size.int:
            return None
        value, own = size.meta.get("val"), size.args[0]
        if own in held.inputs or own in held.nodes or not isinstance(value, torch.SymInt):
            return None
        for node in sorted((*held.taken, *held.inputs), key=lambda n: (n.op == "placeholder", -self.order[n])):
            for axis, other in enumerate(node.meta["val"].shape):
                if isinstance(other, torch.SymInt) and other.node.expr == value.node.expr:
                    return node, axis
        return None

    # ---- the parts as Programs ---------------------------------------------------------------------------------------

    def programs(self) -> list[Program]:
        """One Program for each part, over the tensors that it reads."""
        contents = self.contents()
        following = [*(held.taken for held in contents[1:]), None]
        return [
            self._program(part, held, handed_on)
            for part, (held, handed_on) in enumerate(zip(contents, following, strict=True))
        ]

    def _program(self, part: int, held: Contents, handed_on: Collection[fx.Node] | None) -> Program:
        graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
        taken = self._in_order(held.taken, part - 1)
        inputs = [self._input(node, name) for name, node in taken.items()]
        known = {item.name: item for item in self.program.signature.inputs}
        own = sorted(held.inputs, key=self.order.__getitem__)
        inputs += [known[str(node.target)] for node in own]
        for item, node in zip(inputs, (*taken.values(), *own), strict=True):
            values[node] = graph.placeholder(item.name)
            values[node].meta = dict(node.meta) if node.op == "placeholder" else {"val": node.meta["val"]}
        for node in sorted((*held.nodes, *held.sizes), key=self.order.__getitem__):
            if node.op == "output":
                continue
            if node in held.sizes:
                source, axis = held.sizes[node]
                values[node] = graph.create_node("call_function", node.target, (values[source], axis), {}, node.name)
                values[node].meta = dict(node.meta)
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
        outputs: OutputTree = self.program.signature.outputs
        results: Any = self.program.graph.output_node().args[0]
        if handed_on is not None:
            named = self._in_order(handed_on, part)
            outputs, results = {name: index for index, name in enumerate(named)}, tuple(named.values())
        graph.output(fx.map_arg(results, values.__getitem__))
        return self._made(graph, Signature(tuple(inputs), outputs))

    def _in_order(self, crossing: Collection[fx.Node], border: int) -> dict[str, fx.Node]:
        """What crosses a border by name: first the value at the border, then the others as they come in the graph."""
        first = [self.borders[border]] if crossing else []
        others = sorted((node for node in crossing if node not in first), key=self.order.__getitem__)
        taken = {*self.program.signature.names, *(node.name for node in others)}
        name = first[0].name if first and HIDDEN_STATES in taken else HIDDEN_STATES
        return dict(zip([name, *(node.name for node in others)], [*first, *others], strict=True)) if first else {}

    def _input(self, node: fx.Node, name: str) -> Input:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise PassError(f"%{node.name} is read on both sides of a cut, but is no tensor ({kind})", node=node)
        return Input(name, value.dtype, tuple(axis_name(size, self.shapes) for size in value.shape))

    def _made(self, graph: fx.Graph, signature: Signature) -> Program:
        info, read = self.program.info, {str(node.target) for node in graph.find_nodes(op="get_attr")}

        def is_read(weight: str) -> bool:  # itself, or what it is made of now
            return any(name == weight or name.startswith(f"{weight}.") for name in read)

        made = Program(
            self.program,
            graph,
            ProgramInfo(
                signature,
                aliases={weight: names for weight, names in info.aliases.items() if is_read(weight)},
                constants=tuple(filter(read.__contains__, info.constants)),
                transposed=tuple(filter(is_read, info.transposed)),
            ),
        )
        made.planned = self.program.planned
        return made


def computed_again(program: Program, borders: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes that any part may compute for itself: see the module's docstring. Random ones and borders are not."""
    inputs: set[fx.Node] = set()
    parameters: set[fx.Node] = set()
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        operands = node.all_input_nodes
        if node.op == "get_attr":
            if isinstance(program.tensor(str(node.target)), nn.Parameter):
                parameters.add(node)
        elif node.op == "placeholder" or not operands or _is_size(node):
            inputs.add(node)
        else:
            inputs.update({node} if not inputs.isdisjoint(operands) else ())
            parameters.update({node} if not parameters.isdisjoint(operands) else ())
        computed = all(operand in found or operand.op != "call_function" for operand in operands)
        if node.op != "call_function" or node in borders or not (computed or _is_size(node)):
            continue
        if _is_size(node) or not (is_random(node) or (node in inputs and node in parameters)):
            found.add(node)
    return found


def is_random(node: fx.Node) -> bool:
    """Whether a node may give something else when it is computed again."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def axis_name(size: int | torch.SymInt, shapes: Shapes) -> int | str:
    """A size as a signature says it: a number, the name of a dynamic axis, or an expression of such names."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    names = {axis: sympy.Symbol(name) for name, axis in shapes.axes.items()}
    return str(expression.xreplace(names))


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a size, or a number made of sizes."""
    return node.op == "call_function" and not is_data(node) and isinstance(node.meta.get("val"), NUMBERS)


NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
