"""What a value comes straight from: a softmax, or an activation function of which few results lie below 0."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import fx

from .attention_scores import SOFTMAX

aten = torch.ops.aten

Origin = Literal["softmax", "activation"]

UNCHANGED = (
    aten.dropout.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
"""Ops that are seen through: every value stays what it is (but for rounding, and the factor of dropout)."""
ACTIVATIONS = (
    aten.gelu.default,
    aten.relu.default,
    aten.relu6.default,
    aten.silu.default,
    aten.mish.default,
    aten.hardswish.default,
)
ACTIVATION_TYPES = ("*GELU*", "*Gelu*", "ReLU*", "SiLU*", "Swish*", "Mish*", "Hardswish*")
"""Class names of modules that compute such a function, in one op or written out: ``NewGELUActivation``, ``ReLU6``.
Leaky ones (``LeakyReLU``, ``ELU``) and ``Tanh`` are none of them."""


def straight_from(value: fx.Node, consumer: fx.Node) -> Origin | None:
    """What ``value``, as ``consumer`` reads it, comes straight from: nothing but dropout, casts, copies and changes of
    shape lie in between. None where it is computed otherwise, as the product of an activation and a gate is.
    """
    source = value
    while source.target in UNCHANGED:
        source = source.all_input_nodes[0]
    if source.target in SOFTMAX:
        return "softmax"
    if source.target in ACTIVATIONS or _is_written_out(source, consumer):
        return "activation"
    return None


def _is_written_out(source: fx.Node, consumer: fx.Node) -> bool:
    """Whether a node is the result of a module that is an activation function by its class, and by what it does: it
    reads one value, and computes element by element. A gate or a layer of such a name does more.
    """
    level = _innermost(source)
    if not any(fnmatchcase(level[1], pattern) for pattern in ACTIVATION_TYPES) or _innermost(consumer) == level:
        return False
    inside, read, todo = set[fx.Node](), set[fx.Node](), [source]
    while todo:
        node = todo.pop()
        if node.op == "call_function" and _innermost(node) == level:
            if not _is_elementwise(node):
                return False
            todo += [operand for operand in node.all_input_nodes if operand not in inside]
            inside.add(node)
        else:
            read.add(node)
    return len(read) == 1


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    return target in UNCHANGED or (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags)


def _innermost(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the module whose own code a node is."""
    stack = node.meta.get("module_stack", ())
    return (str(stack[-1][0]), str(stack[-1][1])) if stack else ("", "")
