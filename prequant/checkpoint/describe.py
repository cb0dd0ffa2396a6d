"""From a Program to its ``quantization_config``: which weights and inputs are quantized how, and whether that is all
there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from prequant.passes import Program
from prequant.passes.packed import PackedUse, packed_uses
from prequant.passes.sites import OUTLIER_PREFIX, PARTS, WEIGHT_OPERAND
from prequant.passes.weights import WeightView, weights
from prequant.runtime import WeightFormat, ops

from .config import InputSpec, OutlierSpec, QuantizationSpec, WeightSpec
from .targets import NAMESPACES
from .weight_tensors import OUTLIER_PARTS

NOT_MODULES = "not_modules"
"""Key in ``ProgramInfo.extra``: reasons, noted by passes that rewrite more than weights and inputs, why modules can't
say the same.
"""


def describe_program(program: Program) -> QuantizationSpec:
    """What ``quantization_config`` says of a Program."""
    specs: dict[str, WeightSpec] = {}
    inputs: dict[str, dict[InputSpec | None, None]] = {}
    reasons = {str(reason): None for reason in program.info.extra.get(NOT_MODULES, ())}
    packed = {use.consumer: use for use in packed_uses(program.graph)}
    explained: set[fx.Node] = {use.node for use in packed.values()}
    for view in weights(program):
        if "latent" in view.tensors:
            reasons[f"{view.name} is a latent weight: freeze it first"] = None
        elif view.tensors != {"dense": view.name}:
            specs[view.name] = _weight_spec(program, view)
        for consumer in view.consumers:
            path = module_path(consumer)
            explained |= _expression(consumer)
            quantized = _input_spec(consumer, packed.get(consumer))
            if isinstance(quantized, str):
                reasons[quantized] = None
                continue
            inputs.setdefault(path, {})[quantized] = None
            own = f"{path}.weight" in program.names_of(view.name)
            if not own and (quantized is not None or view.name in specs):
                reasons[f"{view.name} is used at {path or consumer.name}, which is not the module that owns it"] = None
    for path, kinds in inputs.items():
        if len(kinds) > 1:
            reasons[f"the calls of {path} quantize their inputs in different ways"] = None
    reasons |= dict.fromkeys(_unexplained(program, explained))
    static = {path: spec for path, (spec, *_) in inputs.items() if spec is not None}
    aliases = {name: tuple(names) for name, names in program.info.aliases.items() if names}
    return QuantizationSpec(specs, static, aliases, tuple(reasons))


def module_path(node: fx.Node) -> str:
    """The path of the module whose code a node is; empty if that is not known."""
    stack = node.meta.get("module_stack", ())
    return stack[-1][0] if stack else ""


def _weight_spec(program: Program, view: WeightView) -> WeightSpec:
    parts = {part: program.tensor(name) for part, name in view.tensors.items()}
    outliers = None
    if OUTLIER_PARTS[0] in parts:
        values, columns = parts[OUTLIER_PARTS[0]], parts[OUTLIER_PARTS[1]]
        outliers = OutlierSpec(values.numel(), values.dtype, columns.dtype, view.outliers_replace)
    floats = next(t for part, t in parts.items() if t.is_floating_point() and not part.startswith(OUTLIER_PREFIX))
    format = None if "dense" in parts else WeightFormat.parse(view.format)
    return WeightSpec(format, *view.shape, floats.dtype, outliers)


def _expression(consumer: fx.Node) -> set[fx.Node]:
    """A linear or embedding with the nodes of its weight's expression, and those that quantize its input."""
    found = {consumer}
    if consumer.target in WEIGHT_OPERAND:
        node: Any = consumer.args[WEIGHT_OPERAND[consumer.target]]
        while isinstance(node, fx.Node) and node.target in PARTS:
            found.add(node)
            node = node.args[0]
        if (input := _fake_quantized(consumer)) is not None:
            found.add(input)
            if _is_dynamic(input):
                found.add(input.args[1])  # type: ignore[arg-type]
    return found


def _fake_quantized(consumer: fx.Node) -> fx.Node | None:
    input = consumer.args[0]
    return input if isinstance(input, fx.Node) and input.target is ops.fake_quantize else None


def _is_dynamic(quantized: fx.Node) -> bool:
    input, scale, *_ = quantized.args
    return (
        isinstance(scale, fx.Node)
        and scale.target is ops.dynamic_scale
        and scale.args[0] is input
        and scale.kwargs["format"] == quantized.kwargs["format"]
    )


def _input_spec(consumer: fx.Node, use: PackedUse | None) -> InputSpec | str | None:
    """How a linear's input is quantized; None if it is not (or there is no linear), and a text where modules can't do
    it that way.
    """
    if use is not None:
        text, scale = use.operands.get("input_format", ""), use.operands.get("input_scale")
        if not text:
            return None
    else:
        quantized = _fake_quantized(consumer) if consumer.target is torch.ops.aten.linear.default else None
        if quantized is None:
            return None
        text, scale = str(quantized.kwargs["format"]), None if _is_dynamic(quantized) else quantized.args[1]
    if scale is None:
        return InputSpec(WeightFormat.parse(text))
    if not (isinstance(scale, fx.Node) and scale.op == "get_attr" and str(scale.target).endswith(".scale")):
        return f"the input of {module_path(consumer) or consumer.name} is quantized with a computed scale"
    return InputSpec(WeightFormat.parse(text), str(scale.target).removesuffix(".scale"))


def _unexplained(program: Program, explained: set[fx.Node]) -> list[str]:
    """Calls that plain modules with packed weights and quantized inputs do not make."""
    reasons = []
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.namespace == "prequant" and node not in explained:
            where = module_path(node) or node.name
            reasons.append(f"{node.target} at {where} quantizes more than the weight or input of a linear")
        elif node.target.namespace not in NAMESPACES:
            reasons.append(f"it calls {node.target}")
    return reasons
