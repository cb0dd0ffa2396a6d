"""Another head on a base: the graph of another class of its model, over the base's own tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from prequant.model import GENERATION_CONFIG, ModelProgram
from prequant.passes import Program, weights
from prequant.passes.transplant import transplant
from prequant.trace import trace

from .errors import AdapterError

BATCH, LENGTH = 2, 4
"""Sizes to trace with."""


@dataclass(frozen=True)
class Headed:
    """A base with another head. ``head``: names of the parameters that the base does not have, or has for its own."""

    program: ModelProgram
    head: tuple[str, ...]


def with_head(base: ModelProgram, kind: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0) -> Headed:
    """``base`` with a new head of a model class, in eval mode, whose parameters are drawn from ``seed``.

    No float copy of the base's weights is made. Raises :class:`AdapterError` for a class of another model, and
    :class:`PrequantError` for one that does not read the base's weights as the base does.
    """
    model = _untouched(base, kind, config)
    prefix, held = f"{model.base_model_prefix}.", _held(base)
    named = [name for name, _ in model.named_parameters()]
    if held.isdisjoint(named):
        raise AdapterError(f"a {kind.__name__} has no weight in common with the base, a {type(base).__name__}")
    tied = {name for names in base.info.aliases.values() for name in names}
    head = tuple(name for name in named if name not in held or not (name.startswith(prefix) or name in tied))
    _initialize(model, head, seed)
    traced = trace(model, _examples(base))
    grafted = transplant(base, traced, head)
    extra = {**traced.info.extra, GENERATION_CONFIG: base.info.extra.get(GENERATION_CONFIG)}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    info = replace(grafted.info, aliases=_aliases(base, traced, names), extra=extra)
    program = ModelProgram(grafted, grafted.graph, info)
    program.planned = base.planned
    program.train(False)
    return Headed(program, head)


def _aliases(base: ModelProgram, traced: Program, existing: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Ties of the model with the new head: its own, and those of the base that it still has."""
    kept = {name: tuple(n for n in names if n in existing) for name, names in base.info.aliases.items()}
    return {**traced.info.aliases, **{name: names for name, names in kept.items() if names}}


def _held(program: Program) -> set[str]:
    """Names of the tensors, of the weights that several of them make up, and further names of both."""
    names = {name for name, _ in (*program.named_parameters(), *program.named_buffers())}
    names |= {view.name for view in weights(program)}
    return names.union(*(program.info.aliases.get(name, ()) for name in names))


def _untouched(base: ModelProgram, kind: type[PreTrainedModel], config: PretrainedConfig) -> Any:
    """A model whose weights are memory that nobody has written to, which the system need not have; constants are there.

    Attention is computed as in the base's graph.
    """
    config = copy.deepcopy(config)  # transformers writes the dtype and the attention into the one that it is given
    attention = torch.ops.aten.scaled_dot_product_attention.default
    fused = any(base.graph.find_nodes(op="call_function", target=attention))
    with no_init_weights():
        model: Any = kind._from_config(config, attn_implementation="sdpa" if fused else "eager", dtype=base.dtype)
    model.tie_weights()
    return model.eval()


def _initialize(model: Any, fresh: Iterable[str], seed: int) -> None:
    """Draw the new parameters as transformers does those that a checkpoint lacks."""
    new = set(fresh)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor._is_hf_initialized = name not in new
    for path, module in model.named_modules():
        own = {f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
        module._is_hf_initialized = own.isdisjoint(new)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()


def _examples(base: ModelProgram) -> dict[str, Tensor]:
    """Inputs to trace with: those that the base takes."""
    inputs = {}
    for item in base.signature.inputs:
        sizes = [size if isinstance(size, int) else (LENGTH if axis else BATCH) for axis, size in enumerate(item.shape)]
        fill = torch.ones if item.name.endswith("mask") else torch.zeros
        inputs[item.name] = fill(sizes, dtype=item.dtype)
    return inputs
