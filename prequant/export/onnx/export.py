"""export_onnx: from a Program to a file that ONNX Runtime, or another runtime of ONNX, runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import onnx_ir as ir
from rich.table import Table

from prequant.passes import Program
from prequant.passes.weights import WeightView

from ..errors import ExportError
from .capture import capture
from .files import LARGEST, write
from .matmulnbits import MatMulNBits
from .opaque import lowered, opaque_graph
from .parts import Part, parts_of
from .qdq import QDQ
from .rewrite import rewrite
from .styles import Style, StyleName

OPSETS = range(21, 26)
"""ONNX opsets that can be exported: before 21 there are no 4-bit types, and after 25 torch has no translations."""
ACCURACY_LEVELS = (0, 1, 4)


@dataclass(frozen=True)
class ExportedWeight:
    """What became of one weight."""

    name: str
    kind: str
    format: str
    mapping: str
    input_format: str


@dataclass(frozen=True)
class Exported:
    """``files``: all that were written, the models first to last with their data; ``weights``: every packed weight."""

    files: tuple[Path, ...]
    weights: tuple[ExportedWeight, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files)

    def table(self) -> Table:
        """Format by format: how many weights, and what they became."""
        table = Table(title=f"{', '.join(path.name for path in self.files)}: {self.bytes:,} bytes")
        for heading in ("weights", "format", "inputs", "in ONNX"):
            table.add_column(heading, justify="right" if heading == "weights" else "left")
        counts: dict[tuple[str, str, str], int] = {}
        for weight in self.weights:
            key = weight.format, weight.input_format or "float32", weight.mapping
            counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            table.add_row(str(count), *key)
        return table


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    style: StyleName = "matmulnbits",
    opset: int = 21,
    accuracy_level: int | None = None,
    cache: bool = True,
    external_over: int = LARGEST,
) -> Exported:
    """Write a Program, simulated or lowered, as an ONNX model in which every packed weight stays packed.

    ``style``: ``qdq`` (DequantizeLinear before MatMul, portable) or ``matmulnbits`` (ONNX Runtime's operators on packed
    codes). ``accuracy_level`` of ``matmulnbits``: 4 has ONNX Runtime round the inputs of products to 8 bits (a scale
    for each block of a token); 0 computes in float32. By default it is 4 where the Program's inputs have 8 bits, and 0
    elsewhere. ``cache``: a Program that generates becomes the graph that does, with past and present keys and values;
    for a seq2seq model two, ``NAME.encoder.onnx`` and ``NAME.decoder.onnx``. Where tensors take more than
    ``external_over`` bytes, they go into ``NAME.onnx.data`` beside the model.

    Raises :class:`ExportError` for what can't be exported, with the node and its format, before anything is written.
    """
    path = Path(path)
    _check(path, style, opset, accuracy_level, external_over)
    level_4 = style == "matmulnbits" and accuracy_level in (None, 4)
    models: dict[Path, ir.Model] = {}
    exported: dict[str, ExportedWeight] = {}
    parts = [(part, lowered(part.program)) for part in parts_of(program, cache)]
    for part, form in parts:
        graph = opaque_graph(form, level_4)
        made = _style(style, graph.weights, opset, accuracy_level)
        made.check()
        model = capture(graph, opset, part.inputs, part.results)
        rewrite(model, made)
        for name, mapping in made.mappings.items():
            view = graph.weights[name]
            exported[name] = ExportedWeight(name, view.kind, view.format, mapping, view.input_format)
        _sign(model, style)
        models[_path(path, part)] = model
    return Exported(write(models, external_over), tuple(exported.values()))


def _check(path: Path, style: str, opset: int, accuracy_level: int | None, external_over: int) -> None:
    if path.suffix != ".onnx":
        raise ExportError(f"an ONNX model is a file NAME.onnx, not {path}")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; the model's file belongs there")
    if style not in get_args(StyleName):
        raise ExportError(f"style={style!r}: it is one of {', '.join(get_args(StyleName))}")
    if opset not in OPSETS:
        raise ExportError(f"opset={opset}: it is one of {OPSETS.start} to {OPSETS.stop - 1}")
    if accuracy_level is not None and style != "matmulnbits":
        raise ExportError(f"accuracy_level={accuracy_level} is an option of the style matmulnbits, not of {style}")
    if accuracy_level is not None and accuracy_level not in ACCURACY_LEVELS:
        raise ExportError(f"accuracy_level={accuracy_level}: it is one of {', '.join(map(str, ACCURACY_LEVELS))}")
    if external_over > LARGEST or external_over < 0:
        raise ExportError(f"external_over={external_over}: it is from 0 to {LARGEST} bytes, protobuf's limit")


def _style(name: StyleName, weights: Mapping[str, WeightView], opset: int, accuracy_level: int | None) -> Style:
    return QDQ(weights, opset) if name == "qdq" else MatMulNBits(weights, opset, accuracy_level)


def _path(path: Path, part: Part) -> Path:
    return path.with_name(f"{path.stem}{part.suffix}{path.suffix}")


def _sign(model: ir.Model, style: str) -> None:
    from importlib.metadata import version

    model.producer_name, model.producer_version = "prequant", version("prequant")
    model.graph.name = "prequant"
    model.metadata_props["prequant.style"] = style
    for node in model.graph:  # the exporter notes where in whose sources each comes from
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
