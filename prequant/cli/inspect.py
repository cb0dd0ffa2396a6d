"""prequant inspect: what the weights of a folder are."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .app import command, show


@command("inspect", "Show format, size and error of every weight.")
def inspect(
    folder: options.Folder,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="The original: measure the error now, instead of showing what was recorded at saving."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show format, shape, bytes and error of every weight, and the totals."""
    from json import dumps

    from prequant.checkpoint import load
    from prequant.inspection import other_bytes, rows_to_json, weight_rows, weight_table
    from prequant.measure import weight_bytes
    from prequant.report_file import recorded_errors
    from prequant.sources import canonical_program, find_tokenizer, load_model_like

    program = load(folder)
    original, recorded = None, None
    if against is not None:
        original = canonical_program(load_model_like(against, program), find_tokenizer(against))
    else:
        recorded = recorded_errors(folder)
    rows, other, on_disk = weight_rows(program, original, recorded), other_bytes(program), weight_bytes(folder)
    if json:
        print(dumps({"weights": rows_to_json(rows), "other_bytes": other, "on_disk": on_disk}, indent=1))
        return
    show(weight_table(rows, other, on_disk))
    if any(row.is_compressed for row in rows) and all(row.sqnr is None for row in rows):
        show("no errors were recorded for these weights; --against MODEL measures them")
