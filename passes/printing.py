"""A Program as short text: one line a node, tensors inlined by name, deterministic, so that golden tests and diffs
can be read.

An example::

program(x: f32[batch, length, 8]) %linear = linear(%x, first.weight [16×8 f32], first.bias [16 f32]) %relu =
relu(%linear) %dequantize_default = dequantize<affine4:row>(second.weight.codes [4×8 u8], second.weight.scale [4×1
f32], columns=16) %linear_1 = linear(%relu, %dequantize_default, second.bias [4 f32]) return {logits: %linear_1}

Parameters that do not train say ``frozen``. Ops are ATen's unless they carry a format; ``.default`` is left out.
Exposed values stand behind what is returned, one a line.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from .nesting import OutputTree
from .program import Program

DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.bool: "bool",
    torch.complex64: "c64",
}
NAMESPACE = "prequant"


def readable(program: Program) -> str:
    """The text of a Program's graph, without a newline at its end.

    Equal graphs over equally shaped tensors give equal text.
    """
    signature = program.signature
    inputs = ", ".join(
        f"{item.name}: {dtype_text(item.dtype)}[{', '.join(map(str, item.shape))}]" for item in signature.inputs
    )
    lines = [f"program({inputs})"]
    lines += [
        f"  {name} is tied to {', '.join(aliases)}" for name, aliases in sorted(program.info.aliases.items()) if aliases
    ]
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            lines.append(f"  return {_outputs(program, signature.outputs, node)}")
            flat = node.args[0]
            lines += [f"  expose {_nest_text(program, at, flat)} as {name}" for name, at in signature.exposed.items()]
        else:
            lines.append(f"  %{node.name} = {node_text(program, node)}")
    return "\n".join(lines)


def node_text(program: Program, node: fx.Node) -> str:
    """The right-hand side of one node's line: ``linear(%x, first.weight [16×8 f32], None)``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return _prequant_op(program, node, target)
    operands = [_value(program, arg) for arg in node.args]
    operands += [f"{key}={_value(program, value)}" for key, value in node.kwargs.items()]
    return f"{target_text(node)}({', '.join(operands)})"


def target_text(node: fx.Node) -> str:
    """What a node calls: ``linear``, ``add.Tensor``, ``operator.getitem``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target.name().removeprefix("aten::").removesuffix(".default")
        return name.replace("::", ".")
    if isinstance(target, str):
        return f"{node.op}:{target}"
    module = getattr(target, "__module__", "").lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}" if module else str(target)


def dtype_text(dtype: torch.dtype) -> str:
    """``f32`` for ``torch.float32``."""
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _prequant_op(program: Program, node: fx.Node, target: Any) -> str:
    """``dequantize<affine4:row>(codes, scale, columns=8)``: what is no required tensor by name, what is absent left
    out.
    """
    operands = []
    given = zip(target._schema.arguments, node.args, strict=False)
    for argument, value in given:
        if value is not None and value is not False and not _is_empty(value):
            plain = isinstance(argument.type, torch.TensorType)
            operands.append(("" if plain else f"{argument.name}=") + _value(program, value))
    options = dict(node.kwargs)
    format = options.pop("format", None)
    operands += [
        f"{key}={_value(program, value)}"
        for key, value in options.items()
        if value is not None and value != "" and not _is_empty(value)
    ]
    name = target._schema.name.rpartition("::")[2]
    return f"{name}<{format}>({', '.join(operands)})" if format else f"{name}({', '.join(operands)})"


def _is_empty(value: Any) -> bool:
    """Whether a list has nothing to say: operands of several linears, of which none has one."""
    return isinstance(value, (list, tuple)) and all(item is None or item is False or item == "" for item in value)


def _value(program: Program, value: Any) -> str:
    if isinstance(value, fx.Node):
        return _attribute(program, value) if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(program, item) for item in value)}]"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    if isinstance(value, slice):
        parts = (value.start, value.stop) if value.step is None else (value.start, value.stop, value.step)
        return ":".join("" if part is None else _value(program, part) for part in parts)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return str(value)


def _attribute(program: Program, node: fx.Node) -> str:
    name = str(node.target)
    value: Any = program
    for part in name.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, Tensor):
        return f"{name} [{'missing' if value is None else type(value).__name__}]"
    shape = "×".join(map(str, value.shape)) or "scalar"
    frozen = " frozen" if isinstance(value, torch.nn.Parameter) and not value.requires_grad else ""
    return f"{name} [{shape} {dtype_text(value.dtype)}{frozen}]"


def _outputs(program: Program, tree: OutputTree, node: fx.Node) -> str:
    """The output nest, with the node that each result comes from."""
    flat: Any = node.args[0]
    if not isinstance(flat, (list, tuple)):
        return _value(program, flat)
    return _nest_text(program, tree, flat)


def _nest_text(program: Program, tree: OutputTree, flat: Any) -> str:
    if tree is None:
        return "None"
    if isinstance(tree, int):
        return _value(program, flat[tree]) if tree < len(flat) else f"[missing result {tree}]"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {_nest_text(program, part, flat)}" for key, part in tree.items()) + "}"
    inner = ", ".join(_nest_text(program, part, flat) for part in tree)
    return f"[{inner}]" if isinstance(tree, list) else f"({inner})"
