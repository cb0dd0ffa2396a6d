"""From an opaque graph to a model of onnx_ir, by torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor, fx

from prequant.passes import Program
from prequant.passes.shapes import EXAMPLE_SIZES

from ..errors import ExportError
from .opaque import OpaqueGraph, opaque

DOMAIN = "prequant.opaque"
"""Of the ops that stand in a captured model for what a style puts there."""


def capture(graph: OpaqueGraph, opset: int, names: Sequence[str], results: Sequence[str]) -> ir.Model:
    """The model with nodes of :data:`DOMAIN` for the opaque ops; ``names`` and ``results`` are those of its inputs and
    results, dynamic axes have the names of the Program's signature.

    Raises :class:`ExportError` where torch's exporter has no translation.
    """
    inputs = graph.program.signature.inputs
    shapes = tuple({axis: size for axis, size in enumerate(item.shape) if isinstance(size, str)} for item in inputs)
    with _quiet(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                graph.module,
                _examples(graph.program),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                input_names=list(names),
                output_names=list(results),
                custom_translation_table=_TRANSLATIONS,
                verbose=False,
            )
        except Exception as error:  # whatever stops the exporter is why it can't be exported
            raise ExportError(f"torch's ONNX exporter refuses the graph: {_cause(error)}") from error
    assert exported is not None
    return exported.model


def _examples(program: Program) -> tuple[Tensor, ...]:
    """Inputs to trace with. Sizes are those of the first trace, which satisfy what the graph asks of them."""
    spare, sizes = chain(EXAMPLE_SIZES, repeat(41)), dict[str, int]()
    placeholders: list[fx.Node] = list(program.graph.find_nodes(op="placeholder"))
    for item, node in zip(program.signature.inputs, placeholders, strict=True):
        traced = getattr(node.meta.get("val"), "shape", item.shape)
        for label, size in zip(item.shape, traced, strict=True):
            if isinstance(label, str) and label not in sizes:
                hint = size.node.hint if isinstance(size, torch.SymInt) else None
                sizes[label] = int(hint) if hint is not None and int(hint) > 1 else next(spare)
    return tuple(
        torch.ones([sizes[size] if isinstance(size, str) else size for size in item.shape], dtype=item.dtype)
        for item in program.signature.inputs
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter prints: progress, and warnings about packages that have nothing to do with it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The first line of what an error was raised from in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- translations: each opaque op of torch to the node of the same name ------------------------------------------


_TYPES = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int32)", "tensor(int64)", "tensor(uint16)")


def _op(name: str, inputs: Sequence[str], optional: Sequence[str] = (), **attributes: OpSchema.AttrType) -> Any:
    parameter, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    # One type variable each: ids, columns and values need not have one type.
    formal = [parameter(each, f"T_{each}") for each in inputs]
    formal += [parameter(each, f"T_{each}", param_option=option) for each in optional]
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=formal,
        outputs=[parameter("output", "T_output")],
        type_constraints=[(f"T_{each}", _TYPES, "") for each in (*inputs, *optional, "output")],
        attributes=[OpSchema.Attribute(key, kind, "", required=True) for key, kind in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


_INT, _STRING = OpSchema.AttrType.INT, OpSchema.AttrType.STRING
_LINEAR = _op("Linear", ["input"], ["bias"], weight=_STRING, rows=_INT, rounded=_INT)
_EMBEDDING = _op("Embedding", ["ids"], weight=_STRING, columns=_INT)
_ROUND_DYNAMIC = _op("RoundDynamic", ["input"], format=_STRING)
_ROUND_STATIC = _op("RoundStatic", ["input", "scale"], ["zero_point"], format=_STRING)
_ADD_OUTLIERS = _op("AddOutliers", ["weight", "values", "columns", "row_offsets"], replace=_INT)


def _linear(input: Any, bias: Any = None, *, weight: str, rows: int, rounded: bool) -> Any:
    return _LINEAR(input, bias, weight=weight, rows=rows, rounded=int(rounded))


def _embedding(ids: Any, *, weight: str, columns: int) -> Any:
    return _EMBEDDING(ids, weight=weight, columns=columns)


def _round_dynamic(input: Any, *, format: str) -> Any:
    return _ROUND_DYNAMIC(input, format=format)


def _round_static(input: Any, scale: Any, zero_point: Any = None, *, format: str) -> Any:
    return _ROUND_STATIC(input, scale, zero_point, format=format)


def _add_outliers(weight: Any, values: Any, columns: Any, row_offsets: Any, *, replace: bool) -> Any:
    return _ADD_OUTLIERS(weight, values, columns, row_offsets, replace=int(replace))


_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    opaque.linear.default: _linear,
    opaque.embedding.default: _embedding,
    opaque.round_dynamic.default: _round_dynamic,
    opaque.round_static.default: _round_static,
    opaque.add_outliers.default: _add_outliers,
}
