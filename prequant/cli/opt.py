"""prequant opt: run any pipeline over a model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import options
from .app import command, show

CALIBRATION_TEXTS = 256


class FloatType(str, Enum):
    """Types of floats by their names in PyTorch."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@command("opt", "Run any pipeline of passes over a model.")
def opt(
    model: options.Model,
    pipeline: Annotated[
        str, typer.Option(help="Passes in text form, or the name of a YAML or JSON file that lists them.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; without it, only the reports are shown.")
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph before and after every pass, and the difference, here.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the graph after every pass.")] = True,
    timing: Annotated[bool, typer.Option("--timing", help="Show seconds and memory per pass.")] = False,
    damage: Annotated[
        bool, typer.Option("--damage", help="Show how far the outputs are from the original's after each pass.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A file of texts, for passes that can measure with inputs (allocate-bits); 256 are drawn."),
    ] = None,
    dtype: Annotated[
        FloatType | None,
        typer.Option(
            help="The type that MODEL's weights are loaded in, and computed with; ONNX takes float32 alone.",
            show_default="the one they are stored in",
        ),
    ] = None,
    reports: Annotated[
        bool, typer.Option("--reports/--no-reports", help="Show what each pass changed and kept.")
    ] = True,
) -> None:
    """Trace MODEL (or load a folder that prequant saved), run a pipeline, and save the result."""
    import torch

    from prequant.example_texts import example_batches, with_batches
    from prequant.opt import save_with_errors
    from prequant.passes import Damage, Dump, Observer, Pipeline, Timing, Verify
    from prequant.sources import (
        check_output,
        example_inputs_of,
        find_tokenizer,
        holds_program,
        load_program,
        load_tokenizer,
    )

    steps = Pipeline.read(pipeline)
    if out is not None:
        check_output(out, *(() if holds_program(model) else (model,)))
    program = load_program(model, None if dtype is None else getattr(torch, dtype.value))
    tokenizer = find_tokenizer(model)
    measured: list[Timing | Damage] = [
        *([Timing()] if timing else []),
        *([Damage(example_inputs_of(program, tokenizer))] if damage else []),
    ]
    watching: list[Observer] = [*([Verify()] if verify else []), *([Dump(dump)] if dump else []), *measured]
    given = steps
    if calibration is not None:
        batches = example_batches(program, load_tokenizer(model), calibration, texts=CALIBRATION_TEXTS)
        given = with_batches(steps, batches)
    result = given(program, watching)
    if reports:
        for report in result.reports[len(program.reports) :]:
            show(report.table(brief=True))
    for observer in measured:
        show(observer.table())
    if out is not None:
        given_settings = {"calibration": calibration, "dtype": None if dtype is None else dtype.value}
        save_with_errors(result, program, model, out, tokenizer, steps, given_settings)
        show(f"saved to {out}")
