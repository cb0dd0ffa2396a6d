"""Running a model over encoded rows, those of similar length together, with what it says put back into order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from prequant.runtime.memory import RETURN_EVERY, return_freed_memory

Collator = Callable[[list[dict[str, Any]]], Any]

IGNORED = -100
"""The label of tokens that no loss and no score counts."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What models read of encoded rows, where it is there."""


@dataclass(frozen=True)
class Limits:
    """How much of a text a model reads and how many rows at once: tokens, and rows."""

    max_length: int = 128
    batch_size: int = 64


@dataclass(frozen=True)
class Reader:
    """A model that is to be scored, and how it reads: ``collate`` makes its batches, ``description`` stands at the bar.

    The model is put into eval mode; it runs on the device that it is on, without gradients.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    collate: Collator
    limits: Limits
    description: str
    progress: bool

    def batches(
        self, rows: Dataset, columns: Sequence[str], collate: Collator | None = None
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Batches of ``columns``, each with the numbers of its rows; long ones last."""
        self.model.eval()
        device = next(self.model.parameters()).device
        order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
        read, size, make = rows.select_columns(list(columns)), self.limits.batch_size, collate or self.collate
        with torch.inference_mode():
            for start in tqdm(
                range(0, len(order), size), desc=self.description, disable=not self.progress, leave=False
            ):
                numbers = order[start : start + size]
                yield numbers, make([read[int(i)] for i in numbers]).to(device)
                if start // size % RETURN_EVERY == RETURN_EVERY - 1:
                    return_freed_memory()

    def outputs(self, rows: Dataset, names: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """The outputs ``names`` of each row, in the order of the rows, padding and all."""
        columns = [name for name in rows.column_names if name in INPUTS]
        found: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
        for numbers, batch in self.batches(rows, columns):
            result: Mapping[str, Tensor] = self.model(**batch)
            for name in names:
                for number, output in zip(numbers, result[name].float().cpu().numpy(), strict=True):
                    found[name][number] = output
        return found

    def generated(self, prompts: Dataset, **settings: Any) -> list[str]:
        """What ``model.generate`` adds to each of ``prompts``, rows of ``input_ids`` and ``attention_mask``.

        Without special tokens and without blanks at the ends. Prompts are padded on the left, as decoders need it; a
        seq2seq model does not mind. ``settings`` are those of ``generate``.
        """

        def collate(rows: list[dict[str, Any]]) -> Any:
            return self.tokenizer.pad(rows, padding_side="left", return_tensors="pt")

        texts, writer = [""] * len(prompts), cast(Any, self.model)
        continues = not getattr(writer.config, "is_encoder_decoder", False)
        for numbers, batch in self.batches(prompts, INPUTS[:2], collate):
            ids = writer.generate(**batch, **settings)
            written = ids[:, batch["input_ids"].shape[1] :] if continues else ids
            decoded = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for number, text in zip(numbers, decoded, strict=True):
                texts[number] = text.strip()
        return texts
