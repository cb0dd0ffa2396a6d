"""A tiny model with its quantized copy in modules, and texts. Import with ``from .chains import ...``."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from prequant.model import ModelProgram
from prequant.recipes import MREM
from prequant.reconstruction import CalibrationSet, Learner, Module, split
from prequant.sources import canonical_program, head_parameters
from prequant.training import Checkpoints, TrainingSettings

from ..tiny import encoded, make_model, make_tokenizer

STEPS = 8
BUDGET = TrainingSettings(max_steps=STEPS, batch_size=6, learning_rate=1e-3, warmup=0.25, dropout=False)
LAYERS = 4


def recipe(**options: Any) -> MREM:
    attention = options.get("activation_bits") != 0
    return MREM(**{"modules": 2, "attention": attention, "training": BUDGET, **options})


@cache
def texts(count: int = 24, batch_size: int = 6) -> CalibrationSet:
    return CalibrationSet.of(encoded(count=count), make_tokenizer(), count, batch_size, seed=0)


def original(layers: int = LAYERS, **options: Any) -> tuple[ModelProgram, tuple[str, ...]]:
    """A model traced with attention whose probabilities are seen, and the names of its head."""
    model = make_model(num_hidden_layers=layers, **options)
    model.set_attn_implementation("eager")
    return cast(ModelProgram, canonical_program(model, make_tokenizer())), head_parameters(model)


def modules_of(method: MREM, layers: int = LAYERS, **options: Any) -> tuple[tuple[Module, ...], Any]:
    """Made once, and copied for whoever trains them."""
    modules, parts = _modules_of(method, layers, tuple(options.items()))
    return deepcopy(modules), parts


@cache
def _modules_of(method: MREM, layers: int, options: tuple[tuple[str, Any], ...]) -> tuple[tuple[Module, ...], Any]:
    program, head = _original(layers)
    student = method.prepare(program, head, texts().batches[:2], progress=False)
    return split(program, student, method.modules, objective=method.objective, **dict(options))


@cache
def _original(layers: int) -> tuple[ModelProgram, tuple[str, ...]]:
    return original(layers)


def learner(module: Module, method: MREM, checkpoints: Checkpoints | None = None, steps: int = STEPS) -> Learner:
    settings = replace(method.training, max_steps=steps)
    return Learner(module, settings, steps, method.scales_follow, method.padding, checkpoints, texts().digest)


def state(module: Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.student.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
