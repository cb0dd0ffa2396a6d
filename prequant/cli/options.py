"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub name.", show_default=False)]
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that prequant saved.")]
Out = Annotated[Path, typer.Option("--out", help="The folder to write.")]
TaskName = Annotated[str, typer.Option("--task", help="The task, such as sst2; 'prequant tasks' lists them.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A folder with train.* and validation.* (parquet, csv, tsv, json lines, text; .gz or not), one file with "
        "a 'split' column, train=FILE,validation=FILE, a data set on the hub, or 'sample' for the sentences that "
        "prequant ships. Without it, the task's own data set on the hub.",
    ),
]
Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any option of the recipe (see 'prequant recipes'); repeat for several."
    ),
]
RecipeEpochs = Annotated[
    float | None, typer.Option("--epochs", help="Passes over the training set.", show_default="the recipe's")
]
RecipeBatchSize = Annotated[
    int | None, typer.Option("--batch-size", help="Examples per step.", min=1, show_default="the recipe's")
]
AdapterFile = Annotated[
    Path | None, typer.Option("--adapter", help="A file that 'prequant adapt' wrote for this folder.")
]
Epochs = Annotated[float, typer.Option(help="Passes over the training set.")]
BatchSize = Annotated[int, typer.Option(help="Examples at a time.", min=1)]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="the method's own")]
ScaleLearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate of scales, zero points and alphas, relative to their mean magnitude.",
        show_default="the method's own",
    ),
]
HeadLearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate of the task head.", show_default="--learning-rate if given, else the method's own"
    ),
]
Dropout = Annotated[
    bool | None,
    typer.Option(
        "--dropout/--no-dropout",
        help="Whether training drops what the model's configuration says.",
        show_default="the method's own",
    ),
]
MaxSteps = Annotated[
    int,
    typer.Option(help="Stop after so many steps; -1 for all epochs, or the steps of a method that counts in these."),
]
EvalSteps = Annotated[
    int | None,
    typer.Option(help="Score the model every so many steps and keep the best state.", show_default="the last"),
]
RecipeEvalSteps = Annotated[
    int | None,
    typer.Option(
        "--eval-steps",
        help="Score the model every so many steps and keep the best state; 0 keeps the last.",
        show_default="the recipe's",
    ),
]
SaveSteps = Annotated[
    int,
    typer.Option(
        help="Keep the training's state every so many steps, in OUT.unfinished: the same command goes on from there "
        "after it was killed; 0 keeps nothing (of mrem, the modules that are finished).",
        min=0,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="What training computes products in: float32, or bfloat16, faster where the processor has it.",
        show_default="float32",
    ),
]
MaxLength = Annotated[int, typer.Option(help="Cut texts to so many tokens.")]
Seed = Annotated[int, typer.Option(help="Seed of head, order and dropout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
