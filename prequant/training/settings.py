"""What a training is told, what it took, and how its parameters are grouped for the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prequant.runtime import PrequantError

from .precision import PRECISIONS, Precision


class TrainingError(PrequantError):
    """Settings that describe no training, or a model that has nothing to train."""


SCALES = (".scale", ".alphas", ".first_alphas", ".zero_point")
"""How the names of a compressed weight's scales end."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. ``learning_rate`` is the peak; it warms up over ``warmup`` of the steps and falls linearly to 0.

    ``head_learning_rate`` is for the task head, which starts from random numbers (None: the same);
    ``scale_learning_rate`` for scales, zero points and alphas of compressed weights. It is relative to the mean
    magnitude of each such tensor, which AdamW's steps know nothing of: 8-bit scales are a sixteenth of 4-bit ones.
    ``max_steps`` above 0 overrides ``epochs``.
    ``weight_decay`` acts on matrices (embeddings are some); never on biases, layer norms, or the trainable parts of a
    compressed weight. ``dropout``: whether the model drops what its configuration says; where few parameters train,
    there is little to overfit with. ``eval_steps`` above 0: every so many steps, and at the end, the model is scored on
    the validation set, and the best of these states is what stays (of equal ones the first); else it is the last.
    ``precision``: what products compute in, as :func:`~prequant.training.precision.computing_in` has it.
    Raises :class:`TrainingError` for values out of range.
    """

    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-5
    head_learning_rate: float | None = None
    scale_learning_rate: float = 5e-3
    weight_decay: float = 0.01
    warmup: float = 0.06
    max_grad_norm: float = 1.0
    max_steps: int = -1
    seed: int = 42
    dropout: bool = True
    eval_steps: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        rates = {
            "learning_rate": self.learning_rate,
            "head_learning_rate": self.head_learning_rate,
            "scale_learning_rate": self.scale_learning_rate,
        }
        right = {
            "epochs": (self.epochs, "above 0", self.epochs > 0),
            "batch_size": (self.batch_size, "1 or more", self.batch_size >= 1),
            **{name: (rate, "above 0", rate is None or rate > 0) for name, rate in rates.items()},
            "weight_decay": (self.weight_decay, "0 or more", self.weight_decay >= 0),
            "warmup": (self.warmup, "a share of the steps, from 0 to below 1", 0 <= self.warmup < 1),
            "max_grad_norm": (self.max_grad_norm, "above 0", self.max_grad_norm > 0),
            "max_steps": (
                self.max_steps,
                "1 or more, or -1 for all epochs",
                self.max_steps >= 1 or self.max_steps == -1,
            ),
            "eval_steps": (self.eval_steps, "1 or more, or 0 for the last state", self.eval_steps >= 0),
            "seed": (self.seed, "0 to 2**32 - 1", 0 <= self.seed < 2**32),
            "precision": (self.precision, " or ".join(PRECISIONS), self.precision in PRECISIONS),
        }
        for name, (value, expected, fits) in right.items():
            if not fits or (isinstance(value, float) and not math.isfinite(value)):
                raise TrainingError(f"{name}={value}: expected {expected}")


@dataclass(frozen=True)
class TrainingResult:
    """What a training took: optimizer steps, seconds, the mean loss over all steps, and bytes of memory.

    ``peak_memory`` is what the model's tensors take plus the most by which the process grew while they were trained
    (gradients, optimizer, activations), so that it does not depend on what else the process holds. ``best_step``: whose
    state the model has, where it was scored on the way.
    """

    steps: int
    seconds: float
    loss: float
    peak_memory: int
    best_step: int | None = None


def combined(results: Sequence[TrainingResult]) -> TrainingResult | None:
    """Several trainings, one after the other, as one: the loss is that of the last. None if there was none."""
    if not results:
        return None
    steps, seconds = sum(result.steps for result in results), sum(result.seconds for result in results)
    peak = max(result.peak_memory for result in results)
    return TrainingResult(steps, seconds, results[-1].loss, peak, results[-1].best_step)


def parameter_groups(model: nn.Module, settings: TrainingSettings, head: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The trainable parameters as an optimizer takes them, by learning rate and weight decay.

    Raises :class:`TrainingError` if there are none, or the head names one that the model does not have.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError("nothing to train: no parameter requires a gradient")
    of_head = frozenset(head)
    if unknown := sorted(of_head - {name for name, _ in model.named_parameters()}):
        raise TrainingError(f"the head's {unknown[0]!r} is no parameter of the model")
    usual = settings.learning_rate
    head_rate = usual if settings.head_learning_rate is None else settings.head_learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        is_scale = name.endswith(SCALES)
        rate = head_rate if name in of_head else usual
        if is_scale:
            rate = settings.scale_learning_rate * float(parameter.detach().abs().mean())
        # One-dimensional parameters are biases, norms and outlier values.
        decays = parameter.dim() > 1 and not is_scale
        groups.setdefault((rate, settings.weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
