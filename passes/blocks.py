"""Where a model's repeated blocks begin and end in its graph: stacks of layers, found by structure.

Modules of one class that are numbered one after the other (``encoder.layer.0``, ``encoder.layer.1``, ...) are the
candidates, each as often as it is called: ALBERT's is one, over and over. The data that flows through a graph says
where they part: a value through which every path from an input of the model to the end of the stack leads (a dominator
in the graph of values) is a boundary between two of them. What enters a block past such a value, as masks and position
biases do, is no boundary, and what a block computes without it (T5's first one computes the bias for all) is not of the
block's body.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import fx

from .program import Program

aten = torch.ops.aten

NUMBERED = re.compile(r"(?:(.*)\.)?(\d+)")
SIZES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)
ASSERTIONS = ("_assert", "sym_constrain")
"""How the names of ops begin that only check."""


@dataclass(frozen=True)
class Stack:
    """Blocks one after the other.

    ``path``: of the modules, without their numbers, which are ``numbers``. ``boundaries``: the value that enters the
    first block, then what leaves each. ``bodies``: of each block the nodes between two boundaries, the second one
    included, in the order of the graph.
    """

    path: str
    numbers: tuple[int, ...]
    boundaries: tuple[fx.Node, ...]
    bodies: tuple[tuple[fx.Node, ...], ...]

    def __len__(self) -> int:
        return len(self.bodies)

    def block(self, number: int) -> str:
        """The path of a block's module."""
        return f"{self.path}.{self.numbers[number]}" if self.path else str(self.numbers[number])

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Weights that several blocks read: these are not each other's own."""
        inside = {node: number for number, body in enumerate(self.bodies) for node in body}
        return tuple(
            str(weight.target)
            for weight in self.boundaries[0].graph.find_nodes(op="get_attr")
            if len({inside[user] for user in _weight_readers(weight) if user in inside}) > 1
        )


def find_stacks(program: Program) -> tuple[Stack, ...]:
    """The stacks of a Program in the order of its graph: one for an encoder or a decoder, two for a model with both.

    A stack that one block makes up is one, too. Blocks whose data can't be told apart are no stack.
    """
    flow = data_flow(program.graph)
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    candidates = numbered(program.graph)
    found = _innermost(_stacks(flow, order, candidates))
    # A decoder of the text that the encoder reads: what that gives enters each block past the one before, as masks do,
    # so there is no boundary between them; and a single block seems to hold the encoder.
    found = [stack for stack in found if not any(_holds(stack, other) for other in found)]
    ends = {stack.boundaries[-1] for stack in found}
    left = {path: calls for path, calls in candidates.items() if path not in {stack.path for stack in found}}
    if ends and left:
        found = _innermost([*found, *_stacks(nx.restricted_view(flow, ends, ()), order, left)])
    return tuple(sorted(found, key=lambda stack: order[stack.boundaries[0]]))


def data_flow(graph: fx.Graph) -> nx.DiGraph:
    """The graph of values: an edge from a node to each that reads its numbers, not only its size."""
    flow = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node)
        if is_data(node):
            flow.add_edges_from((source, node) for source in node.all_input_nodes if is_data(source))
    return flow


def is_data(node: fx.Node) -> bool:
    """Whether a node is a value, and no size, no check, and not the graph's end."""
    if node.op != "call_function":
        return node.op != "output"
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target in SIZES:  # Python's own operators, on sizes
        return False
    return not node.target.__name__.startswith(ASSERTIONS)


# ---- one stack -------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """Nodes of a numbered module, of one time that it is called."""

    number: int
    nodes: list[fx.Node]
    weights: set[tuple[Any, fx.Node]]


def numbered(graph: fx.Graph) -> dict[str, list[Call]]:
    """Calls of modules by the path of the list that they are in, where that has one class: the candidates for stacks.

    A module is called again where another one of its list was in between, or an op reads a weight that it has read.
    """
    found: dict[str, list[Call]] = {}
    kinds: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        read = {(node.target, source) for source in node.all_input_nodes if source.op == "get_attr"}
        for path, kind in node.meta.get("module_stack", ()):
            if match := NUMBERED.fullmatch(path):
                list_path, number = match[1] or "", int(match[2])
                calls = found.setdefault(list_path, [])
                if not calls or calls[-1].number != number or calls[-1].weights & read:
                    calls.append(Call(number, [], set()))
                calls[-1].nodes.append(node)
                calls[-1].weights |= read
                kinds.setdefault(list_path, set()).add(kind)
    return {path: calls for path, calls in found.items() if len(kinds[path]) == 1}


def _stacks(flow: nx.DiGraph, order: dict[fx.Node, int], candidates: Mapping[str, Sequence[Call]]) -> list[Stack]:
    dominators = cache(lambda source: nx.immediate_dominators(flow, source))
    found = (_stack(flow, dominators, order, path, calls) for path, calls in candidates.items())
    return [stack for stack in found if stack is not None]


def _innermost(stacks: Sequence[Stack]) -> list[Stack]:
    """Of stacks in one another, as a list of one group that holds the layers, the inner one, which says more."""
    return [s for s in stacks if not any(other.path.startswith(f"{s.path}.") for other in stacks)]


def _holds(stack: Stack, other: Stack) -> bool:
    """Whether another stack lies within the blocks of this one."""
    return stack is not other and any(other.boundaries[-1] in body for body in stack.bodies)


def _stack(
    flow: nx.DiGraph,
    dominators_from: Callable[[fx.Node], dict[Any, Any]],
    order: dict[fx.Node, int],
    path: str,
    calls: Sequence[Call],
) -> Stack | None:
    inside = {node: place for place, call in enumerate(calls) for node in call.nodes}
    ends = [node for node in calls[-1].nodes if is_data(node) and any(user not in inside for user in node.users)]
    for source in (node for node in flow if node.op == "placeholder"):
        dominators = dominators_from(source)
        for end in sorted((end for end in ends if end in dominators), key=order.__getitem__, reverse=True):
            boundaries = _boundaries(_chain(dominators, source, end), inside, len(calls))
            if boundaries is None:
                continue
            bodies = tuple(_bodies(flow, order, boundaries))
            # What a block makes for all (of the encoder's states, by a quantizer) parts them as well, but not by block.
            if all(_is_of(node, place, inside, calls) for place, body in enumerate(bodies) for node in body):
                return Stack(path, tuple(call.number for call in calls), boundaries, bodies)
    return None


def _is_of(node: fx.Node, place: int, inside: Mapping[fx.Node, int], calls: Sequence[Call]) -> bool:
    """Whether a node may be of the block at a place. What a module that is called again computes before it reads a
    weight, as a quantizer of its input, counts to the call before.
    """
    own = inside.get(node, place)
    return own == place or (own == place - 1 and calls[own].number == calls[place].number)


def _chain(dominators: dict[Any, Any], source: fx.Node, end: fx.Node) -> list[fx.Node]:
    """What every path from the source to the end passes, in order."""
    chain = [end]
    while chain[-1] is not source:
        chain.append(dominators[chain[-1]])
    return chain[::-1]


def _boundaries(chain: Sequence[fx.Node], inside: dict[fx.Node, int], count: int) -> tuple[fx.Node, ...] | None:
    """What enters the first block, and the last of the chain in each; None if one has none of it."""
    last = {inside[node]: place for place, node in enumerate(chain) if node in inside}
    if len(last) < count or list(last) != sorted(last):
        return None
    first = next(place for place, node in enumerate(chain) if node in inside)
    return (chain[first - 1], *(chain[last[number]] for number in range(count))) if first else None


def _bodies(
    flow: nx.DiGraph, order: dict[fx.Node, int], boundaries: Sequence[fx.Node]
) -> Iterator[tuple[fx.Node, ...]]:
    for entry, end in pairwise(boundaries):
        between = (nx.descendants(flow, entry) & nx.ancestors(flow, end)) | {end}
        yield tuple(sorted(between, key=order.__getitem__))


def _weight_readers(node: fx.Node) -> Iterator[fx.Node]:
    """Those that read a tensor, also by way of what makes a weight of it."""
    for user in node.users:
        if user.op == "call_function" and all(source.op == "get_attr" for source in user.all_input_nodes):
            yield from _weight_readers(user)
        else:
            yield user
