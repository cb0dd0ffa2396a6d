"""Continuing a text with any model that generates, compressed or not, as ``prequant generate`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from prequant.checkpoint import load
from prequant.model import ModelProgram
from prequant.sources import SourceError, holds_program, load_model, load_tokenizer, with_adapter


def load_generator(
    source: str | Path, adapter: Path | None = None
) -> tuple[PreTrainedModel | ModelProgram, PreTrainedTokenizerBase]:
    """A model that generates text, with an adapter if one is given, and its tokenizer.

    Raises :class:`SourceError` for a model that does not generate, and what
    :func:`~prequant.sources.with_adapter` does.
    """
    model: Any = load(source) if holds_program(source) else load_model(source)
    model = with_adapter(model, source, adapter)
    if not (isinstance(model, (PreTrainedModel, ModelProgram)) and model.can_generate()):
        raise SourceError(f"{source} holds a {type(model).__name__}, which does not generate text")
    return model, load_tokenizer(source)


def continue_text(
    model: PreTrainedModel | ModelProgram,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    seed: int = 0,
    *,
    stream: bool = True,
    **settings: Any,
) -> str:
    """The prompt (of a decoder) and its continuation; written to the standard output as it comes if ``stream``.

    ``settings``: for transformers' ``generate``. Raises :class:`SourceError` for a prompt without tokens, one that is
    too long for the model's positions, and a quantized cache for a model that is no Program.
    """
    if settings.get("cache_implementation") == "quantized" and not isinstance(model, ModelProgram):
        raise SourceError("a quantized cache is for models that prequant has compressed")
    inputs = dict(tokenizer(prompt, return_tensors="pt"))
    inputs = {name: value.to(model.device) for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    length = int(inputs["input_ids"].shape[1])
    if not length:
        raise SourceError("the prompt has no tokens")
    positions = None if model.config.is_encoder_decoder else getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length + max_new_tokens - 1 > positions:  # the last token is not read again
        raise SourceError(
            f"{length} tokens of the prompt and {max_new_tokens} new ones: the model has {positions} positions"
        )
    set_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    generator: Any = model
    generated = generator.generate(
        **inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **settings
    )
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))
