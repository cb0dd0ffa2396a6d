"""Linear layers in other forms: products with a stored weight that the exporter did not write as ``linear``.

::

    addmm(bias, x, w)   mm(x, w)   matmul(x, w)            w stored as [in, out] (GPT-2's Conv1D): transposed once
    linear(x, t(w), bias)
    addmm(bias, x, t(w))   mm(x, t(w))   matmul(x, t(w))   w stored as [out, in] already
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .noops import same_size, same_sizes
from .program import Program
from .reports import Report

aten = torch.ops.aten

POSITIONS: dict[Any, int] = {aten.addmm.default: 2, aten.mm.default: 1, aten.matmul.default: 1, aten.linear.default: 1}
"""Ops that multiply by a matrix, and its position; the input comes before it."""
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Product:
    """A product with a stored matrix of parameters that is not a plain ``linear`` with an ``[out, in]`` weight."""

    node: fx.Node
    weight: fx.Node
    reader: fx.Node
    """The node that reads the weight: the product, or one that transposes it first."""
    is_out_in: bool
    """Whether the weight is stored as ``[out, in]``, so that it can stay as it is."""

    @property
    def input(self) -> fx.Node:
        """The left operand, ``[..., in]``."""
        operand = self.node.args[POSITIONS[self.node.target] - 1]
        assert isinstance(operand, fx.Node)
        return operand


def products(program: Program) -> list[Product]:
    """Every product with a stored weight that is not yet a linear layer in its one form."""
    found = []
    for node in program.graph.nodes:
        position = POSITIONS.get(node.target) if node.op == "call_function" else None
        if position is None:
            continue
        left, right = node.args[position - 1 : position + 1]
        if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
            continue
        weight = transposed_by(program, right) or right
        is_linear = node.target is aten.linear.default
        if (weight is not right or not is_linear) and _is_weight(program, weight):
            reader = node if weight is right else right
            found.append(Product(node, weight, reader, is_out_in=(weight is not right) != is_linear))
    return found


def in_the_way(product: Product, every: list[Product]) -> str | None:
    """Why the weight of a product can't be stored the other way round; None if it can, or need not be."""
    if product.is_out_in:
        return None
    turning = [other for other in every if other.weight is product.weight and not other.is_out_in]
    done = {other.node for other in turning}
    for user in product.weight.users:
        others = [user] if user not in {other.reader for other in turning} else []
        if user in done:  # w @ w reads it on the left, too
            others = [user] if sum(operand is product.weight for operand in user.args) > 1 else []
        elif not others:
            others = [node for node in user.users if node not in done]
        if others:
            return f"{others[0].name} reads {product.weight.target} as it is stored"
    return None


def make_linear(program: Program, report: Report) -> None:
    """Rewrite every product with a stored weight into ``linear``, with a weight ``[out, in]``."""
    every = products(program)
    blocked = {product.node: why for product in every if (why := in_the_way(product, every))}
    turned: set[str] = set()
    for product in every:
        name = str(product.weight.target)
        if product.node in blocked:
            report.keep(name, f"{_name(product)} can't become linear: {blocked[product.node]}")
            continue
        if not product.is_out_in and name not in turned:
            _turn(program, product.weight)
            turned.add(name)
        report.rewrite(name, f"{_name(product)} -> linear" + ("" if product.is_out_in else ", stored as [out, in]"))
        _rewrite(product)


def transposed_by(program: Program, node: Any) -> fx.Node | None:
    """The stored matrix that ``node`` transposes; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not node.args:
        return None
    source, axes = node.args[0], node.args[1:]
    if not isinstance(source, fx.Node) or not _is_weight(program, source):
        return None
    swaps = (
        node.target in (aten.t.default, aten.numpy_T.default)
        or (node.target is aten.transpose.int and {axis % 2 for axis in axes} == {0, 1})  # type: ignore[operator]
        or (node.target is aten.permute.default and [axis % 2 for axis in axes[0]] == [1, 0])  # type: ignore[union-attr, operator]
    )
    return source if swaps else None


def _is_weight(program: Program, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    tensor = program.tensor(str(node.target))
    return isinstance(tensor, nn.Parameter) and tensor.dim() == 2


def _turn(program: Program, weight: fx.Node) -> None:
    name = str(weight.target)
    program.set_tensor(name, program.tensor(name).detach().t().contiguous())
    if "val" in weight.meta:
        weight.meta["val"] = weight.meta["val"].t().contiguous()
    program.update_info(transposed=(*program.info.transposed, name))


def _rewrite(product: Product) -> None:
    node, graph = product.node, product.node.graph
    bias, scale, bias_scale = None, 1, 1
    if node.target is aten.addmm.default:
        bias = node.args[0]
        scale, bias_scale = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)  # type: ignore[assignment]
    elif node.target is aten.linear.default:
        bias = node.args[2] if len(node.args) > 2 else None
    fused = scale == 1 and bias_scale == 1 and _is_vector(bias, node)
    source, replaced = _without_views(product) if fused else (product.input, node)
    meta = {"module_stack": node.meta.get("module_stack", ()), "val": replaced.meta.get("val")}

    def insert(name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.create_node("call_function", target, args, kwargs, name=name)
        new.meta = dict(meta)
        return new

    with graph.inserting_before(replaced):
        operands = (source, product.weight, bias) if fused and bias is not None else (source, product.weight)
        result = insert("linear", aten.linear.default, *operands)
        if not fused:
            result = insert("mul", aten.mul.Tensor, result, scale) if scale != 1 else result
            result = insert("add", aten.add.Tensor, result, bias, **({"alpha": bias_scale} if bias_scale != 1 else {}))
    replaced.replace_all_uses_with(result)
    for dead in dict.fromkeys((replaced, node)):
        graph.erase_node(dead)


def _is_vector(bias: Any, node: fx.Node) -> bool:
    """Whether a bias is one number per output, as ``linear`` takes it."""
    if bias is None:
        return True
    shape, result = _shape(bias), _shape(node)
    return len(shape) == 1 and len(result) > 0 and same_size(shape[0], result[-1])


def _without_views(product: Product) -> tuple[fx.Node, fx.Node]:
    """The input of the linear, and the node it takes the place of.

    ``view(addmm(bias, view(x, [-1, in]), w), [..., out])`` is a linear of ``x`` if the outer view restores what the
    inner one merged.
    """
    node, flat = product.node, product.input
    outer = next(iter(node.users), None)
    if len(node.users) != 1 or outer is None or outer.target not in VIEWS or flat.target not in VIEWS:
        return flat, node
    source = flat.args[0]
    before, merged, result, after = (_shape(each) for each in (source, flat, node, outer))
    if not isinstance(source, fx.Node) or not (before and merged and result and after):
        return flat, node
    restored = same_sizes((*before[:-1], result[-1]), after) and same_size(before[-1], merged[-1])
    return (source, outer) if restored else (flat, node)


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _name(product: Product) -> str:
    name = str(product.node.target).removeprefix("aten.").removesuffix(".default")
    return name if product.reader is product.node else f"{name} with a transposed weight"
