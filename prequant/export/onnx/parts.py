"""Which graphs an export consists of: the Program's own, or those that generate, with keys and values as inputs and
results.

====================  ==============================================================================================
any Program           its own inputs and results
decoder               ``input_ids, attention_mask [batch, past + length], (position_ids,) past_key_values.0.key, ...``
                      to ``logits`` of the last position, ``present.0.key, ...``: any number of new positions after
                      any past, none included
seq2seq, the encoder  ``input_ids, attention_mask`` to ``last_hidden_state``, and ``cross.0.key, ...``, what the
                      decoder makes of it, once for all steps
seq2seq, the decoder  ``decoder_input_ids, decoder_attention_mask, attention_mask, past_key_values.0.key, ...,
                      cross.0.key, ...`` to ``logits, present.0.key, ...``
====================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from prequant.generation import GenerationError, Graphs, generates, with_cache
from prequant.generation.cached_trace import HIDDEN, cache_names
from prequant.generation.graphs import take_cross_cache
from prequant.model import ModelProgram
from prequant.passes import Program, ProgramInfo, Signature

from ..errors import ExportError
from .opaque import result_names

WITHOUT = "cache=False (--no-cache) exports the graph as it is"
SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Part:
    """One file: a graph, what its file's name has before its ending, and the names of its inputs and results."""

    program: Program
    suffix: str
    inputs: tuple[str, ...]
    results: tuple[str, ...]


def parts_of(program: Program, cache: bool) -> tuple[Part, ...]:
    """The graphs to export; with ``cache`` those that generate, for a Program of a model that does.

    Raises :class:`ExportError` for such a Program where these can't be made.
    """
    if not (cache and isinstance(program, ModelProgram) and generates(program)):
        return (Part(program, "", program.signature.names, result_names(program)),)
    if program.signature.exposed:
        raise ExportError(f"graphs with a cache have no room for the Program's exposed values: {WITHOUT}")
    try:
        graphs = with_cache(program).graphs
    except GenerationError as error:
        raise ExportError(f"{error}: {WITHOUT}") from error
    if graphs.encoder is None:
        return (_cached(graphs.prefill, ""),)
    layers = sum(item.name.startswith("past_key_") for item in graphs.prefill.signature.inputs)
    decoder = graphs.prefill.copy()
    take_cross_cache(decoder, layers)
    crossed = ("last_hidden_state", *map(_dotted, cache_names(layers, "cross")))
    encoder = _encoder_with_cross(graphs, layers)
    return (Part(encoder, ".encoder", encoder.signature.names, crossed), _cached(decoder, ".decoder"))


def _cached(program: Program, suffix: str) -> Part:
    names = program.signature.names
    own = [name for name in names if name.startswith("past_")]
    presents = (_dotted(name).replace("past_key_values", "present", 1) for name in own)
    return Part(program, suffix, tuple(map(_dotted, names)), ("logits", *presents))


def _dotted(name: str) -> str:
    """``past_key_0`` as others call it, ``past_key_values.0.key``; likewise ``cross.0.key``."""
    kind, *rest = name.split("_")
    if kind not in ("past", "cross") or len(rest) != 2:
        return name
    return f"{'past_key_values' if kind == 'past' else kind}.{rest[1]}.{rest[0]}"


def _encoder_with_cross(graphs: Graphs, layers: int) -> Program:
    """The encoder, followed by the nodes of the decoder that make keys and values of its result."""
    assert graphs.encoder is not None
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    copied: Any = graph.graph_copy(graphs.encoder.graph, values)
    (hidden,) = copied
    held = {str(node.target): values[node] for node in graphs.encoder.graph.find_nodes(op="get_attr")}
    results: Any = graphs.prefill.graph.output_node().args[0]
    cross = results[1 + 2 * layers :]
    for node in _ancestors(graphs.prefill.graph, cross):
        first: Any = node.args[0] if node.args else None
        others = [each for each in node.all_input_nodes if each.op == "placeholder" and each.target != HIDDEN]
        if node.op == "placeholder":
            values[node] = hidden  # of others the batch is read alone, which is the same
        elif node.target is SIZE and first in others and node.args[1] == 0:
            values[node] = graph.call_function(SIZE, (hidden, 0))
        elif others:
            raise ExportError(f"keys and values of the encoder's positions hang on the input {others[0].target}, too")
        elif node.op == "get_attr" and str(node.target) in held:
            values[node] = held[str(node.target)]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output((hidden, *(values[node] for node in cross)))
    names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    inside = {name for name, _ in (*graphs.encoder.named_parameters(), *graphs.encoder.named_buffers())}
    tensors = {name: (graphs.encoder if name in inside else graphs.prefill).tensor(name) for name in names}
    signature = Signature(graphs.encoder.signature.inputs, tuple(range(1 + len(cross))))
    return Program(tensors, graph, ProgramInfo(signature))


def _ancestors(graph: fx.Graph, results: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that results are computed from, in order."""
    wanted = set[fx.Node](results)
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [node for node in graph.nodes if node in wanted]
