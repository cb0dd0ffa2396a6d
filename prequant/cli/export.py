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
    PT2 = "pt2"
    AOTI = "aoti"


class Style(str, Enum):
    """How ONNX has packed weights."""

    QDQ = "qdq"
    MATMULNBITS = "matmulnbits"


def _onnx(program: Program, out: Path, **settings: Any) -> object:
    from prequant.export import export_onnx

    return export_onnx(program, out, **settings).table()


def _pt2(program: Program, out: Path, **settings: Any) -> object:
    from prequant.export import export_pt2

    return _written(ExportFormat.PT2, export_pt2, program, out, settings)


def _aoti(program: Program, out: Path, **settings: Any) -> object:
    from prequant.export import export_aoti

    return _written(ExportFormat.AOTI, export_aoti, program, out, settings)


def _written(
    format: ExportFormat, write: Callable[[Program, Path], Path], program: Program, out: Path, settings: dict[str, Any]
) -> str:
    from prequant.export import ExportError
    from prequant.measure import tensor_bytes

    for name in settings:
        raise ExportError(f"--{name.replace('_', '-')} is for --format onnx, not {format.value}")
    written = write(program, out)
    return f"{written}: {written.stat().st_size:,} bytes, of {tensor_bytes(program):,} bytes of tensors"


WRITERS: dict[ExportFormat, Callable[..., object]] = {
    ExportFormat.ONNX: _onnx,
    ExportFormat.PT2: _pt2,
    ExportFormat.AOTI: _aoti,
}
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
    """Write what a folder holds, its weights packed, as an ONNX model, a torch.export archive (pt2) or a package of
    AOTInductor (aoti).
    """
    from prequant.checkpoint import load
    from prequant.sources import check_output_file

    check_output_file(out)
    given = {
        "style": None if style is None else style.value,
        "opset": opset,
        "accuracy_level": accuracy_level,
        "cache": cache,
        "external_over": external_over,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    show(WRITERS[format](load(folder), out, **settings))
