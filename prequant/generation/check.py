"""Whether graphs with a cache compute what the Program does that they were made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from prequant.model import DECODER_INPUT, ModelProgram
from prequant.passes import Program, weights

from .errors import GenerationError
from .program import GenerativeProgram
from .static_cache import StaticDecoder

LENGTH = 5
TOLERANCE, QUANTIZED_TOLERANCE = 0.1, 0.5
"""How far logits may lie apart, in standard deviations: with quantized inputs a rounding moves a code now and then."""


def check_values(program: ModelProgram, generative: GenerativeProgram) -> None:
    """Raise :class:`GenerationError` unless ``generative``, step by step, gives the logits that ``program`` gives at
    once.

    A pass may have rewritten more than weights and their inputs, of which the model's own code knows nothing.
    """
    ids = torch.arange(2 * LENGTH, device=program.device).reshape(2, LENGTH) % program.config.vocab_size
    inputs = {
        "input_ids": ids,
        DECODER_INPUT: ids,
        "position_ids": torch.arange(LENGTH, device=ids.device).expand(2, -1),
    }
    inputs = {name: value for name, value in inputs.items() if name in program.signature.names}
    evaluated = program if not program.training else program.copy().train(False)
    with torch.no_grad():
        try:
            expected = evaluated(**inputs)[0][:, -1]
        except TypeError as error:
            raise GenerationError(f"the Program does not generate from input_ids alone: {error}") from error
        found = _stepwise(generative, ids)
    apart, spread = _apart(found, expected)
    if not apart <= _allowed(program) * spread:
        raise GenerationError(
            f"the Program computes something else than its model with these weights: logits {apart:.3g} apart, with a "
            f"standard deviation of {spread:.3g}; generate with a Program whose passes rewrite weights and their "
            "inputs only"
        )


def check_static(generative: GenerativeProgram, decoder: StaticDecoder) -> None:
    """Raise :class:`GenerationError` unless steps over buffers give the logits that they give with a cache that grows,
    whatever the buffers hold where nothing is written yet.
    """
    ids = torch.arange(2 * LENGTH, device=generative.device).reshape(2, LENGTH) % generative.config.vocab_size
    encoder = getattr(generative, "encoder", None)
    cache: Any = decoder.cache(2, LENGTH, 0 if encoder is None else LENGTH, records=False)
    for layer in cache.layers:
        layer.keys.fill_(1)
        layer.values.fill_(1)
    with torch.no_grad():
        expected = _stepwise(generative, ids)
        found = _stepwise(generative, ids, cache if encoder is None else EncoderDecoderCache(cache, DynamicCache()))
    apart, spread = _apart(found, expected)
    if not apart <= _allowed(generative.graphs.decode) * spread:
        raise GenerationError(
            f"with a static cache the Program computes something else: logits {apart:.3g} apart, with a standard "
            f"deviation of {spread:.3g}; generate with a dynamic one"
        )


def _apart(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, and the standard deviation of what is expected."""
    return float((expected.float() - found.float()).abs().max()), float(expected.float().std())


def _allowed(program: Program) -> float:
    return QUANTIZED_TOLERANCE if any(view.input_format for view in weights(program)) else TOLERANCE


def _stepwise(generative: GenerativeProgram, ids: Tensor, cache: Cache | None = None) -> Tensor:
    """Logits of the last position, from a prefill and two steps, with a new cache of the usual kind or ``cache``."""
    outputs: Any = None
    encoder = getattr(generative, "encoder", None)
    name, more = ("input_ids", {}) if encoder is None else (DECODER_INPUT, {"encoder_outputs": encoder(ids)})
    for part in ids.split([LENGTH - 2, 1, 1], dim=1):
        past = cache if outputs is None else outputs.past_key_values
        outputs = generative(**{name: part}, past_key_values=past, **more)
    return outputs.logits[:, -1]
