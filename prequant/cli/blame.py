"""prequant blame: which weights cost the accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .app import command, show


@command("blame", "Show which weights cost the accuracy.")
def blame(
    model: options.Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="A file of texts: lines, or a table with a column of texts. With --task, the task's data: a folder, "
            "file, hub name, or 'sample'; without it, those on the hub."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task whose training texts are read, without their labels.")
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What MODEL, a compressed folder, was made of: a float model."),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="Compress MODEL by these passes, in text form or from a YAML or JSON file; nothing is saved."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file, too.")] = None,
    texts: Annotated[int, typer.Option(help="How many texts to look at.", min=1)] = 128,
    advise: Annotated[int, typer.Option(help="How many of the worst weights to try wider codes for.", min=0)] = 3,
    batch_size: options.BatchSize = 32,
    max_length: Annotated[
        int | None, typer.Option(help="Cut texts to so many tokens.", show_default="128, or as many as the model takes")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of which texts are drawn.")] = 42,
    quiet: options.Quiet = False,
) -> None:
    """Compress each weight of a model alone, and restore each alone, and show what the model's outputs say to it.

    MODEL is a compressed folder, with --original, or a model to compress by --pipeline.
    """
    from contextlib import nullcontext

    from prequant.blame import BlameError
    from prequant.blame import blame as run
    from prequant.checkpoint import load
    from prequant.example_texts import example_batches, with_batches
    from prequant.measure import write_json
    from prequant.passes import Canonicalize, Pipeline, Program
    from prequant.quiet import no_progress_bars
    from prequant.sources import (
        canonical_program,
        check_output_file,
        find_tokenizer,
        load_model_like,
        load_program,
        load_tokenizer,
    )
    from prequant.tasks import task as find_task

    if (original is None) == (pipeline is None):
        raise BlameError("give either --original, the float model, or --pipeline, what to compress MODEL by")
    if out is not None:
        check_output_file(out)
    found = None if task is None else find_task(task)
    steps = None if pipeline is None else Pipeline.read(pipeline)
    with no_progress_bars() if quiet else nullcontext():
        if steps is None:
            program: Program = load(Path(model))
            exact: Program = canonical_program(load_model_like(str(original), program), find_tokenizer(str(original)))
        else:
            program = load_program(model)
            exact = Canonicalize()(program)
        batches = example_batches(
            program,
            load_tokenizer(model),
            data,
            task=found,
            texts=texts,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
            progress=not quiet,
        )
        if steps is not None:
            program = with_batches(steps, batches)(program)
        report = run(program, exact, batches, advise=advise, progress=not quiet)
    show(report.table())
    for advice in report.advice:
        show(str(advice))
    if out is not None:
        write_json(out, report.to_dict())
        show(f"written to {out}")
