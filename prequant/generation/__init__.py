"""Generation: a Program's prefill and decode graphs with a key/value cache, under transformers' ``generate``."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from transformers import GenerationConfig

from prequant.model import MODEL_CLASS, ModelProgram

from .check import check_values
from .errors import GenerationError
from .graphs import Graphs, graphs_over, make_graphs
from .program import GenerativeDecoder, GenerativeProgram, GenerativeSeq2Seq
from .skeleton import generates

__all__ = ["GenerationError", "GenerativeProgram", "Graphs", "forget", "generates", "with_cache"]

_MADE: WeakKeyDictionary[ModelProgram, tuple[Any, GenerativeProgram]] = WeakKeyDictionary()
_ALIKE: WeakValueDictionary[Any, GenerativeProgram] = WeakValueDictionary()
"""Of each graph one that has been made, and checked, for as long as it is in use."""


def with_cache(program: ModelProgram) -> GenerativeProgram:
    """The program as ``generate`` runs it: graphs with a cache, over the very tensors of the program.

    They are made once, and again when the program has been rewritten since, moved, or given other tensors; what trains
    in place shows at once. Programs of one graph, as a base and its tasks are, have one trace. Raises
    :class:`GenerationError` and :class:`TraceError` for a program that can't generate.
    """
    state = _state(program)
    made = _MADE.get(program)
    if made is None or made[0] != state:
        form = _form(program)
        alike = _ALIKE.get(form)
        graphs = make_graphs(program) if alike is None else graphs_over(alike.graphs, program)
        kind = GenerativeDecoder if graphs.encoder is None else GenerativeSeq2Seq
        generative: GenerativeProgram = kind(program, graphs)
        if alike is None:
            check_values(program, generative)
        made, _ALIKE[form] = (state, generative), generative
        _MADE[program] = made
    generative = made[1]
    generative.generation_config = cast(GenerationConfig, program.generation_config)
    return generative


def forget(program: ModelProgram) -> None:
    """Let go of the graphs that :func:`with_cache` has made for ``program``, and of the caches' memory."""
    _MADE.pop(program, None)


def _state(program: ModelProgram) -> Any:
    """Equal as long as the program has the same graph, configuration, and tensors in the same place."""
    tensors = [*program.parameters(), *program.buffers()]
    return program.code, id(program.config), tuple((id(tensor), tensor.device, tensor.dtype) for tensor in tensors)


def _form(program: ModelProgram) -> Any:
    """Equal for programs that differ in the numbers in their tensors alone."""
    named = (*program.named_parameters(), *program.named_buffers())
    kinds = tuple((name, tensor.dtype, tensor.shape, tensor.device) for name, tensor in named)
    model = str(program.info.extra[MODEL_CLASS]), program.config.to_json_string(use_diff=False)
    return program.code, program.planned, model, kinds
