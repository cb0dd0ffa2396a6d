"""prequant compress: a model and a task in, a compressed folder and a comparison out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .app import command, show


@command("compress", "Compress a model for a task and compare it with the float one.")
def compress(
    model: options.Model,
    out: options.Out,
    task: Annotated[
        str | None,
        typer.Option(
            help="The task, such as sst2; 'prequant tasks' lists them. Only mrem can do without.", show_default=False
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="The method: prequant, alphatuning, xtc or mrem.")] = "prequant",
    data: options.Data = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Bits per weight, 1 to 8; xtc: also 32, float weights.", show_default="the recipe's"),
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="What shares a scale: tensor, row or group.", show_default="the recipe's")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How scales are chosen: minmax, percentile, mse, sigma, hqq, lsq.", show_default="the recipe's"
        ),
    ] = None,
    outlier_ratio: Annotated[
        float | None,
        typer.Option(help="Share of the weights kept as trainable outliers.", show_default="the recipe's"),
    ] = None,
    activation_bits: Annotated[
        int | None,
        typer.Option(help="Bits of the inputs of linears; 0 leaves them in float.", show_default="the recipe's"),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Numbers of the layers to keep, counted from 0: 1,3,5.", show_default="all of them"),
    ] = None,
    modules: Annotated[
        int | None, typer.Option(help="How many modules mrem cuts the model into.", show_default="the recipe's")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="A file of texts that mrem looks at.", show_default="those of the task's training set"),
    ] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="All modules at once: under torchrun, each in a process of its own.")
    ] = False,
    set_: options.Set = [],  # noqa: B006
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="Whether anything trains once the model is compressed.")
    ] = True,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What to compare with: the float model fine-tuned on the same budget (train) or as it is (given), "
            "the folder of one fine-tuned before, or none. Of a recipe that distils, train makes the teacher first.",
            show_default="train; given where the model is the teacher",
        ),
    ] = None,
    baseline_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of the float model.", show_default="5e-5")
    ] = None,
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
    adapter: Annotated[
        Path | None, typer.Option(help="Also write what was trained to this file, to choose it beside other tasks.")
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Compress MODEL for a task, compare it with the float model, and save it to a folder."""
    from dataclasses import replace

    from prequant.compress import compress as run
    from prequant.compress import default_baseline_training
    from prequant.recipes import MREM, StagedRecipe, recipe_type
    from prequant.reconstruct import reconstruct
    from prequant.runtime import PrequantError
    from prequant.tasks import task as find_task

    from .settings import assignments, trained_with, with_fields

    given = {
        "bits": bits,
        "granularity": granularity,
        "strategy": strategy,
        "outlier_ratio": outlier_ratio,
        "activation_bits": activation_bits,
        "modules": modules,
        "parallel": parallel or None,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if keep is not None:
        if not keep.strip():
            raise PrequantError("--keep '' names no layer: write numbers from 0, such as 1,3,5")
        settings["keep"] = f"[{keep}]"  # as YAML has lists
    settings |= assignments(set_)
    if not train:
        settings["train"] = ()
    chosen = recipe_type(recipe)()
    rates = (learning_rate, head_learning_rate, scale_learning_rate)
    training = trained_with(chosen.training, epochs, batch_size, rates, dropout, max_steps, eval_steps, precision, seed)
    compared = default_baseline_training(training)
    if baseline_learning_rate is not None:
        compared = replace(compared, learning_rate=baseline_learning_rate)
    chosen = with_fields(replace(chosen, training=training), settings)
    found = None if task is None else find_task(task)
    if isinstance(chosen, MREM):
        refused = {
            "--adapter": adapter is not None,
            "--baseline": baseline not in (None, "given"),
            "--baseline-learning-rate": baseline_learning_rate is not None,
            "--dropout": dropout is True,
            "--head-learning-rate": head_learning_rate is not None,
        }
        if wrong := [option for option, given in refused.items() if given]:
            raise PrequantError(
                f"mrem does not take {', '.join(wrong)}: it compares with the model as it is given, makes no adapter, "
                "and learns without dropout, the head at the rate of all"
            )
        made = reconstruct(
            model,
            chosen,
            out,
            calibration=calibration,
            task=found,
            data=data,
            max_length=max_length,
            save_steps=save_steps,
            progress=not quiet,
        )
        if made is not None:  # by the first process, where there are several
            show(made.table())
            show(made.modules_table())
            show(f"saved to {out}")
        return
    if found is None:
        raise PrequantError(f"--task is missing: {chosen.name} trains for a task; 'prequant tasks' lists them")
    if calibration is not None:
        raise PrequantError(f"--calibration is for mrem: {chosen.name} reads the task's data")
    assert isinstance(chosen, StagedRecipe)
    report = run(
        model,
        chosen,
        found,
        data,
        out,
        baseline=baseline,
        baseline_training=compared,
        adapter=adapter,
        max_length=max_length,
        save_steps=save_steps,
        progress=not quiet,
    )
    show(report.table())
    show(f"saved to {out}")
