"""Ops that only look at their operand in another way: no work in a plan, or a copy where memory has another order."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..packed import operands_of
from .builder import Builder, sizes_of
from .layout import Layout, equal, size_of

aten = torch.ops.aten

Handler = Callable[[Builder, fx.Node, dict[str, Any], Layout], "Layout | list[Layout] | None"]
"""The value of a node from its operands by name and the layout of the first; None where it is no view after all."""


def _viewed(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout | None:
    sizes = sizes_of(node.meta["val"])
    return layout.viewed(sizes) or builder.contiguous(layout).viewed(sizes)


def _same(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout | None:
    return layout if node.meta["val"].dtype == layout.dtype else None


def _contiguous(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout | None:
    return builder.contiguous(layout)


def _dropout(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout | None:
    return None if operands["train"] else layout


def _transpose(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout:
    axes = list(range(len(layout.sizes)))
    first, second = operands["dim0"], operands["dim1"]
    axes[first], axes[second] = axes[second], axes[first]
    return layout.permuted(axes)


def _matrix_transpose(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout:
    return layout.permuted(range(len(layout.sizes))[::-1])


def _permute(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout:
    return layout.permuted([axis % len(layout.sizes) for axis in operands["dims"]])


def _unsqueeze(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout:
    return layout.with_axis(operands["dim"] % (len(layout.sizes) + 1))


def _squeeze(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout:
    dims = operands.get("dim", range(len(layout.sizes)))
    dims = dims if isinstance(dims, Sequence) else [dims]
    if not layout.sizes:
        return layout
    for axis in sorted({axis % len(layout.sizes) for axis in dims}, reverse=True):
        size = layout.sizes[axis]
        if equal(size, 1):
            layout = layout.without(axis)
        else:
            builder.need(size - 2)  # a dynamic axis goes where its size is 1
    return layout


def _expand(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout:
    return layout.expanded(sizes_of(node.meta["val"]))


def _select(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout | None:
    index = builder.value(operands["index"])
    axis = operands["dim"] % len(layout.sizes)
    if not isinstance(index, int):
        return None
    index = index if index >= 0 else layout.sizes[axis] + index
    builder.need(index, layout.sizes[axis] - 1 - index)
    return layout.selected(axis, index)


def _slice(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> Layout | None:
    axis = operands.get("dim", 0) % len(layout.sizes)
    start = builder.value(operands.get("start")) or 0
    if not isinstance(start, int):
        return None  # may lie before 0 or behind the end, which only the call can tell
    size = layout.sizes[axis]
    start = start if start >= 0 else size + start
    if isinstance(start, int) and isinstance(size, int):
        start = min(max(start, 0), size)
    taken, step = sizes_of(node.meta["val"])[axis], operands.get("step", 1)
    builder.need(start, taken, size - start - (taken - 1) * step - 1)
    return layout.sliced(axis, start, taken, step)


def _split(builder: Builder, node: fx.Node, operands: dict[str, Any], layout: Layout) -> list[Layout]:
    axis = operands.get("dim", 0) % len(layout.sizes)
    parts, start = [], size_of(0)
    for part in node.meta["val"]:
        size = sizes_of(part)[axis]
        builder.need(size)
        parts.append(layout.sliced(axis, start, size))
        start = start + size
    return parts


VIEWS: dict[Any, Handler] = {
    aten.view.default: _viewed,
    aten.reshape.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten.flatten.using_ints: _viewed,
    aten.unflatten.int: _viewed,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.clone.default: _contiguous,
    aten.contiguous.default: _contiguous,
    aten.to.dtype: _same,
    aten.to.device: _same,
    aten.dropout.default: _dropout,
    aten.transpose.int: _transpose,
    aten.t.default: _matrix_transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
}


COPIES = (aten.clone.default, aten.lift_fresh_copy.default)
"""Of these, the ops whose result never shares memory with their operand in PyTorch."""


def take_view(builder: Builder, node: fx.Node) -> bool:
    """Give a node that is a view its layout. Returns whether it is one."""
    if node.target is operator.getitem:
        parts, index = builder.value(node.args[0]), node.args[1]
        if not isinstance(parts, list) or not isinstance(index, int):
            return False
        builder.values[node] = parts[index]
        return True
    handler = VIEWS.get(node.target)
    if handler is None:
        return False
    operands = operands_of(node)
    layout = builder.value(operands["self" if "self" in operands else "input"])
    if not isinstance(layout, Layout) or not isinstance(node.meta["val"], (Tensor, list, tuple)):
        return False
    try:
        value = handler(builder, node, operands, layout)
    except ValueError:
        return False  # a copy of more axes than steps have
    if value is None:
        return False
    builder.values[node] = value
    return True
