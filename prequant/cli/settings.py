"""From options of the command line to a recipe with its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from prequant.passes import OptionError
from prequant.passes.options import near_misses, options_of
from prequant.recipes import Recipe
from prequant.runtime import PrequantError
from prequant.training import TrainingSettings

TRAININGS = ("training", "reduction")
"""Fields of recipes that other options of the command line fill in."""


def trained_with(
    training: TrainingSettings,
    epochs: float | None,
    batch_size: int | None,
    rates: tuple[float | None, float | None, float | None],
    dropout: bool | None,
    max_steps: int,
    eval_steps: int | None,
    precision: str | None,
    seed: int,
) -> TrainingSettings:
    """A recipe's training with what was given; ``rates``: of the body, the head and the scales. The body's is the
    head's, too, where that has none.
    """
    body, head, scales = rates
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": body,
        "head_learning_rate": body if head is None else head,
        "scale_learning_rate": scales,
        "dropout": dropout,
        "eval_steps": eval_steps,
        "precision": precision,
    }
    known = {name: value for name, value in given.items() if value is not None}
    # A recipe whose budget is in steps keeps it, unless it is told otherwise.
    steps = training.max_steps if max_steps == -1 and epochs is None else max_steps
    return replace(training, max_steps=steps, seed=seed, **known)


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """``name=value`` each. Raises :class:`PrequantError` for another form."""
    return dict(map(_assignment, texts))


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise PrequantError(f"--set {text!r}: write name=value, such as outlier_mode=replace")
    return name.strip().replace("-", "_"), value


def with_fields(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with fields set from values, or from text as YAML reads it: ``[a, b]`` is a list."""
    known = [option.name for option in options_of(type(recipe)) if option.name not in TRAININGS]
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
