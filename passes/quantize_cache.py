"""quantize_cache: the key/value cache of a decoder's graph as integer codes, each position's with a scale of its own.

    keys = cat(past, new)  ->  codes = cat(past, quantize(new, s)), scales = cat(past_scale, s = dynamic_scale(new))
                               keys = dequantize(codes, scales)

A position's keys (or values) of one head are quantized once, when they are new, and by themselves: what the cache holds
of a text does not depend on how many steps brought it there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from prequant.runtime import WeightFormat, ops

from .base import PassError
from .packed import operands_of
from .program import Input, Program

aten = torch.ops.aten

SCALE = "_scale"
"""What follows an input's name in that of its scales."""
LENGTH_AXIS = 2


def quantize_cache(
    program: Program, inputs: Collection[str], results: Collection[int], format: WeightFormat
) -> Program:
    """The program with its cache in ``format``; it shares every tensor.

    ``inputs`` are keys and values ``[batch, heads, length, depth]`` by name: those that new positions are joined to by
    a concatenation along the length, and those that are only read. ``results`` says which results, counted from 0, the
    program returns to its caller for the next step. Each becomes two: codes ``[batch, heads, length, bytes]``, and
    behind them scales ``[batch, heads, length, 1]`` float32 (as inputs, ``NAME_scale``). Raises :class:`PassError` for
    a graph in which they are something else.
    """
    if program.signature.exposed:
        raise PassError("the Program has exposed values, which a cache leaves no room for: hide-outputs comes first")
    program = program.copy()
    rewrite = _Rewrite(program, format)
    for node in program.graph.find_nodes(op="placeholder"):
        if node.target in inputs:
            rewrite.input(node)
    output = program.graph.output_node()
    flat = cast("tuple[Any, ...]", output.args[0])
    for number in results:
        if flat[number] not in rewrite.stored:
            rewrite.result(flat[number])
    new: list[Any] = []
    for number, node in enumerate(flat):
        new += rewrite.stored[node] if number in results else [node]
    output.args = (tuple(new),)
    signature = replace(program.signature, inputs=tuple(rewrite.inputs), outputs=tuple(range(len(new))))
    program.graph.eliminate_dead_code()
    program.update_info(signature=signature)
    program.recompile()
    return program


@dataclass
class _Rewrite:
    program: Program
    format: WeightFormat
    inputs: list[Input] = field(default_factory=list)
    stored: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    """Codes and scales of what was a float tensor of the cache."""

    def __post_init__(self) -> None:
        self.inputs += self.program.signature.inputs

    def input(self, past: fx.Node) -> None:
        """Make an input codes, with their scales behind it."""
        graph, value = self.program.graph, past.meta["val"]
        if value.dim() != 4 or not value.is_floating_point():
            raise PassError(f"the input {past.target!r} is no cache [batch, heads, length, depth] of floats", node=past)
        codes, scales = self._fake(value)
        with graph.inserting_after(past):
            scale = graph.placeholder(f"{past.target}{SCALE}")
        past.meta["val"], scale.meta["val"] = codes, scales
        number = next(i for i, item in enumerate(self.inputs) if item.name == past.target)
        item = self.inputs[number]
        self.inputs[number : number + 1] = [
            replace(item, dtype=codes.dtype, shape=(*item.shape[:3], int(codes.shape[3]))),
            replace(item, name=str(scale.target), dtype=scales.dtype, shape=(*item.shape[:3], 1)),
        ]
        joins = [user for user in past.users if user.target is aten.cat.default]
        if not joins:
            self._read(past, past, scale, value, before=min(past.users, default=graph.output_node()))
            return
        (joined,) = joins
        operands = operands_of(joined)
        parts, axis = operands["tensors"], operands.get("dim", 0)
        if len(parts) != 2 or parts[0] is not past or axis not in (LENGTH_AXIS, LENGTH_AXIS - 4):
            raise PassError(f"what is new is not put behind the input {past.target!r}", node=joined)
        if others := [user for user in past.users if user is not joined and user.target is not aten.sym_size.int]:
            raise PassError(f"the input {past.target!r} is read by itself, without what is new", node=others[0])
        with graph.inserting_before(joined):
            new_codes, new_scale = self._quantized(parts[1])
            both = [(past, new_codes), (scale, new_scale)]
            codes_node, scale_node = (graph.call_function(aten.cat.default, (list(pair), LENGTH_AXIS)) for pair in both)
        self.stored[joined] = codes_node, scale_node
        self._read(joined, codes_node, scale_node, value, before=joined)

    def result(self, node: fx.Node) -> None:
        """Make a result that joins nothing codes and scales."""
        after = node.next
        with self.program.graph.inserting_before(after):
            self.stored[node] = codes, scale = self._quantized(node)
        self._read(node, codes, scale, node.meta["val"], before=after, keep=(codes, scale))

    def _quantized(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        graph = self.program.graph
        format: dict[str, Any] = {"format": str(self.format)}
        scale = graph.call_function(ops.dynamic_scale, (node,), format)
        return graph.call_function(ops.quantize, (node, scale, None), format), scale

    def _read(
        self,
        old: fx.Node,
        codes: fx.Node,
        scale: fx.Node,
        value: Tensor,
        before: fx.Node,
        keep: Collection[fx.Node] = (),
    ) -> None:
        """Have all that reads ``old``, but results, read what codes and scales stand for."""
        graph = self.program.graph
        with graph.inserting_before(before):
            options: dict[str, Any] = {"format": str(self.format), "columns": int(value.shape[3]), "dtype": value.dtype}
            whole = graph.call_function(ops.dequantize, (codes, scale, None), options)
        left = {*keep, whole, graph.output_node()}
        sizes = aten.sym_size.int
        old.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in left and user.target is not sizes)

    def _fake(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """What codes and scales of a fake tensor are."""
        with torch.no_grad():
            scale = ops.dynamic_scale(value, format=str(self.format))
            return ops.quantize(value, scale, None, format=str(self.format)), scale
