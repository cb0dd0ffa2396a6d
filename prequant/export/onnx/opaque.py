"""A Program's graph with every use of a packed weight as one opaque op, which torch's exporter carries through.

::

    packed_linear(x, codes, ..., bias, activation, residual)   add(gelu(linear(x', bias, weight=name)), residual)
    packed_linears(x, [codes, ...], ...)                       one linear for each
    packed_embedding(ids, codes, ...)                          embedding(ids, weight=name)
    fake_quantize(x, dynamic_scale(x), None)                   round_dynamic(x)
    fake_quantize(x, scale, zero_point)                        round_static(x, scale, zero_point)

The weights' tensors are no part of that graph: nothing can fold or unpack them. What stands for the ops in a style is
put there afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prequant.passes import Lower, Pipeline, Program
from prequant.passes.nesting import leaves
from prequant.passes.packed import PackedUse, packed_weight_name, uses_in
from prequant.passes.weights import WeightView, weights
from prequant.runtime import Granularity, Scheme, WeightFormat, ops

from ..errors import ExportError

aten = torch.ops.aten

library = torch.library.Library("prequant_export", "DEF")
SCHEMAS = {
    "linear": "(Tensor input, Tensor? bias, *, str weight, int rows, bool rounded) -> Tensor",
    "embedding": "(Tensor ids, *, str weight, int columns) -> Tensor",
    "round_dynamic": "(Tensor input, *, str format) -> Tensor",
    "round_static": "(Tensor input, Tensor scale, Tensor? zero_point, *, str format) -> Tensor",
    "add_outliers": "(Tensor weight, Tensor values, Tensor columns, Tensor row_offsets, *, bool replace) -> Tensor",
}
"""``rounded``: the product is to round its input to 8 bits itself. They have shapes and no kernels: they exist to be
exported."""
_FLOAT32 = (
    "only Programs of float32 can be exported; make it of the model in float32 ('prequant opt --dtype float32', or "
    "from_pretrained(..., dtype=torch.float32))"
)
for _op, _schema in SCHEMAS.items():
    library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("prequant_export::linear", lib=library)
def _(input: Tensor, bias: Tensor | None, *, weight: str, rows: int, rounded: bool) -> Tensor:
    return input.new_empty((*input.shape[:-1], rows))


@torch.library.register_fake("prequant_export::embedding", lib=library)
def _(ids: Tensor, *, weight: str, columns: int) -> Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=torch.float32)


@torch.library.register_fake("prequant_export::round_dynamic", lib=library)
def _(input: Tensor, *, format: str) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("prequant_export::round_static", lib=library)
def _(input: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str) -> Tensor:
    return torch.empty_like(input)


@torch.library.register_fake("prequant_export::add_outliers", lib=library)
def _(weight: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, *, replace: bool) -> Tensor:
    return torch.empty_like(weight)


opaque = torch.ops.prequant_export


@dataclass(frozen=True)
class OpaqueGraph:
    """``program``: what was exported, every weight lowered; ``module``: its graph over opaque ops; ``weights``: by the
    names that these carry.
    """

    program: Program
    module: fx.GraphModule
    weights: Mapping[str, WeightView]


def lowered(program: Program) -> Program:
    """The program in eval mode with every weight expression as a packed op; it shares all tensors.

    Raises :class:`ExportError` for a weight that is neither codes nor floats, for tensors that are not float32 or not
    on the CPU; :class:`~prequant.passes.PassError` for inputs without scales.
    """
    held = [*program.named_parameters(), *program.named_buffers()]
    if any(tensor.device.type != "cpu" for _, tensor in held):
        raise ExportError("the Program is not on the CPU: move it there before it is exported")
    result = Pipeline([Lower()])(program.copy().train(False))
    result.planned = False
    for view in weights(result):
        consumer = view.consumers[0].name
        if "latent" in view.tensors:
            raise ExportError(f"{view.name} (%{consumer}, {view.format}) is a latent weight, not codes: freeze first")
        if not view.lowered and "dense" not in view.tensors:
            raise ExportError(f"{view.name} (%{consumer}, {view.format}) can't be lowered: no style has a form for it")
        _check_dtypes(result, view)
    names = {name for view in weights(result) for name in view.tensors.values()}
    for name, tensor in held:
        if tensor.is_floating_point() and tensor.dtype is not torch.float32 and name not in names:
            raise ExportError(f"{name} is of {_dtype(tensor)}: {_FLOAT32}")
    return result


def _check_dtypes(program: Program, view: WeightView) -> None:
    """Whether a weight, and what its product gives, is float32; outliers alone may be stored narrower."""
    part = next(part for part in ("dense", "alphas", "scale") if part in view.tensors)
    node = view.consumers[0]
    for value in (program.tensor(view.tensors[part]), node.meta.get("val")):
        if isinstance(value, Tensor) and value.dtype is not torch.float32:
            where = f"{view.name} (%{node.name}, {view.format})"
            raise ExportError(f"{where} is of {_dtype(value)}: {_FLOAT32}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def opaque_graph(program: Program, level_4: bool) -> OpaqueGraph:
    """The opaque form of a Program that :func:`lowered` returned.

    ``level_4``: products round their inputs to 8 bits themselves where that is all the quantization they have.
    """
    program = program.copy()
    graph = program.graph
    found = {view.name: view for view in weights(program)}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (ops.packed_linear, ops.packed_linears, ops.packed_embedding):
            for use in uses_in(node):
                _open(use, found[packed_weight_name(use)], level_4)
            if node.target is ops.packed_linears and not any(user.users for user in node.users):
                for user in list(node.users):
                    graph.erase_node(user)
            if not node.users:
                graph.erase_node(node)
        elif node.target is ops.fake_quantize:
            _replace(node, _rounded(node, *_three(node.args), str(node.kwargs["format"])))
        elif node.target is ops.add_outliers:
            with graph.inserting_before(node):
                new = graph.call_function(opaque.add_outliers.default, node.args, dict(node.kwargs))
            _replace(node, new)
    graph.eliminate_dead_code()
    if left := [node for node in graph.nodes if str(node.target).startswith("prequant.")]:
        raise ExportError(f"%{left[0].name} ({left[0].target}) has no form in ONNX")
    module = fx.GraphModule(program, graph)
    packed = {name: view for name, view in found.items() if view.lowered}
    return OpaqueGraph(program, module, packed)


def _replace(old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _open(use: PackedUse, view: WeightView, level_4: bool) -> None:
    """Put the ops of one use of a weight before its node, and have all that reads the result read theirs."""
    node, operands, graph = use.node, use.operands, use.node.graph
    if use.kind == "embedding":
        if operands["dtype"] not in (None, torch.float32):
            raise ExportError(f"{view.name} (%{node.name}, {view.format}): rows of {operands['dtype']}, not float32")
        with graph.inserting_before(node):
            options: dict[str, Any] = {"weight": view.name, "columns": view.shape[1]}
            use.consumer.replace_all_uses_with(
                graph.call_function(opaque.embedding.default, (operands["ids"],), options)
            )
        return
    if use.consumer is node and node.target is ops.packed_linears:
        return  # nothing takes this result
    input, text = operands["input"], str(operands["input_format"])
    scale = operands["input_scale"]
    rounded = level_4 and scale is None and text == "affine8:row"
    if text and not rounded:
        input = _rounded(node, input, scale, operands["input_zero_point"], text)
    options = {"weight": view.name, "rows": view.shape[0], "rounded": rounded}
    with graph.inserting_before(node):
        result = graph.call_function(opaque.linear.default, (input, operands["bias"]), options)
        activation = str(operands["activation"])
        if activation == "relu":
            result = graph.call_function(aten.relu.default, (result,))
        elif activation:
            approximate = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
            result = graph.call_function(aten.gelu.default, (result,), {"approximate": approximate})
        if operands.get("residual") is not None:
            result = graph.call_function(aten.add.Tensor, (result, operands["residual"]))
    use.consumer.replace_all_uses_with(result)


def _three(args: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    input, scale, zero_point = args
    return input, scale, zero_point


def _rounded(before: fx.Node, input: Any, scale: Any, zero_point: Any, text: str) -> fx.Node:
    """The node that rounds ``input``, one for all that round it alike."""
    dynamic = scale is None or (scale.target is ops.dynamic_scale and scale.args[0] is input)
    if dynamic:
        format = WeightFormat.parse(text)
        if format.scheme is not Scheme.AFFINE or format.granularity is Granularity.GROUP or not format.symmetric:
            raise ExportError(f"%{before.name} quantizes its input to {text}, for which ONNX has no dynamic form")
    op = opaque.round_dynamic.default if dynamic else opaque.round_static.default
    args = (input,) if dynamic else (input, scale, zero_point)
    for user in input.users:
        if user.target is op and user.args == args and user.kwargs["format"] == text and user < before:
            return user
    with before.graph.inserting_before(before):
        return before.graph.call_function(op, args, {"format": text})


def result_names(program: Program) -> tuple[str, ...]:
    """A name for every flat result: keys of the model's output class, with numbers where it nests; exposed values
    under their own.
    """
    output: Any = program.graph.output_node().args[0]
    names = [f"output_{i}" for i in range(len(output) if isinstance(output, (list, tuple)) else 1)]
    _name(program.signature.outputs, "", names)
    for name, index in program.signature.exposed.items():
        names[index] = name
    taken = set(program.signature.names)
    return tuple(f"{name}_out" if name in taken else name for name in names)


def _name(tree: Any, path: str, names: list[str]) -> None:
    if isinstance(tree, int):
        names[tree] = path or "output"
    elif tree is not None:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, part in items:
            if tuple(leaves(part)):
                _name(part, f"{path}.{key}" if path else (key if isinstance(key, str) else f"output_{key}"), names)
