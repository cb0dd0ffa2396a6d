"""Bases with tasks on them, for tests of adapters. Import with ``from .adapter_bases import ...``."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from prequant.adapters.heads import with_head
from prequant.model import ModelProgram
from prequant.model_class import find_model_class
from prequant.passes import BinaryCode, Canonicalize, Pipeline, QuantizeWeights, SplitOutliers, lower

from ..models import FAMILIES, traced

GPT2 = "transformers.models.gpt2.modeling_gpt2"
FORMS: dict[str, Pipeline] = {
    "outliers": Pipeline([Canonicalize(), SplitOutliers(ratio=0.05), QuantizeWeights(bits=4)]),
    "binary": Pipeline([Canonicalize(), BinaryCode(bits=3, embeddings=False)]),
}
OWN = ("outliers.values", ".alphas", "ln_1.weight", "LayerNorm.weight")


@cache
def made(name: str, form: str) -> ModelProgram:
    program = lower(FORMS[form](traced(name)))
    assert isinstance(program, ModelProgram)
    return program


def base_of(name: str, form: str = "binary") -> ModelProgram:
    """A packed Program with tensors of its own."""
    return copy.deepcopy(made(name, form))


def tuned(base: ModelProgram, seed: int) -> ModelProgram:
    """The base after a task has trained it: first alphas, outliers and norms are others."""
    copied, random = base.copy(), torch.Generator().manual_seed(seed)
    for name, value in list(copied.named_parameters()):
        if name.endswith(OWN):
            new = value.detach().clone()
            part = new[:1] if name.endswith(".alphas") else new
            part.mul_((1 + 0.2 * torch.rand(part.shape, generator=random)).to(new.dtype))
            copied.set_tensor(name, new, trainable=False)
    return copied


def headed(base: ModelProgram, path: str, classes: int, seed: int) -> ModelProgram:
    """The base with another head."""
    config = copy.deepcopy(base.config)
    config.num_labels = classes
    return with_head(base, find_model_class(path), config, seed).program


def inputs(name: str, rows: int, length: int = 6) -> dict[str, Tensor]:
    return FAMILIES[name]().make_inputs(rows, length, padded=True)


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True))
