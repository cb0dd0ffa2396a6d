"""A language model's graph with its key/value cache as plain tensors.

One graph serves every step: it takes the keys and values of the positions before (none at first) and returns those of
all positions. The new ones are joined to the old by ``aten.cat`` along the length, so that a later pass can turn the
copy into a write.

Inputs, in this order; ``[batch, heads, past, head_dim]`` for the cache::

    decoder-only   input_ids, attention_mask [batch, total], position_ids (where the model takes them),
                   past_key_0, past_value_0, ...
    seq2seq        decoder_input_ids, decoder_attention_mask [batch, total],
                   attention_mask [batch, length], encoder_hidden_states, past_key_0, past_value_0, ...

where ``total`` is the past and the new positions. Results: the logits (of the last position only, where the model can
leave out the others), then ``key, value`` of every layer, for a seq2seq model followed by those of cross-attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import Dim
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from prequant.passes import Input, Program, ProgramInfo, Signature
from prequant.trace_errors import explain, trace_error
from prequant.unlift import unlift

BATCH, QUERY, PAST, TOTAL, SOURCE = "batch", "query", "past", "total", "source"
"""Names of the dynamic axes: new positions, those in the cache, both together, and positions of the encoder."""
HIDDEN = "encoder_hidden_states"
SIZES = {BATCH: 2, QUERY: 3, PAST: 5, TOTAL: 8, SOURCE: 7}
"""Sizes to trace with: none of them one, which would be taken for a constant."""


@dataclass(frozen=True)
class CachedTrace:
    """``decoder``: the graph above. ``encoder``: ``input_ids, attention_mask`` to hidden states, of a seq2seq model.

    ``layers``: how many the cache has.
    """

    decoder: Program
    encoder: Program | None
    layers: int


def trace_cached(model: PreTrainedModel) -> CachedTrace:
    """Trace a model that transformers' ``generate`` takes, in eval mode. It may lie on the meta device.

    Raises :class:`TraceError`.
    """
    return _trace_seq2seq(model) if model.config.is_encoder_decoder else _trace_decoder(model)


def cache_names(layers: int, kind: str = "past") -> tuple[str, ...]:
    """Input names of a cache: ``past`` or ``cross``."""
    return tuple(f"{kind}_{part}_{layer}" for layer in range(layers) for part in ("key", "value"))


class _Layer(DynamicLayer):
    """A layer of the cache that a trace leaves nothing of but the joining of old and new."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.is_initialized:
            key_states = torch.cat([cast(Tensor, self.keys), key_states], dim=-2)
            value_states = torch.cat([cast(Tensor, self.values), value_states], dim=-2)
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        self.dtype, self.device = key_states.dtype, key_states.device
        return key_states, value_states


def _cache_of(tensors: Sequence[Tensor]) -> Cache:
    """A cache of transformers over flat keys and values, whichever layers the model would choose itself."""
    layers: list[Any] = []
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layers.append(_Layer())
        layers[-1].update(keys, values)
    return Cache(layers=layers)


def _flat_cache(cache: Cache) -> tuple[Tensor, ...]:
    """Keys and values of a cache, layer by layer."""
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore[union-attr,misc]


def _trace_decoder(model: PreTrainedModel) -> CachedTrace:
    forward = model.forward
    takes = inspect.signature(forward).parameters
    bound = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    names = ("input_ids", "attention_mask", *(("position_ids",) if "position_ids" in takes else ()))
    integer = torch.int64
    inputs = [Input(name, integer, (BATCH, TOTAL if name == "attention_mask" else QUERY)) for name in names]
    # The model looks at the values of a mask [batch, length], which meta tensors don't have; not at those of this.
    mask = torch.ones((SIZES[BATCH], 1, SIZES[QUERY], SIZES[QUERY]), dtype=torch.bool, device=model.device)
    given = {item.name: mask if item.name == "attention_mask" else _example(model, item) for item in inputs}
    past = _cache_inputs(model, _called(model, forward, **given, use_cache=True).past_key_values)

    def cached(*tensors: Tensor) -> tuple[Tensor, ...]:
        cache = _cache_of(tensors[len(names) :])
        given = dict(zip(names, tensors, strict=False))
        outputs = forward(**given, past_key_values=cache, use_cache=True, **bound)
        return (outputs.logits, *_flat_cache(outputs.past_key_values))

    decoder = _export(model, cached, [*inputs, *past])
    return CachedTrace(decoder, None, len(past) // 2)


def _trace_seq2seq(model: PreTrainedModel) -> CachedTrace:
    forward, stack = model.forward, model.get_encoder()
    integer = torch.int64
    source = [Input("input_ids", integer, (BATCH, SOURCE)), Input("attention_mask", integer, (BATCH, SOURCE))]

    def encode(ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (stack(input_ids=ids, attention_mask=mask).last_hidden_state,)

    hidden = _called(model, stack, input_ids=_example(model, source[0])).last_hidden_state
    target = Input("decoder_input_ids", integer, (BATCH, QUERY))
    given = {"encoder_outputs": BaseModelOutput(hidden), target.name: _example(model, target)}
    outputs = _called(model, forward, **given, use_cache=True)
    past = _cache_inputs(model, outputs.past_key_values.self_attention_cache)
    inputs = [
        target,
        Input("decoder_attention_mask", integer, (BATCH, TOTAL)),
        source[1],
        Input(HIDDEN, hidden.dtype, (BATCH, SOURCE, int(hidden.shape[-1]))),
        *past,
    ]

    def cached(ids: Tensor, mask: Tensor, source_mask: Tensor, hidden: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = forward(
            encoder_outputs=BaseModelOutput(hidden),
            attention_mask=source_mask,
            decoder_input_ids=ids,
            decoder_attention_mask=mask,
            past_key_values=EncoderDecoderCache(_cache_of(tensors), Cache(layers=[_Layer() for _ in tensors[::2]])),
            use_cache=True,
        )
        caches = outputs.past_key_values
        own, cross = caches.self_attention_cache, caches.cross_attention_cache
        return (outputs.logits, *_flat_cache(own), *_flat_cache(cross))

    encoder = _export(model, encode, source)
    return CachedTrace(_export(model, cached, inputs), encoder, len(past) // 2)


def _called(model: PreTrainedModel, function: Callable[..., Any], **inputs: Any) -> Any:
    """What a part of the model returns: shapes are all that is looked at."""
    try:
        with torch.no_grad():
            return function(**inputs)
    except Exception as error:  # as in a trace
        raise explain(model, error) from error


def _cache_inputs(model: PreTrainedModel, cache: Any) -> list[Input]:
    tensors = _flat_cache(cache) if isinstance(cache, Cache) else ()
    if not tensors or any(not isinstance(tensor, Tensor) or tensor.dim() != 4 for tensor in tensors):
        raise trace_error(
            model,
            "its cache does not consist of keys and values [batch, heads, length, head_dim]",
            "generate with the transformers model itself",
        )
    return [
        Input(name, tensor.dtype, (BATCH, int(tensor.shape[1]), PAST, int(tensor.shape[3])))
        for name, tensor in zip(cache_names(len(tensors) // 2), tensors, strict=True)
    ]


def _example(model: PreTrainedModel, item: Input) -> Tensor:
    shape = tuple(SIZES[size] if isinstance(size, str) else size for size in item.shape)
    return torch.ones(shape, dtype=item.dtype, device=model.device)


def _export(model: PreTrainedModel, forward: Callable[..., Any], inputs: Sequence[Input]) -> Program:
    """The graph of ``forward``, which calls the model, over flat inputs."""
    shapes = tuple(
        {axis: Dim.AUTO if isinstance(size, str) else Dim.STATIC for axis, size in enumerate(item.shape)}
        for item in inputs
    )
    parameters = [inspect.Parameter(item.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for item in inputs]

    def flat(*tensors: Tensor) -> Any:
        return forward(*tensors)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    examples = tuple(_example(model, item) for item in inputs)
    original = model.forward
    model.forward = flat
    try:
        with torch.no_grad():
            exported = torch.export.export(model, examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # whatever the model's code or the exporter raises is why it can't be traced
        raise explain(model, error) from error
    finally:
        model.forward = original
    lifted = unlift(exported, model)
    for item, node in zip(inputs, lifted.inputs, strict=True):
        node.target = item.name
        _check_axes(model, item, node.meta["val"].shape)
    _remove_dropout(lifted.graph)
    info = ProgramInfo(Signature(tuple(inputs), lifted.outputs), lifted.aliases, {}, lifted.constants)
    return Program(lifted.tensors, lifted.graph, info)


def _remove_dropout(graph: fx.Graph) -> None:
    """Drop what does nothing but in training, and would stand between a linear and what can be fused into it."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.dropout.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _check_axes(model: PreTrainedModel, item: Input, shape: Iterable[Any]) -> None:
    for axis, (label, size) in enumerate(zip(item.shape, shape, strict=True)):
        if isinstance(label, str) and (not isinstance(size, torch.SymInt) or size.node.expr.is_number):
            raise trace_error(
                model,
                f"axis {axis} of {item.name!r}, the {label}, has to be dynamic; the model's code fixes it to {size}",
                "generate with the transformers model itself",
            )
