"""The graphs of a Program's model with a cache, traced from its configuration alone: no weights are needed for that."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from transformers import GenerationMixin

from prequant.losses import CAUSAL_LM, SEQ2SEQ_LM
from prequant.model import MODEL_CLASS, ModelProgram
from prequant.model_class import find_model_class
from prequant.runtime import PrequantError

from .cached_trace import CachedTrace, trace_cached
from .errors import GenerationError

REMEMBERED = 8
"""Traces that are kept: a Program and what passes made of it share one."""


def skeleton(program: ModelProgram) -> CachedTrace:
    """The traces of the program's model, as float modules on the meta device.

    Raises :class:`GenerationError` for a model that does not generate, or whose class can't be found, and
    :class:`TraceError`.
    """
    kind = model_class(str(program.info.extra[MODEL_CLASS]))
    attention = torch.ops.aten.scaled_dot_product_attention.default
    fused = any(program.graph.find_nodes(op="call_function", target=attention))
    config = program.config.to_json_string(use_diff=False)
    return _traced(kind, config, "sdpa" if fused else "eager", *_dtypes(program))


def generates(program: ModelProgram) -> bool:
    """Whether the program's model is one that generates text, for which :func:`skeleton` can be asked."""
    try:
        model_class(str(program.info.extra[MODEL_CLASS]))
    except GenerationError:
        return False
    return program.task in (CAUSAL_LM, SEQ2SEQ_LM)


def model_class(path: str) -> Any:
    """The class at an import path. Raises :class:`GenerationError` for what :func:`find_model_class` does not find, and
    for a class that does not generate.
    """
    try:
        found: Any = find_model_class(path)
    except PrequantError as error:
        raise GenerationError(str(error)) from error
    if not issubclass(found, GenerationMixin):
        raise GenerationError(f"a {found.__name__} does not generate text: trace a model with a language model's head")
    return found


def _dtypes(program: ModelProgram) -> tuple[torch.dtype, tuple[tuple[str, torch.dtype], ...]]:
    """The dtype of the modules, and that of every float tensor that the program holds under its own name."""
    tensors = (*program.named_parameters(), *program.named_buffers())
    floats = tuple((name, tensor.dtype) for name, tensor in tensors if tensor.is_floating_point())
    # Norms and biases have the model's dtype, whatever its weights have become.
    plain = (p.dtype for name, p in program.named_parameters() if p.dim() == 1 and name.endswith((".weight", ".bias")))
    return next(plain, torch.float32), floats


@lru_cache(maxsize=REMEMBERED)
def _traced(
    kind: Any, config: str, attention: str, dtype: torch.dtype, dtypes: tuple[tuple[str, torch.dtype], ...]
) -> CachedTrace:
    values = kind.config_class.from_dict(json.loads(config))
    with torch.device("meta"):
        model = kind._from_config(values, attn_implementation=attention, dtype=dtype)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, own in dtypes:  # a few parameters and buffers may be kept in another
        if name in held:
            held[name].data = held[name].data.to(own)
    return trace_cached(model.eval())
