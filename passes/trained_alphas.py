"""Alphas of binary-coded weights while they train: the first plane's apart from the others, gradients scaled.

    alphas [planes, rows, groups]  ->  cat(scale_gradient(first_alphas), other_alphas)

The other planes' alphas are then no part of what an optimizer sees, so that neither weight decay nor momentum moves
them. AlphaTuning (Kwon et al., arXiv 2210.03858) trains the first alone, and divides gradients by the number of weights
that share an alpha (its equation 4).
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from prequant.runtime import ops

from .program import Program, attribute_node

aten = torch.ops.aten

ALPHAS, FIRST, OTHERS = ".alphas", ".first_alphas", ".other_alphas"
"""How the names of these tensors end."""


def expose_alphas(program: Program, name: str, first: bool, gradient: float) -> str:
    """Make the alphas ``name`` train, or of several planes the first's alone; returns the name of what trains.

    It is a copy. Its gradient is multiplied by ``gradient``.
    """
    (old,) = program.graph.find_nodes(op="get_attr", target=name)
    alphas = program.tensor(name).detach()
    splits = first and alphas.shape[0] > 1
    trained = name.removesuffix(ALPHAS) + FIRST if splits else name
    program.set_tensor(trained, (alphas[:1] if splits else alphas).clone(), trainable=True)
    if not splits and gradient == 1.0:
        return trained
    readers = set(old.users)
    place = min(readers)
    new = attribute_node(program, trained, place)
    with program.graph.inserting_before(place):
        if gradient != 1.0:
            new = program.graph.call_function(ops.scale_gradient, (new,), {"factor": gradient})
        if splits:
            others = name.removesuffix(ALPHAS) + OTHERS
            program.set_tensor(others, alphas[1:].clone(), trainable=False)
            new = program.graph.call_function(aten.cat.default, ([new, attribute_node(program, others, new)],))
    new.meta["val"] = old.meta.get("val")
    old.replace_all_uses_with(new, delete_user_cb=readers.__contains__)
    if splits:
        program.graph.erase_node(old)
        program.delete_tensor(name)
    return trained


def join_alphas(program: Program, weights: Container[str]) -> None:
    """Put together what :func:`expose_alphas` took apart of these weights, with the values as they are now."""
    for node in program.graph.find_nodes(op="call_function", target=ops.scale_gradient):
        if _weight_of(node.args[0]) in weights:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    for first in program.graph.find_nodes(op="get_attr"):
        if not str(first.target).endswith(FIRST) or _weight_of(first) not in weights:
            continue
        (joined,) = first.users
        others: fx.Node = joined.args[0][1]
        parts = [str(first.target), str(others.target)]
        name = parts[0].removesuffix(FIRST) + ALPHAS
        trains = program.tensor(parts[0]).requires_grad
        program.set_tensor(name, torch.cat([program.tensor(part).detach() for part in parts]), trainable=trains)
        joined.replace_all_uses_with(attribute_node(program, name, joined))
        for node in (joined, first, others):
            program.graph.erase_node(node)
        for part in parts:
            program.delete_tensor(part)


def _weight_of(alphas: fx.Node) -> str:
    """The weight that stored alphas belong to."""
    return str(alphas.target).rpartition(".")[0]
