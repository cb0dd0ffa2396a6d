"""The graphs that a Program generates with, made of its own weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from prequant.model import ModelProgram
from prequant.passes import Input, Program
from prequant.passes.quantize_cache import quantize_cache
from prequant.passes.specialize import specialize
from prequant.passes.transplant import transplant
from prequant.runtime import WeightFormat

from .cached_trace import BATCH, HIDDEN, QUERY, SOURCE, cache_names
from .errors import GenerationError
from .skeleton import skeleton


@dataclass(frozen=True)
class Graphs:
    """``prefill`` takes any number of positions after any past, ``decode`` one; both are described in
    :mod:`.cached_trace`.

    The ``decode`` of a seq2seq model takes the keys and values of cross-attention (``cross_key_0``, ...) instead of
    the ``encoder``'s hidden states.
    """

    prefill: Program
    decode: Program
    encoder: Program | None


def make_graphs(program: ModelProgram) -> Graphs:
    """The graphs of a program: they share its tensors, whatever form its weights have.

    Raises :class:`GenerationError` for a program that does more than its model with these weights, and for a model
    that does not generate; :class:`TraceError` for one that can't be traced with a cache.
    """
    if "input_ids" not in program.signature.names:
        raise GenerationError(f"the Program takes {', '.join(program.signature.names)}; generating takes input_ids")
    traces = skeleton(program)
    prefill = transplant(program, traces.decoder)
    encoder = None if traces.encoder is None else transplant(program, traces.encoder)
    decode = specialize(prefill, {QUERY: 1})
    if encoder is not None:
        take_cross_cache(decode, traces.layers)
    graphs = Graphs(prefill, decode, encoder)
    _check_reads(program, graphs)
    return graphs


def with_quantized_cache(graphs: Graphs, bits: int) -> Graphs:
    """The same graphs with a cache of integer codes, also of cross-attention; the encoder is shared."""
    format = WeightFormat.affine(bits)
    past, cross = (
        tuple(item.name for item in graphs.decode.signature.inputs if item.name.startswith(f"{kind}_"))
        for kind in ("past", "cross")
    )
    own = range(1, 1 + len(past))
    prefill = quantize_cache(graphs.prefill, past, range(1, own.stop + len(cross)), format)
    return Graphs(prefill, quantize_cache(graphs.decode, past + cross, own, format), graphs.encoder)


def graphs_over(graphs: Graphs, program: ModelProgram) -> Graphs:
    """The same graphs over the tensors of another program, which has the graph that they were made for."""
    encoder = None if graphs.encoder is None else _over(graphs.encoder, program)
    return Graphs(_over(graphs.prefill, program), _over(graphs.decode, program), encoder)


def _over(graph: Program, program: ModelProgram) -> Program:
    copied = graph.copy()
    held = {name for name, _ in (*program.named_parameters(), *program.named_buffers())}
    names = {str(node.target) for node in copied.graph.find_nodes(op="get_attr")}
    tensors = {name: (program if name in held else graph).tensor(name) for name in names}
    result = Program(tensors, copied.graph, graph.info).train(False)
    result.planned = graph.planned
    return result


def take_cross_cache(program: Program, layers: int) -> None:
    """Turn the keys and values of the encoder's positions from results into inputs.

    Raises :class:`GenerationError` for a graph that reads the encoder's hidden states for more than these.
    """
    graph, own = program.graph, 1 + 2 * layers
    output = graph.output_node()
    results: Any = output.args[0]
    placeholders: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    inputs = list(program.signature.inputs)
    last = placeholders[-1]
    for name, node in zip(cache_names(layers, "cross"), results[own:], strict=True):
        with graph.inserting_after(last):
            last = graph.placeholder(name)
        value = node.meta["val"]
        last.meta["val"] = value
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user is not output)
        inputs.append(Input(name, value.dtype, (BATCH, int(value.shape[1]), SOURCE, int(value.shape[3]))))
    output.args = (type(results)(results[:own]),)
    hidden, mask = (next(node for node in placeholders if node.target == name) for name in (HIDDEN, "attention_mask"))
    for size in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        if size.args[0] is hidden:
            size.update_arg(0, mask)
    graph.eliminate_dead_code()
    if hidden.users:
        raise GenerationError("the decoder reads the encoder's hidden states for more than keys and values")
    graph.erase_node(hidden)
    inputs = [item for item in inputs if item.name != HIDDEN]
    signature = replace(program.signature, inputs=tuple(inputs), outputs=tuple(range(own)))
    program.update_info(signature=signature)
    program.prune()
    program.recompile()


def _check_reads(program: Program, graphs: Graphs) -> None:
    made = [graph for graph in (graphs.prefill, graphs.encoder) if graph is not None]
    read = {str(node.target) for graph in made for node in graph.graph.find_nodes(op="get_attr")}
    held = {str(node.target) for node in program.graph.find_nodes(op="get_attr")} - set(program.info.constants)
    if left := sorted(held - read):
        raise GenerationError(f"the Program reads {left[0]!r}, which the model of its configuration does not have")
