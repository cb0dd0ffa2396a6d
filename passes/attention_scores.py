"""Attention scores in a graph: what goes into a softmax over keys, or would, where attention is one fused node."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from prequant.runtime import ops

from .base import PassError
from .packed import operands_of

aten = torch.ops.aten

MASKED = -9000.0
"""From which addend on downwards a score is masked: models add -10,000 (-9,984 in bfloat16), -1e9, the least number of
the dtype or minus infinity, and an addend like this leaves no probability in any dtype. Biases are far smaller."""

FUSED = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
PRODUCTS = (
    aten.matmul.default,
    aten.bmm.default,
    aten.mm.default,
    aten.baddbmm.default,
    aten.einsum.default,
)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
DIFFERENCES = (aten.sub.Tensor, aten.sub_.Tensor)
SCALINGS = (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor, aten.mul.Scalar, aten.div.Scalar)
CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
FILLS = (
    aten.masked_fill.Scalar,
    aten.masked_fill_.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
)
VALUE_BY_VALUE = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.dropout_.default,
    aten.tanh.default,
    aten.maximum.default,
    aten.max.other,
    aten.clamp.default,
    aten.nan_to_num.default,
    ops.fake_quantize,
    ops.uncalibrated,
)
"""Ops through which scores, and probabilities, are followed: every element stays where it is."""
MOVING = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten.transpose.int,
    aten.permute.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.slice.Tensor,
)
"""Ops through which they are followed, too, and where elements move."""


class Attention(NamedTuple):
    """A softmax over keys, or a fused attention; ``factors``: what its products of queries and keys multiply."""

    node: fx.Node
    factors: tuple[fx.Node, ...]


@dataclass
class _Sources:
    """What scores are made of."""

    products: list[fx.Node] = field(default_factory=list)
    masks: list[tuple[Any, ...]] = field(default_factory=list)
    """Conditions as nodes to make, an op with its operands: true where a score is masked."""
    moved: bool = False
    """Whether a mask was added before elements moved, so that its own shape does not fit the scores."""


def attentions(graph: fx.Graph) -> Iterator[Attention]:
    """Every attention of a graph, in its order. Raises :class:`PassError` for one whose scores can't be found."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is FUSED:
            operands = operands_of(node)
            yield Attention(node, (operands["query"], operands["key"]))
        elif node.target in SOFTMAX and _weighs_values(node):
            products = _sources(node.args[0]).products
            if not products:
                raise _not_found(node, "no product of queries and keys leads to it")
            yield Attention(node, tuple(factor for product in products for factor in _factors(product)))
        elif "attention" in str(node.target):
            raise _not_found(node, f"{node.target} computes them inside itself")


def expose_scores(attention: Attention) -> fx.Node:
    """The node of an attention's scores, scaled and with what is added to them, and with 0 where they are masked."""
    node = attention.node
    if node.target is FUSED:
        return _scores_beside(node)
    scores: Any = node.args[0]
    sources = _sources(scores)
    if sources.moved:
        return _filled(node, scores, [(aten.le.Scalar, scores, MASKED)])
    return _filled(node, scores, sources.masks)


# ---- softmax ---------------------------------------------------------------------------------------------------------


def _weighs_values(node: fx.Node) -> bool:
    """Whether a product reads a result, perhaps after dropout, as attention's product with the values does."""
    for user in node.users:
        scaled = user.target in SCALINGS and _shape(user) == _shape(node)
        followed = scaled or user.target in (*VALUE_BY_VALUE, *MOVING, *FILLS)
        if _is_product(user) or (followed and _weighs_values(user)):
            return True
    return False


def _is_product(node: fx.Node) -> bool:
    """Whether a node multiplies matrices of which none is a stored weight."""
    return node.target in PRODUCTS and not any(_is_stored(factor) for factor in _factors(node))


def _is_stored(node: fx.Node) -> bool:
    while node.target in MOVING or node.target is aten.t.default:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape))


def _sources(scores: Any) -> _Sources:
    found = _Sources()
    _look(scores, found, in_place=True)
    return found


def _look(value: Any, found: _Sources, in_place: bool) -> bool:
    """Follow scores back to their products, and note masks on the way. Returns whether there is a product."""
    if not isinstance(value, fx.Node):
        return False
    target, args = value.target, value.args
    if _is_product(value):
        found.products.append(value)
        if target is aten.baddbmm.default:
            _note(found, in_place, _is_low(args[0]))
        return True
    if target in SUMS:
        first, second = (_look(operand, found, in_place) for operand in args[:2])
        if first != second:
            _note(found, in_place, _is_low(args[1] if first else args[0]))
        return first or second
    if target in DIFFERENCES and _look(args[0], found, in_place):
        _note(found, in_place, (aten.ge.Scalar, args[1], -MASKED))
        return True
    if target in SCALINGS:
        return any([_look(operand, found, in_place) for operand in args[:2]])
    if target in CHOICES:
        if _look(args[1], found, in_place):
            _note(found, in_place, _both((aten.logical_not.default, args[0]), _is_low(args[2])))
            return True
        if _look(args[2], found, in_place):
            _note(found, in_place, _both(args[0], _is_low(args[1])))
            return True
    if target in FILLS and _look(args[0], found, in_place):
        _note(found, in_place, _both(args[1], _is_low(args[2])))
        return True
    if target in VALUE_BY_VALUE:
        return _look(args[0], found, in_place)
    return target in MOVING and _look(args[0], found, False)


def _is_low(value: Any) -> Any:
    """Where a value masks what it is added to, or put in the place of: a condition to make, or True or False."""
    return (aten.le.Scalar, value, MASKED) if isinstance(value, fx.Node) else value <= MASKED


def _both(first: Any, second: Any) -> Any:
    if isinstance(second, bool):
        return first if second else False
    return (aten.logical_and.default, first, second)


def _note(found: _Sources, in_place: bool, condition: Any) -> None:
    if not isinstance(condition, bool):
        found.masks.append(condition)
        found.moved |= not in_place


def _factors(product: fx.Node) -> tuple[fx.Node, ...]:
    """What a product multiplies."""
    if product.target is aten.einsum.default:
        return tuple(product.args[1])  # type: ignore[arg-type]
    return product.args[1:3] if product.target is aten.baddbmm.default else product.args[:2]  # type: ignore[return-value]


# ---- fused attention -------------------------------------------------------------------------------------------------


def _scores_beside(node: fx.Node) -> fx.Node:
    """The scores of a fused attention from its operands. The query is scaled, as in the kernels, so that the product
    does not overflow in half precision.
    """
    operands = operands_of(node)
    query, key, mask = operands["query"], operands["key"], operands.get("attn_mask")
    scale = operands.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(_size(node, query, -1))
    if operands.get("enable_gqa") and (repeats := _size(node, query, -3) // _size(node, key, -3)) > 1:
        key = _make(node, aten.repeat_interleave.self_int, key, repeats, -3)
    scaled = _make(node, aten.mul.Tensor, query, scale)
    scores = _make(node, aten.matmul.default, scaled, _make(node, aten.transpose.int, key, -1, -2))
    if operands.get("is_causal"):
        return _make(node, aten.tril.default, scores)
    if mask is None:
        return scores
    if mask.meta["val"].dtype is torch.bool:
        return _filled(node, scores, [(aten.logical_not.default, mask)])
    return _filled(node, _make(node, aten.add.Tensor, scores, mask), [_is_low(mask)])


def _size(node: fx.Node, operand: fx.Node, axis: int) -> int:
    size = operand.meta["val"].shape[axis]
    if not isinstance(size, int):
        raise _not_found(node, f"axis {axis} of {operand.name} has no fixed size")
    return size


# ---- nodes -----------------------------------------------------------------------------------------------------------


def _filled(node: fx.Node, scores: fx.Node, conditions: list[Any]) -> fx.Node:
    """``scores`` with 0 where any of the conditions holds."""
    made = [_condition(node, condition) for condition in conditions]
    if not made:
        return scores
    masked = made[0]
    for other in made[1:]:
        masked = _make(node, aten.logical_or.default, masked, other)
    return _make(node, aten.masked_fill.Scalar, scores, masked, 0)


def _condition(node: fx.Node, condition: Any) -> fx.Node:
    if isinstance(condition, fx.Node):
        return condition
    op, *operands = condition
    return _make(node, op, *(_condition(node, part) if isinstance(part, tuple) else part for part in operands))


def _make(before: fx.Node, op: Any, *args: Any) -> fx.Node:
    """The node ``op(*args)`` before another, or one that is there already: layers share a mask."""
    for user in args[0].users:
        if user.target is op and user.args == args and not user.kwargs and user < before:
            return user
    with before.graph.inserting_before(before):
        node = before.graph.create_node("call_function", op, args)
    node.meta["module_stack"] = before.meta.get("module_stack", ())
    values = [arg.meta.get("val") if isinstance(arg, fx.Node) else arg for arg in args]
    if isinstance(values[0], Tensor):
        with torch.no_grad():
            node.meta["val"] = op(*values)
    return node


def _not_found(node: fx.Node, why: str) -> PassError:
    return PassError(
        f"the scores of the attention {node.name} can't be found: {why}; "
        'trace the model with attn_implementation="eager"',
        node=node,
    )
