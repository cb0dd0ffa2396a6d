"""prequant adapt: another task on a compressed base, as a small file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .app import command, show


@command("adapt", "Tune a compressed base for another task, into a small file.")
def adapt(
    base: options.Folder,
    out: Annotated[Path, typer.Option("--out", help="The file to write, such as sst2.safetensors.")],
    task: options.TaskName,
    data: options.Data = None,
    recipe: Annotated[
        str | None, typer.Option(help="The method.", show_default="the one that makes such weights")
    ] = None,
    set_: options.Set = [],  # noqa: B006
    epochs: options.RecipeEpochs = None,
    batch_size: options.RecipeBatchSize = None,
    learning_rate: options.LearningRate = None,
    head_learning_rate: options.HeadLearningRate = None,
    scale_learning_rate: options.ScaleLearningRate = None,
    dropout: options.Dropout = None,
    max_steps: options.MaxSteps = -1,
    eval_steps: options.RecipeEvalSteps = None,
    save_steps: options.SaveSteps = 0,
    precision: options.Precision = None,
    max_length: options.MaxLength = 128,
    seed: options.Seed = 42,
    quiet: options.Quiet = False,
) -> None:
    """Tune what is trainable of a compressed folder for another task, and write that alone: the folder stays as it is
    and serves all its tasks.
    """
    from dataclasses import replace

    from prequant.adapt import adapt as run
    from prequant.adapt import load_base, recipe_for
    from prequant.recipes import TuningRecipe, recipe_type
    from prequant.runtime import PrequantError
    from prequant.tasks import task as find_task

    from .settings import assignments, trained_with, with_fields

    chosen = recipe_for(load_base(base)) if recipe is None else recipe_type(recipe)()
    rates = (learning_rate, head_learning_rate, scale_learning_rate)
    training = trained_with(chosen.training, epochs, batch_size, rates, dropout, max_steps, eval_steps, precision, seed)
    chosen = with_fields(replace(chosen, training=training), assignments(set_))
    if not isinstance(chosen, TuningRecipe):
        raise PrequantError(f"the recipe {chosen.name!r} trains whole models: it tunes nothing on a base")
    report = run(
        base, find_task(task), data, out, chosen, max_length=max_length, save_steps=save_steps, progress=not quiet
    )
    show(report.table())
    show(f"saved to {out}")
