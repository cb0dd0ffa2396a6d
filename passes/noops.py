"""Nodes that compute nothing: assertions, casts to what a value already is, slices of everything; and dead code.

What counts as known is the fake value in ``node.meta["val"]``: its dtype, device, and sizes as symbolic expressions.
Two sizes are equal only if their expressions are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .functional import writes
from .program import Program
from .reports import Report

aten = torch.ops.aten

ASSERTIONS = ("aten::_assert", "aten::sym_constrain_range")
"""What the names of ops that only check begin with."""


def remove_assertions(program: Program, report: Report) -> None:
    """Drop the checks that the exporter put in: a Program's signature checks its inputs."""
    dropped = []
    for node in list(program.graph.nodes):
        is_op = isinstance(node.target, torch._ops.OpOverload)
        if is_op and node.target.name().startswith(ASSERTIONS) and not node.users:
            dropped.append(node)
            program.graph.erase_node(node)
    _note(report, dropped, "an assertion, removed")


def bind_constants(program: Program, report: Report) -> None:
    """Put numbers that don't depend on the inputs in the place of the nodes that compute them."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and value.node.expr.is_number:
            value = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)](value)
        if node.op == "call_function" and node.users and isinstance(value, (bool, int, float)):
            _replace(node, value)
            report.rewrite(node, f"always {value}")


def remove_noops(program: Program, report: Report) -> None:
    """Drop nodes that return what they are given. Dropout stays, whatever its probability."""
    pure = not writes(program.graph)
    dropped = []
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        is_noop = NOOPS.get(node.target) or (COPIES.get(node.target) if pure else None)
        if is_noop is not None and is_noop(program, node):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
            dropped.append(node)
    _note(report, dropped, "does nothing, removed")


def remove_dead_code(program: Program, report: Report) -> None:
    """Drop nodes without users, then tensors that no node reads.

    Inputs stay, and so do random ops: without them others would draw other numbers.
    """
    before = {node for node in program.graph.nodes if node.op == "call_function"}
    program.graph.eliminate_dead_code()
    left = set(program.graph.nodes)
    _note(report, [node for node in before if node not in left], "nothing uses it, removed")
    for name in program.prune():
        report.rewrite(name, "no node reads it, removed")
    held = {name for name, _ in program.named_buffers()} | {name for name, _ in program.named_parameters()}
    program.update_info(constants=tuple(name for name in program.info.constants if name in held))


def _note(report: Report, nodes: list[fx.Node], how: str) -> None:
    for target, count in sorted(Counter(str(node.target) for node in nodes).items()):
        report.rewrite(target.removeprefix("aten.").removesuffix(".default"), how, nodes=count)


def _replace(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


# ---- which nodes return what they are given --------------------------------------------------------------------------


def _same_tensor(program: Program, node: fx.Node) -> bool:
    """A cast to the dtype, device and layout that the operand has."""
    source, result = _values(node)
    if source is None or result is None or node.kwargs.get("copy") or _reorders(node):
        return False
    return (source.dtype, source.device, source.layout) == (result.dtype, result.device, result.layout)


def _same_shape(program: Program, node: fx.Node) -> bool:
    """A view, reshape or expansion to the shape that the operand has; also a slice of everything in steps of one."""
    source, result = _values(node)
    if source is None or result is None or source.dtype != result.dtype:
        return False
    return same_sizes(source.shape, result.shape)


def _full_slice(program: Program, node: fx.Node) -> bool:
    start = node.args[2] if len(node.args) > 2 else node.kwargs.get("start")
    step = node.args[4] if len(node.args) > 4 else node.kwargs.get("step", 1)
    from_start = start is None or (isinstance(start, int) and start == 0)
    return from_start and isinstance(step, int) and step == 1 and _same_shape(program, node)


def _only_reshaped(program: Program, node: fx.Node) -> bool:
    """``contiguous`` before ``reshape``, which copies where it has to; or of what is contiguous by construction."""
    if _reorders(node):
        return False
    operand = node.args[0]
    if isinstance(operand, fx.Node) and operand.target in (aten.contiguous.default, aten.embedding.default):
        return True
    return all(user.target is aten.reshape.default for user in node.users)


def _plain_copy(program: Program, node: fx.Node) -> bool:
    return not _reorders(node)


def _constant(program: Program, node: fx.Node) -> bool:
    """Detaching a tensor that never has a gradient."""
    operand = node.args[0]
    return (
        isinstance(operand, fx.Node)
        and operand.op == "get_attr"
        and not isinstance(program.tensor(str(operand.target)), torch.nn.Parameter)
    )


def _adds_zero(program: Program, node: fx.Node) -> bool:
    """Adding the number 0 to integers; a float -0.0 would become 0.0."""
    source, _ = _values(node)
    is_zero = len(node.args) == 2 and type(node.args[1]) is int and node.args[1] == 0
    return is_zero and source is not None and not source.is_floating_point() and _same_tensor(program, node)


NOOPS: dict[Any, Callable[[Program, fx.Node], bool]] = {
    aten.to.dtype: _same_tensor,
    aten.to.device: _same_tensor,
    aten.to.dtype_layout: _same_tensor,
    aten.to.other: _same_tensor,
    aten.type_as.default: _same_tensor,
    aten.slice.Tensor: _full_slice,
    aten.expand.default: _same_shape,
    aten.view.default: _same_shape,
    aten.reshape.default: _same_shape,
    aten.contiguous.default: _only_reshaped,
    aten.add.Tensor: _adds_zero,
    aten.alias.default: _plain_copy,
    aten.detach.default: _constant,
    aten.detach_.default: _constant,
}
COPIES: dict[Any, Callable[[Program, fx.Node], bool]] = {
    aten._to_copy.default: _same_tensor,
    aten.clone.default: _plain_copy,
    aten.lift_fresh_copy.default: _plain_copy,
}
"""Ops that copy: only where nothing in the graph writes into a tensor is the copy as good as the original."""


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are the same expression."""
    return bool(_expression(a) == _expression(b))


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are the same expressions."""
    return len(a) == len(b) and all(same_size(*sizes) for sizes in zip(a, b, strict=True))


def _expression(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _reorders(node: fx.Node) -> bool:
    return node.kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format) or (
        node.kwargs.get("memory_format") is torch.contiguous_format and node.target is not aten.contiguous.default
    )


def _values(node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    operand = node.args[0] if node.args else None
    source = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    result = node.meta.get("val")
    return (source if isinstance(source, Tensor) else None), (result if isinstance(result, Tensor) else None)
