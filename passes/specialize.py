"""specialize: fix dynamic axes of a Program to sizes, so that what hangs on them becomes constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .base import PassError
from .program import Program


def specialize(program: Program, sizes: Mapping[str, int]) -> Program:
    """The program for inputs whose dynamic axes named in ``sizes`` have just that size; it shares every tensor.

    Raises :class:`PassError` for a name that is no dynamic axis of the program's inputs, and a size below one.
    """
    known = {size: None for item in program.signature.inputs for size in item.shape if isinstance(size, str)}
    for name, size in sizes.items():
        if name not in known:
            raise PassError(f"the Program has no dynamic axis {name!r}; it has {', '.join(known) or 'none'}")
        if size < 1:
            raise PassError(f"the axis {name!r} can't have the size {size}")
    program = program.copy()
    shapes = {item.name: item.shape for item in program.signature.inputs}
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        source: Any = node.args[0]
        if source.op == "placeholder" and (axis := shapes[str(source.target)][node.args[1]]) in sizes:
            _replace(node, sizes[axis])
    program.graph.eliminate_dead_code()
    inputs = tuple(
        replace(item, shape=tuple(sizes.get(size, size) if isinstance(size, str) else size for size in item.shape))
        for item in program.signature.inputs
    )
    program.update_info(signature=replace(program.signature, inputs=inputs))
    program.recompile()
    return program


def _replace(node: fx.Node, value: int) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
