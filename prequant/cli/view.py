"""prequant view: a page, or a picture, of a model's graph and of what a pipeline makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .app import command, show


@command("view", "Show a model's graph, weights and errors as a page or a picture.")
def view(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="The file to write, such as graph.html.")],
    pipeline: Annotated[
        str | None,
        typer.Option(help="Passes to run and to step through: text, or the name of a YAML or JSON file."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="The float model that a compressed folder was made of, for its errors."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file of texts to measure errors and times on, or 'sample' for the sentences that prequant ships.",
            show_default="two short texts",
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Run the model on a batch.")] = True,
    format: Annotated[
        str | None,
        typer.Option(help="html, svg, png or dot; pictures show what the passes end with.", show_default="by --out"),
    ] = None,
    colour: Annotated[
        str,
        typer.Option(help="What boxes of svg and png are coloured by: bits, weights, values (errors), bytes, time."),
    ] = "bits",
    depth: Annotated[
        int | None,
        typer.Option(help="Levels of blocks that svg and png open.", min=0, show_default="down to the layers"),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML file that shows MODEL (or a folder that prequant saved) as blocks that open into nodes, each
    weight's bits, bytes and error, and what each pass changed. It needs no network.
    """
    from prequant.passes import Pipeline
    from prequant.passes.config import FILE_TYPES
    from prequant.sources import check_output_file
    from prequant.view import check_format, write_page, write_picture
    from prequant.view.build import record_model

    kind = format or out.suffix.removeprefix(".").lower()
    check_format(kind, colour)
    check_output_file(out)
    steps = None
    if pipeline is not None:
        steps = Pipeline.load(pipeline) if pipeline.lower().endswith(FILE_TYPES) else Pipeline.parse(pipeline)
    record = record_model(model, steps, against, data, measure, progress=not quiet)
    if kind == "html":
        write_page(record, out)
    else:
        write_picture(record, out, kind, colour, depth)
    for note in record.notes:
        show(note)
    show(f"wrote {out}")
