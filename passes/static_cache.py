"""static_cache: the key/value cache of a decode graph in buffers of a fixed length, which it writes into.

    keys = cat(past, new)       ->  keys = index_copy_(past, 2, position, new)
    size(past) + 1, the total   ->  size(past), the length of the buffer
    tensor + size(past)         ->  tensor + position

``position`` is one more input, int64 ``[1]``: the place of the new position, on the device, so that no shape changes
from step to step and the host is never asked. What lies in a buffer behind ``position`` comes after the position that
asks, so that the graph's own causal mask hides it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .base import PassError
from .packed import operands_of
from .program import Input, Program
from .shapes import propagate_shapes

aten = torch.ops.aten

POSITION = "position"
"""The input that says where the new position is written."""

LENGTH = "length"
"""The axis of a buffer's positions."""

LENGTH_AXIS = 2


def static_cache(program: Program, inputs: Collection[str], axes: Collection[str]) -> Program:
    """The program over buffers ``[batch, heads, length, depth]`` that it writes into; it shares every tensor.

    ``program`` takes one new position, as :func:`~prequant.passes.specialize.specialize` makes it. ``inputs`` are keys
    and values by name, which it joins with what is new by a concatenation along the length, and returns. ``axes`` are
    the dynamic axes over past positions, and over past and new ones (of masks): they become one, ``length``, that of
    the buffers, which the result takes as ``inputs``, and writes into. ``position`` is its last input, and it returns
    what else the program did. Buffers have to be contiguous. Raises :class:`PassError` for a graph in which these are
    something else.
    """
    program = program.copy()
    graph = program.graph
    past = [node for node in graph.find_nodes(op="placeholder") if node.target in inputs]
    if missing := sorted(set(inputs) - {str(node.target) for node in past}):
        raise PassError(f"the Program has no input {missing[0]!r}")
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        position = graph.placeholder(POSITION)
    joined = {_write_in_place(graph, node, position) for node in past}
    for node in past:
        for size in [user for user in node.users if user.target is aten.sym_size.int]:
            if size.args[1] in (LENGTH_AXIS, LENGTH_AXIS - 4):
                _replace_past_length(size, position)
    output = graph.output_node()
    results: Any = output.args[0]
    left = tuple(result for result in results if result not in joined)
    output.args = (left,)
    graph.eliminate_dead_code()
    taken = [
        replace(item, shape=tuple(LENGTH if size in axes else size for size in item.shape))
        for item in program.signature.inputs
    ]
    taken.append(Input(POSITION, torch.int64, (1,)))
    signature = replace(program.signature, inputs=tuple(taken), outputs=tuple(range(len(left))))
    program.update_info(signature=signature)
    for node in graph.nodes:
        node.meta.pop("val", None)
    propagate_shapes(program)
    program.recompile()
    return program


def _write_in_place(graph: fx.Graph, past: fx.Node, position: fx.Node) -> fx.Node:
    """Write what is new into the buffer ``past``, in the place of the concatenation, whose readers read the buffer."""
    joins = [user for user in past.users if user.target is aten.cat.default]
    if len(joins) != 1:
        raise PassError(f"{len(joins)} concatenations put what is new behind the input {past.target!r}", node=past)
    (join,) = joins
    operands = operands_of(join)
    parts, axis = operands["tensors"], operands.get("dim", 0)
    if len(parts) != 2 or parts[0] is not past or axis not in (LENGTH_AXIS, LENGTH_AXIS - 4):
        raise PassError(f"what is new is not put behind the input {past.target!r}", node=join)
    if others := [user for user in past.users if user is not join and user.target is not aten.sym_size.int]:
        raise PassError(f"the input {past.target!r} is read by itself, without what is new", node=others[0])
    with graph.inserting_before(join):
        written = graph.call_function(aten.index_copy_.default, (past, LENGTH_AXIS, position, parts[1]))
    join.replace_all_uses_with(written)
    graph.erase_node(join)
    return written


def _replace_past_length(size: fx.Node, position: fx.Node) -> None:
    """Let the readers of the number of past positions read the buffer's length where they count all positions, and the
    new one's place where they add it to positions. ``size`` itself is the buffer's length from here on.
    """
    for user in list(size.users):
        operands = user.args[:2]
        if user.target is operator.add and 1 in operands:
            user.replace_all_uses_with(size)
            size.graph.erase_node(user)
        elif user.target is aten.add.Tensor and operands[1] is size and user.kwargs.get("alpha", 1) == 1:
            user.update_arg(1, position)
        else:
            raise PassError("it hangs on the number of past positions in a way that has no static form", node=user)
