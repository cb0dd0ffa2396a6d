"""Whether graphs with a cache compute what the Program does that they were made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prequant.model import DECODER_INPUT, ModelProgram
from prequant.passes import weights

from .errors import GenerationError
from .program import GenerativeProgram

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
    quantized = any(view.input_format for view in weights(program))
    allowed = (QUANTIZED_TOLERANCE if quantized else TOLERANCE) * float(expected.float().std())
    apart = float((expected.float() - found.float()).abs().max())
    if not apart <= allowed:
        raise GenerationError(
            f"the Program computes something else than its model with these weights: logits {apart:.3g} apart, with a "
            f"standard deviation of {float(expected.float().std()):.3g}; generate with a Program whose passes rewrite "
            "weights and their inputs only"
        )


def _stepwise(generative: GenerativeProgram, ids: Tensor) -> Tensor:
    """Logits of the last position, from a prefill and two steps."""
    outputs: Any = None
    encoder = getattr(generative, "encoder", None)
    name, more = ("input_ids", {}) if encoder is None else (DECODER_INPUT, {"encoder_outputs": encoder(ids)})
    for part in ids.split([LENGTH - 2, 1, 1], dim=1):
        past = None if outputs is None else outputs.past_key_values
        outputs = generative(**{name: part}, past_key_values=past, **more)
    return outputs.logits[:, -1]
