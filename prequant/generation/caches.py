"""Caches: what a Program keeps of the positions before, as floats or as 8-bit codes, growing or in fixed buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .errors import GenerationError
from .static_cache import StaticCache

QUANTIZED_BITS = 8
PARTS, QUANTIZED_PARTS = ("keys", "values"), ("keys", "key_scales", "values", "value_scales")
"""What a layer holds, in the order of the graph's inputs."""


class QuantizedLayer(DynamicLayer):
    """Codes ``[batch, heads, length, bytes]`` as ``keys`` and ``values``, and their scales
    ``[batch, heads, length, 1]``, which go wherever they do.
    """

    key_scales: Tensor
    value_scales: Tensor

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """A Program's graph joins what is new to what it was given."""
        raise GenerationError("a quantized cache is written by the Program that it was made for")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See :class:`DynamicLayer`."""
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """See :class:`DynamicLayer`."""
        super().crop(tokens_to_remove)  # the codes, or an error
        if self.is_initialized:
            length = self.get_seq_length()
            self.key_scales, self.value_scales = self.key_scales[..., :length, :], self.value_scales[..., :length, :]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See :class:`DynamicLayer`."""
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """See :class:`DynamicLayer`."""
        self._each(lambda part: part[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            for name in QUANTIZED_PARTS:
                setattr(self, name, change(getattr(self, name)))


class QuantizedCache(DynamicCache):
    """A cache of :class:`QuantizedLayer`, which a Program fills."""


DYNAMIC, QUANTIZED, STATIC = "dynamic", "quantized", "static"
"""What ``cache_implementation`` may be."""


def kind_of_cache(config: GenerationConfig) -> str:
    """The kind of cache that is asked for: one that grows, one of 8-bit codes (``cache_implementation="quantized"``,
    with or without ``cache_config={"nbits": 8}``), or one in buffers of a fixed length (``"static"``).

    Raises :class:`GenerationError` for another kind of cache, and for options that there are none of.
    """
    kind, options = config.cache_implementation or DYNAMIC, config.cache_config
    if kind not in (DYNAMIC, QUANTIZED, STATIC):
        raise GenerationError(
            f"cache_implementation={kind!r}: a Program generates with a cache that is "
            f"{DYNAMIC!r}, {QUANTIZED!r} or {STATIC!r}"
        )
    if kind == QUANTIZED and options not in (None, {}, {"nbits": QUANTIZED_BITS}):
        raise GenerationError(
            f"cache_config={options!r}: a Program's quantized cache has {{'nbits': {QUANTIZED_BITS}}}"
        )
    return str(kind)


def parts_of(layer: Any) -> tuple[str, ...]:
    """What a layer of a cache holds. Raises :class:`GenerationError` for a layer that a Program can't fill."""
    if type(layer) is QuantizedLayer:
        return QUANTIZED_PARTS
    if type(layer) is not DynamicLayer:
        kind = type(layer).__name__
        raise GenerationError(
            f"a cache with a {kind}: give a DynamicCache() that is made without a configuration, or "
            f"cache_implementation={STATIC!r}"
        )
    return PARTS


def held_by(cache: Cache) -> list[Tensor]:
    """All that a cache holds, layer by layer, in the order of the graph's inputs; nothing of an empty one."""
    tensors: list[Tensor] = []
    if isinstance(cache, StaticCache):
        return [tensor for layer in cache.layers for tensor in layer.written()]
    layers: list[Any] = cache.layers
    for layer in layers:
        parts = parts_of(layer)
        if layer.is_initialized:
            tensors += (getattr(layer, part) for part in parts)
    return tensors


def store(cache: Cache, held: Sequence[Tensor]) -> None:
    """Let a cache hold these tensors, layer by layer."""
    if isinstance(cache, StaticCache):
        cache.write(held)
        return
    kind = QuantizedLayer if isinstance(cache, QuantizedCache) else DynamicLayer
    parts = QUANTIZED_PARTS if kind is QuantizedLayer else PARTS
    while len(parts) * len(cache.layers) < len(held):
        cache.layers.append(kind())
    for number, layer in enumerate(cache.layers):
        assert type(layer) is kind
        if not layer.is_initialized:
            first = held[0]
            layer.dtype, layer.device, layer.is_initialized = first.dtype, first.device, True
        for place, name in enumerate(parts, len(parts) * number):
            setattr(layer, name, held[place])
