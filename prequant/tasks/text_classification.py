"""Classification as text, for models that read text and write text: the answer is the name of the class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from prequant.losses import SEQ2SEQ_LM

from .base import Evaluation, Task
from .classification import SequenceClassification
from .data import check_length, mapped
from .metrics import Metric
from .predicting import Collator, Reader

NO_CLASS = -1
"""The prediction where a model writes something that is the name of no class."""
STEP = 0.2
"""Numbers are rounded to multiples of this, so that there are few texts to learn: as T5 does for similarities."""


@dataclass(frozen=True)
class TextClassification(Task):
    """A classification task in T5's words (Raffel et al., arXiv 1910.10683, appendix D).

    What the model reads is the name of the data set, then each column with its name before it: ``sst2 sentence: ...``.
    What it writes is the name of the class, or a number. Predictions are class numbers, or numbers; for a text that is
    neither, :data:`NO_CLASS`, or 0.
    """

    of: SequenceClassification

    kind: ClassVar[str] = SEQ2SEQ_LM

    def load(self, path: str | Path | None = None) -> DatasetDict:
        """See :meth:`Task.load`: the rows, and the names of splits, are those of the task that it is in other words."""
        return self.of.load(path)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See :attr:`Task.metrics`."""
        return self.of.metrics

    def checked(self, rows: Dataset, where: str) -> Dataset:
        """See :meth:`Task.checked`."""
        return self.of.checked(rows, where)

    def prompt(self, row: dict[str, Any]) -> str:
        """What the model reads of a row."""
        return " ".join([self.of.hub[-1], *(f"{column}: {row[column]}" for column in self.of.text)])

    def target(self, label: float) -> str:
        """What the model is to write."""
        return self.of.labels[int(label)] if self.of.labels else f"{round(label / STEP) * STEP:.1f}"

    def read(self, text: str) -> float:
        """The class, or the number, that a text stands for."""
        if self.of.labels:
            return self.of.labels.index(text) if text in self.of.labels else NO_CLASS
        try:
            number = float(text)
        except ValueError:
            return 0.0
        return number if np.isfinite(number) else 0.0

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
    ) -> Dataset:
        """See :meth:`Task.encode`; ``labels`` are the tokens of what is to be written."""
        check_length(1 + tokenizer.num_special_tokens_to_add(), max_length, tokenizer.model_max_length)

        def tokenize(row: dict[str, Any]) -> dict[str, Any]:
            encoded: Any = tokenizer(self.prompt(row), truncation=True, max_length=max_length)
            written: Any = tokenizer(text_target=self.target(row["label"]))
            ids = {name: encoded[name] for name in ("input_ids", "attention_mask")}
            return {**ids, "labels": written["input_ids"]}

        return mapped(rows, tokenize, f"tokenizing {self.name}", progress)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """See :meth:`Task.collator`."""
        return DataCollatorForSeq2Seq(tokenizer)

    def judged(self, reader: Reader, rows: Dataset) -> Evaluation:
        """See :meth:`Task.judged`; the model writes greedily."""
        encoded = self.encode(rows, reader.tokenizer, reader.limits.max_length, reader.progress)
        longest = max(map(len, encoded["labels"]))
        settings = {"max_new_tokens": longest, "do_sample": False, "num_beams": 1}
        texts = reader.generated(encoded, **settings)
        predicted, true = np.asarray([self.read(text) for text in texts]), np.asarray(rows["label"])
        return Evaluation(self.scores(predicted, true), len(rows), predicted)
