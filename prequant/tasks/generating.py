"""Letting a model write: the texts that it generates for prompts, in order."""

from __future__ import annotations

from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .predicting import batches


def generated(
    model: nn.Module,
    prompts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    description: str,
    progress: bool,
    **settings: Any,
) -> list[str]:
    """What ``model.generate`` adds to each of ``prompts``, rows of ``input_ids`` and ``attention_mask``.

    Without special tokens and without blanks at the ends. Prompts are padded on the left, as decoders need it; a
    seq2seq model does not mind. ``settings`` are those of ``generate``.
    """

    def collate(rows: list[dict[str, Any]]) -> Any:
        return tokenizer.pad(rows, padding_side="left", return_tensors="pt")

    texts = [""] * len(prompts)
    columns, writer = ("input_ids", "attention_mask"), cast(Any, model)
    continues = not getattr(model.config, "is_encoder_decoder", False)
    for numbers, batch in batches(model, prompts, columns, collate, batch_size, description, progress):
        ids: Any = writer.generate(**batch, **settings)
        written = ids[:, batch["input_ids"].shape[1] :] if continues else ids
        decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
        for number, text in zip(numbers, decoded, strict=True):
            texts[number] = text.strip()
    return texts
