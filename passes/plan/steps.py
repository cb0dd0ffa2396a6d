"""Ops that the native library computes in a plan. Each function adds a node's steps, or says why it can't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from prequant.runtime import WeightFormat, native_layers, ops
from prequant.runtime import plan as runtime_plan

from ..packed import operands_of, uses_in
from .builder import Builder, LayerRequest, Step, four_axes, sizes_of
from .layout import Layout, equal, product

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
AXES = runtime_plan.AXES
CODES = str(WeightFormat.affine(8))
"""The format of rows that the library computes on as codes."""

Handler = Callable[[Builder, fx.Node, dict[str, Any]], "Layout | list[Layout] | str"]
"""The value of a node whose steps were added, or why none were."""

NOT_FLOATS = "its operands are not float32"
NO_KERNEL = "the native library does not take its format"

WEIGHT_TENSORS = ("codes", "scale", "zero_point", "outlier_values", "outlier_columns", "outlier_row_offsets")
INPUT_TENSORS = ("bias", "input_scale", "input_zero_point")
EMBEDDING_OPTIONS = ("format", "columns", "outliers_replace")
LINEAR_OPTIONS = {"format": "", "columns": 0, "outliers_replace": False, "input_format": "", "activation": ""}
"""Operands of the packed ops; these with what they are where they are not given."""


# ---- layers ----------------------------------------------------------------------------------------------------------


def _packed_linear(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    residual = operands.get("residual")
    added = builder.floats(residual) if residual is not None else None
    if residual is not None and added is None:
        return NOT_FLOATS
    results = _linears(builder, [operands], [node.meta["val"]], added)
    return results if isinstance(results, str) else results[0]


def _packed_linears(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> list[Layout] | str:
    members = [use.operands for use in uses_in(node)]
    results: list[Layout] = []
    for first in range(0, len(members), runtime_plan.MOST_LINEARS):
        part = slice(first, first + runtime_plan.MOST_LINEARS)
        made = _linears(builder, members[part], node.meta["val"][part], None)
        if isinstance(made, str):
            return made
        results += made
    return results


def _linears(
    builder: Builder, members: list[dict[str, Any]], values: Any, residual: Layout | None
) -> list[Layout] | str:
    """One step of linears that read one input; each has operands of ``packed_linear``, and a fake value."""
    input = builder.floats(members[0]["input"])
    if input is None:
        return NOT_FLOATS
    layers = []
    for operands in members:
        tensors = builder.names(**{name: operands.get(name) for name in (*WEIGHT_TENSORS, *INPUT_TENSORS)})
        options = {name: operands.get(name, default) for name, default in LINEAR_OPTIONS.items()}
        layers.append(LayerRequest(native_layers.linear, tensors, options))
    if not all(layer.ask(native_layers.takes_linear, builder.program.tensor) for layer in layers):
        return NO_KERNEL
    outs = [builder.buffer(torch.float32, sizes_of(value)) for value in values]
    input = builder.contiguous(input)
    added = builder.contiguous(residual) if residual is not None else None
    tokens = product(input.sizes[:-1])
    builder.step(Step(runtime_plan.LINEAR, (input, added, *outs), (tokens,), layers=tuple(layers)), outs)
    return outs


def _packed_embedding(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    ids = builder.value(operands["ids"])
    if ids.dtype is not torch.int64 or node.meta["val"].dtype is not torch.float32:
        return "its ids are not int64, or its rows not float32"
    tensors = builder.names(**{name: operands.get(name) for name in WEIGHT_TENSORS})
    options = {name: operands[name] for name in EMBEDDING_OPTIONS}
    layer = LayerRequest(native_layers.embedding, tensors, options)
    if not layer.ask(native_layers.takes_embedding, builder.program.tensor):
        return NO_KERNEL
    rows = builder.program.tensor(tensors["codes"]).shape[-2]
    ids = builder.contiguous(ids)
    out = builder.buffer(torch.float32, sizes_of(node.meta["val"]))
    step = Step(runtime_plan.EMBEDDING, (ids, out), (ids.elements,), layers=(layer,), ids=(ids, rows))
    builder.step(step, [out])
    return out


# ---- rows ------------------------------------------------------------------------------------------------------------


def _layer_norm(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    input, shape = builder.floats(operands["input"]), operands["normalized_shape"]
    weight, bias = (operands.get(name) for name in ("weight", "bias"))
    parts = [builder.floats(part) if part is not None else None for part in (weight, bias)]
    if input is None or any(p is not None and f is None for p, f in zip((weight, bias), parts, strict=True)):
        return NOT_FLOATS
    if len(shape) != 1:
        return "it goes over more than one axis"
    return _normalized(builder, input, parts, operands.get("eps", 1e-5), centered=True)


def _rms_norm(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    input, shape = builder.floats(operands["input"]), operands["normalized_shape"]
    weight = operands.get("weight")
    part = builder.floats(weight) if weight is not None else None
    if input is None or (weight is not None and part is None):
        return NOT_FLOATS
    if len(shape) != 1:
        return "it goes over more than one axis"
    epsilon = operands.get("eps")
    return _normalized(
        builder, input, [part, None], torch.finfo(torch.float32).eps if epsilon is None else epsilon, centered=False
    )


def _normalized(builder: Builder, input: Layout, parts: list[Layout | None], epsilon: float, centered: bool) -> Layout:
    columns = input.sizes[-1]
    rows = product(input.sizes[:-1])
    flat = input.viewed((rows, columns))
    if flat is None or not equal(flat.strides[1], 1):
        flat = builder.copied(input).viewed((rows, columns))
        assert flat is not None
    out = builder.buffer(torch.float32, input.sizes)
    written = out.viewed((rows, columns))
    assert written is not None
    contiguous = [builder.contiguous(part) if part is not None else None for part in parts]
    builder.step(
        Step(runtime_plan.NORMALIZE, (flat, written, *contiguous), (rows, columns), int(centered), epsilon), [out]
    )
    return out


# ---- element by element ----------------------------------------------------------------------------------------------


def _binary(function: str) -> Handler:
    def handler(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
        left, right = operands["self"], builder.value(operands["other"])
        if operands.get("alpha", 1) != 1 or operands.get("rounding_mode"):
            return "a sum with a factor, or a rounded quotient"
        if builder.floats(left) is None or node.meta["val"].dtype is not torch.float32:
            return NOT_FLOATS
        if isinstance(right, (int, float)):
            return _mapped(builder, node, function, builder.floats(left), None, float(right))
        other = builder.floats(operands["other"])
        return NOT_FLOATS if other is None else _mapped(builder, node, function, builder.floats(left), other)

    return handler


def _unary(function: str) -> Handler:
    def handler(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
        input = builder.floats(operands["self"])
        name = function
        if function == "gelu" and operands.get("approximate", "none") == "tanh":
            name = "gelu_tanh"
        return NOT_FLOATS if input is None else _mapped(builder, node, name, input, None)

    return handler


def _mapped(
    builder: Builder, node: fx.Node, function: str, left: Layout | None, right: Layout | None, number: float = 0.0
) -> Layout:
    assert left is not None
    sizes = sizes_of(node.meta["val"])
    out = builder.buffer(torch.float32, sizes)
    operands = [left.expanded(sizes), out] + ([right.expanded(sizes)] if right is not None else [])
    if all(layout.is_contiguous for layout in operands):
        # As few rows as can be: the number of elements may not fit one, so the last axis stays.
        flat = (product(sizes[:-1]), sizes[-1]) if sizes else (1,)
        operands = [view for layout in operands if (view := layout.viewed(flat)) is not None]
    four, (left, written, *rest) = four_axes(*operands)
    parts = (left, rest[0] if rest else None, written)
    builder.step(Step(runtime_plan.ELEMENTWISE, parts, four, runtime_plan.FUNCTIONS[function], number), [out])
    return out


# ---- codes -----------------------------------------------------------------------------------------------------------


def _dynamic_scale(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    """Scales, and with them the codes, which go by another node."""
    input = builder.floats(operands["input"])
    if input is None or len(input.sizes) > AXES or operands["format"] != CODES:
        return NO_KERNEL
    scales = builder.buffer(torch.float32, (*input.sizes[:-1], 1))
    codes = builder.buffer(torch.uint8, input.sizes)
    four, views = four_axes(input, codes, scales)
    builder.step(Step(runtime_plan.QUANTIZE, tuple(views), four), [codes, scales])
    for user in node.users:
        if user.target is ops.quantize and user.args == (operands["input"], node, None) and user.kwargs == node.kwargs:
            builder.values[user] = codes
    return scales


def _quantize(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    return builder.values.get(node, "its scale is not the dynamic one of its input")


def _dequantize(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    parts = _codes(builder, node)
    if parts is None:
        return NO_KERNEL
    codes, scales = parts
    out = builder.buffer(torch.float32, codes.sizes)
    four, views = four_axes(codes, scales, out)
    builder.step(Step(runtime_plan.DEQUANTIZE, tuple(views), four), [out])
    return out


def _codes(builder: Builder, node: Any) -> tuple[Layout, Layout] | None:
    """Codes and scales of a node that dequantizes 8-bit rows to float32."""
    if not (isinstance(node, fx.Node) and node.target is ops.dequantize):
        return None
    operands = operands_of(node)
    codes, scales = (builder.value(operands[name]) for name in ("codes", "scale"))
    if operands["format"] != CODES or node.meta["val"].dtype is not torch.float32 or len(codes.sizes) > AXES:
        return None
    if scales.dtype is not torch.float32 or not equal(codes.strides[-1], 1):
        return None
    return codes, scales


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    query, key, value = (builder.floats(operands[name]) for name in ("query", "key", "value"))
    if query is None or key is None or value is None:
        return NOT_FLOATS
    if operands.get("is_causal") or operands.get("dropout_p", 0.0):
        return "causal without a mask, or with dropout"
    if not len(query.sizes) == len(key.sizes) == len(value.sizes) == AXES:
        return "it does not have four axes"
    scales: tuple[Layout, ...] = ()
    of_keys, of_values = (_codes(builder, operands[name]) for name in ("key", "value"))
    if of_keys is not None and of_values is not None and equal(query.sizes[2], 1):
        # Codes of several queries are dequantized before, and not again for each.
        (key, key_scale), (value, value_scale) = of_keys, of_values
        scales = key_scale, value_scale
    query, key, value = (
        layout if equal(layout.strides[3], 1) else builder.copied(layout) for layout in (query, key, value)
    )
    batch, heads, queries, depth = query.sizes
    keys, key_heads, value_depth = key.sizes[2], key.sizes[1], value.sizes[3]
    if not (equal(key.sizes[0], batch) and isinstance(heads, int) and isinstance(key_heads, int)):
        return "its keys have another batch, or a number of heads that is dynamic"
    if heads % key_heads or not all(map(equal, key.sizes[:3], value.sizes[:3])):
        return "its keys, values and queries have different heads"
    scale = operands.get("scale")
    if scale is None:
        if not isinstance(depth, int):
            return "the depth of its heads is dynamic"
        scale = depth**-0.5
    mask, kind = None, runtime_plan.NO_MASK
    if operands.get("attn_mask") is not None:
        mask = builder.value(operands["attn_mask"])
        kind = {torch.bool: runtime_plan.BOOL_MASK, torch.float32: runtime_plan.FLOAT_MASK}.get(mask.dtype, -1)
        if kind < 0:
            return f"its mask is of {mask.dtype}"
        mask = mask.expanded((batch, heads, queries, keys))
    # Heads of a token lie side by side: what follows puts them together again.
    rows = builder.buffer(torch.float32, (batch, queries, heads, value_depth))
    out = rows.permuted((0, 2, 1, 3))
    sizes = (batch, heads, queries, keys, depth, value_depth, key_heads)
    builder.step(
        Step(runtime_plan.ATTENTION, (query, key, value, mask, out, *scales), sizes, kind, float(scale)), [out]
    )
    return out


def _cat(builder: Builder, node: fx.Node, operands: dict[str, Any]) -> Layout | str:
    parts = [builder.value(part) for part in operands["tensors"]]
    value = node.meta["val"]
    if any(part.dtype != value.dtype or len(part.sizes) != value.dim() for part in parts):
        return "its operands have different types or numbers of axes"
    axis, start = operands.get("dim", 0) % value.dim(), 0
    out = builder.buffer(value.dtype, sizes_of(value))
    for part in parts:
        builder.copy(part, out.sliced(axis, start, part.sizes[axis]))
        start = start + part.sizes[axis]
    return out


STEPS: dict[Any, Handler] = {
    ops.packed_linear: _packed_linear,
    ops.packed_linears: _packed_linears,
    ops.packed_embedding: _packed_embedding,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.add.Tensor: _binary("add"),
    aten.sub.Tensor: _binary("subtract"),
    aten.mul.Tensor: _binary("multiply"),
    aten.div.Tensor: _binary("divide"),
    aten.relu.default: _unary("relu"),
    aten.gelu.default: _unary("gelu"),
    aten.tanh.default: _unary("tanh"),
    aten.sigmoid.default: _unary("sigmoid"),
    aten.silu.default: _unary("silu"),
    aten.neg.default: _unary("negate"),
    ops.dynamic_scale: _dynamic_scale,
    ops.quantize: _quantize,
    ops.dequantize: _dequantize,
    ATTENTION: _attention,
    aten.cat.default: _cat,
}


def take_step(builder: Builder, node: fx.Node) -> str:
    """Add the steps of a node and note its value. Returns why it has none; empty if it was taken."""
    handler = STEPS.get(node.target)
    if handler is None:
        return "not an op of the native library"
    before = len(builder.units)
    try:
        value = handler(builder, node, operands_of(node))
    except (TypeError, ValueError) as error:
        value = str(error)
    if isinstance(value, str):
        del builder.units[before:]
        return value
    builder.values[node] = value
    return ""
