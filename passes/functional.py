"""Ops that write into their operands, rewritten into ops that return a new value, where that is provably the same."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .aliasing import is_view, mutated
from .program import Program
from .reports import Report

aten = torch.ops.aten


def make_functional(program: Program, report: Report) -> None:
    """Rewrite ``add_`` and the like into ``add``, ``native_dropout`` into the ``dropout`` that modes switch."""
    for node in list(program.graph.nodes):
        if any(True for _ in mutated(node)):
            _make_functional(node, report)
        elif node.target is aten.native_dropout.default:
            _plain_dropout(node, report)


def writes(graph: fx.Graph) -> bool:
    """Whether any node writes into an operand."""
    return any(True for node in graph.nodes for _ in mutated(node))


def _make_functional(node: fx.Node, report: Report) -> None:
    target = functional_variant(node.target)
    if target is None:
        report.keep(node, f"{node.target} writes into its operand and has no functional variant")
        return
    if why := _observed(node):
        report.keep(node, f"{node.target} writes into its operand, and {why}")
        return
    if not _same_kind(node, target):
        report.keep(node, f"{node.target} casts to its operand's type or shape, which {target} would not")
        return
    report.rewrite(node, f"{_short(node.target)} -> {_short(target)}")
    node.target = target


def functional_variant(target: Any) -> Any:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``; None where there is no op of that name with the same operands."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    packet, overload = target._schema.name.rpartition("::")[2], target._overloadname
    if not packet.endswith("_") or packet.startswith("__"):
        return None
    found = getattr(getattr(getattr(torch.ops, target.namespace), packet[:-1], None), overload, None)
    if found is None or len(found._schema.arguments) != len(target._schema.arguments):
        return None
    return found


def _observed(node: fx.Node) -> str | None:
    """Who would notice that ``node`` no longer writes: None if nobody, so that only its result is read afterwards."""
    written = list(mutated(node))
    if len(written) != 1:
        return f"there are {len(written)} of these"
    (operand,) = written
    if operand.op != "call_function":
        return f"{operand.name} is {'an input' if operand.op == 'placeholder' else 'a stored tensor'}"
    if is_view(operand):
        return f"{operand.name} may be a view of another value"
    for user in operand.users:
        if user is not node and (is_view(user) or not user < node):
            return f"{user.name} may see it"
    return None


def _same_kind(node: fx.Node, target: Any) -> bool:
    """Whether ``target`` returns what the in-place op leaves in its operand: that has the operand's dtype and shape."""
    (operand,) = mutated(node)
    values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    args, kwargs = values
    kept = operand.meta.get("val")
    if not isinstance(kept, torch.Tensor):
        return False
    result = target(*args, **kwargs)
    return result.dtype == kept.dtype and result.dim() == kept.dim()


def _plain_dropout(node: fx.Node, report: Report) -> None:
    uses = {user: user.args[1] for user in node.users if user.target is operator.getitem}
    if len(uses) != len(node.users) or any(index != 0 for index in uses.values()):
        report.keep(node, "the mask of its dropout is read")
        return
    source, p = node.args[:2]
    train = node.args[2] if len(node.args) > 2 else node.kwargs.get("train")
    with node.graph.inserting_before(node):
        dropout = node.graph.call_function(aten.dropout.default, (source, p, train is not False))
    dropout.meta = {**node.meta, "val": next((user.meta.get("val") for user in uses), None)}
    for user in uses:
        user.replace_all_uses_with(dropout)
        node.graph.erase_node(user)
    report.rewrite(node, "native_dropout -> dropout")
    node.graph.erase_node(node)


def _short(target: Any) -> str:
    return str(target).removeprefix("aten.").removesuffix(".default")
