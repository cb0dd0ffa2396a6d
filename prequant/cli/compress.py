"""prequant compress: a model and a task in, a compressed folder and a comparison out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prequant.runtime import PrequantError

from . import options
from .app import command, show

if TYPE_CHECKING:
    from prequant.recipes import Recipe


@command("compress", "Compress a model for a task and compare it with the float one.")
def compress(
    model: options.Model,
    out: options.Out,
    task: options.TaskName,
    recipe: Annotated[str, typer.Option(help="The method: prequant or alphatuning.")] = "prequant",
    data: options.Data = None,
    bits: Annotated[int | None, typer.Option(help="Bits per weight, 1 to 8.", show_default="the recipe's")] = None,
    granularity: Annotated[
        str | None, typer.Option(help="What shares a scale: tensor, row or group.", show_default="the recipe's")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="How scales are chosen: minmax, percentile, mse, sigma, hqq.", show_default="the recipe's"),
    ] = None,
    outlier_ratio: Annotated[
        float | None,
        typer.Option(help="Share of the weights kept as trainable outliers.", show_default="the recipe's"),
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any option of the recipe (see 'prequant recipes'); repeat for several."
        ),
    ] = [],  # noqa: B006
    train: Annotated[bool, typer.Option("--train/--no-train", help="Whether stage 2 trains.")] = True,
    baseline: Annotated[
        str,
        typer.Option(
            help="What to compare with: the float model fine-tuned on the same budget (train) or as it is (given), "
            "the folder of one fine-tuned before, or none."
        ),
    ] = "train",
    baseline_learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate of the float model.", show_default="5e-5")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training set.", show_default="the recipe's")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per step.", min=1, show_default="the recipe's")
    ] = None,
    learning_rate: options.LearningRate = None,
    head_learning_rate: options.HeadLearningRate = None,
    scale_learning_rate: options.ScaleLearningRate = None,
    dropout: options.Dropout = None,
    max_steps: options.MaxSteps = -1,
    max_length: options.MaxLength = 128,
    seed: options.Seed = 42,
    quiet: options.Quiet = False,
) -> None:
    """Compress MODEL for a task, compare it with the float model, and save it to a folder."""
    from dataclasses import replace

    from prequant.compress import compress as run
    from prequant.compress import default_baseline_training
    from prequant.recipes import recipe_type
    from prequant.tasks import task as find_task

    given = {"bits": bits, "granularity": granularity, "strategy": strategy, "outlier_ratio": outlier_ratio}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings |= dict(_assignment(text) for text in set_)
    if not train:
        settings["train"] = ()
    chosen = recipe_type(recipe)()
    training = replace(
        chosen.training,
        epochs=chosen.training.epochs if epochs is None else epochs,
        batch_size=chosen.training.batch_size if batch_size is None else batch_size,
        max_steps=max_steps,
        seed=seed,
        **_rates(learning_rate, head_learning_rate, scale_learning_rate),
        dropout=chosen.training.dropout if dropout is None else dropout,
    )
    compared = default_baseline_training(training)
    if baseline_learning_rate is not None:
        compared = replace(compared, learning_rate=baseline_learning_rate)
    report = run(
        model,
        _with(replace(chosen, training=training), settings),
        find_task(task),
        data,
        out,
        baseline=baseline,
        baseline_training=compared,
        max_length=max_length,
        progress=not quiet,
    )
    show(report.table())
    show(f"saved to {out}")


def _rates(body: float | None, head: float | None, scales: float | None) -> dict[str, float]:
    rates = {} if body is None else {"learning_rate": body, "head_learning_rate": body}
    own = {"head_learning_rate": head, "scale_learning_rate": scales}
    return rates | {name: rate for name, rate in own.items() if rate is not None}


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise PrequantError(f"--set {text!r}: write name=value, such as outlier_mode=replace")
    return name.strip().replace("-", "_"), value


def _with(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with fields set from values, or from text as YAML reads it: ``[a, b]`` is a list."""
    from dataclasses import replace

    import yaml

    from prequant.passes import OptionError
    from prequant.passes.options import near_misses, options_of

    known = [option.name for option in options_of(type(recipe)) if option.name != "training"]
    fields = {}
    for name, value in settings.items():
        if name not in known:
            raise OptionError(f"recipe {recipe.name!r} has no option {name!r}{near_misses(name, known)}")
        try:
            fields[name] = yaml.safe_load(value) if isinstance(value, str) else value
        except yaml.YAMLError as error:
            raise OptionError(
                f"option {name!r} of recipe {recipe.name!r}: {value!r} is no value YAML can read"
            ) from error
    return replace(recipe, **fields)
