"""The opaque nodes of a captured model, replaced by what a style has for them."""

from __future__ import annotations

import onnx_ir as ir

from ..errors import ExportError
from .builder import Builder
from .capture import DOMAIN
from .dense_outliers import with_outliers
from .roundings import round_dynamic, round_static
from .styles import Style


def rewrite(model: ir.Model, style: Style) -> None:
    """Replace every opaque node, in order, and drop what nothing reads any more."""
    graph = model.graph
    opaque = [node for node in graph if node.domain == DOMAIN]
    left = [str(node.attributes["weight"].value) for node in opaque if "weight" in node.attributes]
    for node in opaque:
        builder = Builder(graph)
        result = _result(builder, style, node)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], builder.nodes, node.outputs, [_typed(result, node.outputs[0])]
        )
        if "weight" in node.attributes:
            left.remove(name := str(node.attributes["weight"].value))
            if name not in left:
                style.release(name)
    _drop_unread(graph)
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.update(style.domains)


def _result(builder: Builder, style: Style, node: ir.Node) -> ir.Value:
    inputs = node.inputs
    first = inputs[0]
    assert first is not None
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Linear":
        bias = inputs[1] if len(inputs) > 1 else None
        return style.linear(builder, str(values["weight"]), first, bias, bool(values["rounded"]))
    if node.op_type == "Embedding":
        return style.embedding(builder, str(values["weight"]), first)
    if node.op_type == "RoundDynamic":
        return round_dynamic(builder, first, str(values["format"]))
    if node.op_type == "RoundStatic":
        scale, zero_point = inputs[1], inputs[2] if len(inputs) > 2 else None
        assert scale is not None
        return round_static(builder, first, scale, zero_point, str(values["format"]), f"%{node.name}")
    if node.op_type == "AddOutliers":
        return with_outliers(builder, node, bool(values["replace"]))
    raise ExportError(f"no form for {node.op_type}")


def _typed(new: ir.Value, old: ir.Value) -> ir.Value:
    new.type, new.shape = old.type, old.shape
    return new


def _drop_unread(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads, such as scales that have become constants."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
