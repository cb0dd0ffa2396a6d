"""Continuing running text: perplexity, with windows that overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from prequant.losses import CAUSAL_LM

from .base import Evaluation, Task
from .data import check_columns, check_length, check_texts, mapped
from .errors import TaskError
from .metrics import PERPLEXITY, Metric
from .predicting import IGNORED, Collator, Reader

COLUMNS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class LanguageModelling(Task):
    """The next token of running text; rows are its lines, in order.

    Trained on pieces of ``max_length`` tokens, one behind the other. Scored with windows of that length, each
    ``stride`` tokens (a share of the window) further on than the one before: what a window shares with those before
    is context and not scored again, so each token but the first is scored once. Predictions: None.
    """

    column: str = "text"
    stride: float = 0.5

    kind: ClassVar[str] = CAUSAL_LM

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See :attr:`Task.metrics`; per token of the model's own tokenizer, so not to be compared across tokenizers."""
        return (PERPLEXITY,)

    def checked(self, rows: Dataset, where: str) -> Dataset:
        """See :meth:`Task.checked`."""
        check_columns(rows, [self.column], self.name, where)
        check_texts(rows, [self.column], where)
        return rows.select_columns([self.column])

    def _ids(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool) -> list[int]:
        """The tokens of all lines, without special ones."""
        check_length(2, max_length, tokenizer.model_max_length)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            return {"ids": tokenizer(batch[self.column], add_special_tokens=False, verbose=False)["input_ids"]}

        lines = mapped(rows, tokenize, f"tokenizing {self.name}", progress, batched=True)
        ids = list(chain.from_iterable(lines["ids"]))
        if len(ids) < 2:
            raise TaskError(f"task {self.name!r} needs two tokens at least; the text has {len(ids)}")
        return ids

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
    ) -> Dataset:
        """See :meth:`Task.encode`; what is left at the end is a shorter piece."""
        ids = self._ids(rows, tokenizer, max_length, progress)
        pieces = [ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length)]
        return Dataset.from_dict(
            {"input_ids": pieces, "attention_mask": [[1] * len(piece) for piece in pieces], "labels": pieces}
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """See :meth:`Task.collator`."""
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def windows(self, ids: list[int], max_length: int) -> Dataset:
        """Windows over a text, with ``labels`` for those tokens that no earlier window scores."""
        step = max(1, min(max_length - 1, round(max_length * self.stride)))
        rows: dict[str, list[list[int]]] = {name: [] for name in COLUMNS}
        scored = 1  # the first token follows nothing
        for start in range(0, len(ids), step):
            window = ids[start : start + max_length]
            rows["input_ids"].append(window)
            rows["attention_mask"].append([1] * len(window))
            rows["labels"].append([IGNORED] * (scored - start) + window[scored - start :])
            scored = start + len(window)
            if scored == len(ids):
                break
        return Dataset.from_dict(rows)

    def judged(self, reader: Reader, rows: Dataset) -> Evaluation:
        """See :meth:`Task.judged`."""
        length = reader.limits.max_length
        ids = self._ids(rows, reader.tokenizer, length, reader.progress)
        total: list[float] = []
        for _, batch in reader.batches(self.windows(ids, length), COLUMNS):
            labels = batch.pop("labels")
            logits = reader.model(**batch).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total.append(float(losses))
        scored = len(ids) - 1
        return Evaluation(self.scores(math.fsum(total), scored), scored, None)
