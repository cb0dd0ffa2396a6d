"""prequant export: a folder's Program as a file that other runtimes run."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .app import command, show

if TYPE_CHECKING:
    from prequant.passes import Program


class ExportFormat(str, Enum):
    """Formats by the name that ``--format`` knows them by."""

    ONNX = "onnx"


class Style(str, Enum):
    """How ONNX has packed weights."""

    QDQ = "qdq"
    MATMULNBITS = "matmulnbits"


def _onnx(program: Program, out: Path, **settings: Any) -> object:
    from prequant.export import export_onnx

    return export_onnx(program, out, **settings).table()


WRITERS: dict[ExportFormat, Callable[..., object]] = {ExportFormat.ONNX: _onnx}
"""What writes each format: from a Program, a path and those of the command's options that were given to what is shown.
A format refuses an option that it has no use for."""


def _list(wanted: bool) -> None:
    if wanted:
        from prequant.export.onnx.support import support_table

        show(support_table())
        raise typer.Exit


@command("export", "Write a folder as a file for another runtime.")
def export(
    folder: options.Folder,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    format: Annotated[ExportFormat, typer.Option("--format", help="The file's format.")] = ExportFormat.ONNX,
    style: Annotated[
        Style | None,
        typer.Option(
            help="onnx: DequantizeLinear before MatMul (portable), or ONNX Runtime's operators on packed codes.",
            show_default="matmulnbits",
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="onnx: the operator set, 21 to 25.", show_default="21")] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            help="onnx, matmulnbits: 4 rounds the inputs of products to 8 bits, 0 computes in float32.",
            show_default="4 where the folder's inputs have 8 bits, else 0",
        ),
    ] = None,
    cache: Annotated[
        bool | None,
        typer.Option(
            "--cache/--no-cache",
            help="onnx: export a model that generates with past and present keys and values.",
            show_default="cache",
        ),
    ] = None,
    external_over: Annotated[
        int | None,
        typer.Option(
            help="onnx: with more bytes of tensors than this, they go into OUT.data.", show_default="just below 2 GiB"
        ),
    ] = None,
    support: Annotated[
        bool,
        typer.Option("--support", callback=_list, is_eager=True, help="Show what ONNX has a form for, and exit."),
    ] = False,
) -> None:
    """Write what a folder holds as an ONNX model whose weights stay packed."""
    from prequant.checkpoint import load

    given = {
        "style": None if style is None else style.value,
        "opset": opset,
        "accuracy_level": accuracy_level,
        "cache": cache,
        "external_over": external_over,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    show(WRITERS[format](load(folder), out, **settings))
