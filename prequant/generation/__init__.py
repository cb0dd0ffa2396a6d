"""Generation: a Program's prefill and decode graphs with a key/value cache, under transformers' ``generate``."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

from transformers import GenerationConfig

from prequant.model import ModelProgram

from .check import check_values
from .errors import GenerationError
from .graphs import Graphs, make_graphs
from .program import GenerativeDecoder, GenerativeProgram, GenerativeSeq2Seq
from .skeleton import generates

__all__ = ["GenerationError", "GenerativeProgram", "Graphs", "generates", "with_cache"]

_MADE: WeakKeyDictionary[ModelProgram, tuple[Any, GenerativeProgram]] = WeakKeyDictionary()


def with_cache(program: ModelProgram) -> GenerativeProgram:
    """The program as ``generate`` runs it: graphs with a cache, over the very tensors of the program.

    They are made once, and again when the program has been rewritten since, moved, or given other tensors; what trains
    in place shows at once. Raises :class:`GenerationError` and :class:`TraceError` for a program that can't generate.
    """
    state = _state(program)
    made = _MADE.get(program)
    if made is None or made[0] != state:
        graphs = make_graphs(program)
        kind = GenerativeDecoder if graphs.encoder is None else GenerativeSeq2Seq
        generative: GenerativeProgram = kind(program, graphs)
        check_values(program, generative)
        made = _MADE[program] = (state, generative)
    generative = made[1]
    generative.generation_config = cast(GenerationConfig, program.generation_config)
    return generative


def _state(program: ModelProgram) -> Any:
    """Equal as long as the program has the same graph, configuration, and tensors in the same place."""
    tensors = [*program.parameters(), *program.buffers()]
    return program.code, id(program.config), tuple((id(tensor), tensor.device, tensor.dtype) for tensor in tensors)
