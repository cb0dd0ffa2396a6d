"""Classes or numbers for a text or a pair of texts: the tasks of GLUE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PretrainedConfig, PreTrainedTokenizerBase

from prequant.losses import SEQUENCE_CLASSIFICATION

from .base import Evaluation, Task, class_misfit, class_options
from .data import check_columns, check_length, check_texts, mapped
from .errors import TaskError
from .metrics import ACCURACY, Metric
from .predicting import Collator, Reader

HIDDEN_LABEL = -1
"""What GLUE's test sets carry instead of a label."""
REGRESSION = "regression"


@dataclass(frozen=True)
class SequenceClassification(Task):
    """One class, or one number, for one or two texts.

    ``text``: the columns with the text, one or two. ``labels``: names of the classes, in the order of their numbers;
    none for a number, such as a similarity. ``measures`` take predicted and true classes, or numbers, [rows].
    Predictions are the logits [rows, classes].
    """

    text: tuple[str, ...] = ("sentence",)
    labels: tuple[str, ...] = ()
    measures: tuple[Metric, ...] = (ACCURACY,)

    kind: ClassVar[str] = SEQUENCE_CLASSIFICATION

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See :attr:`Task.metrics`."""
        return self.measures

    def checked(self, rows: Dataset, where: str) -> Dataset:
        """See :meth:`Task.checked`."""
        check_columns(rows, (*self.text, "label"), self.name, where)
        check_texts(rows, self.text, where)
        self._check_labels(rows, where)
        return rows.select_columns([*self.text, "label"])

    def _check_labels(self, rows: Dataset, where: str) -> None:
        if not self.labels:
            for number, label in enumerate(rows["label"]):
                if not isinstance(label, (int, float)) or not np.isfinite(label):
                    raise TaskError(f"{where}: the label {label!r} of row {number} is no finite number")
            return
        labels = np.asarray(rows["label"])
        expected = f"the integers 0 ({self.labels[0]}) to {len(self.labels) - 1} ({self.labels[-1]})"
        if not np.issubdtype(labels.dtype, np.integer):
            odd = next((label for label in rows["label"] if not isinstance(label, int)), labels[0])
            raise TaskError(f"{where}: the label {odd!r} is no integer; expected {expected}")
        wrong = labels[(labels < 0) | (labels >= len(self.labels))]
        if wrong.size:
            hint = "; it looks like a test split with hidden labels" if (wrong == HIDDEN_LABEL).all() else ""
            raise TaskError(f"{where}: the label {int(wrong[0])} is not one of {expected}{hint}")

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
    ) -> Dataset:
        """See :meth:`Task.encode`; the label becomes ``labels``."""
        special: int = tokenizer.num_special_tokens_to_add(pair=len(self.text) == 2)
        check_length(special + len(self.text), max_length, tokenizer.model_max_length)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            texts = (batch[column] for column in self.text)
            encoded: Any = tokenizer(*texts, truncation=True, max_length=max_length)
            labels = batch["label"] if self.labels else [float(label) for label in batch["label"]]
            return {**encoded, "labels": labels}

        return mapped(rows, tokenize, f"tokenizing {self.name}", progress, batched=True)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """See :meth:`Task.collator`."""
        return DataCollatorWithPadding(tokenizer)

    def judged(self, reader: Reader, rows: Dataset) -> Evaluation:
        """See :meth:`Task.judged`."""
        encoded = self.encode(rows, reader.tokenizer, reader.limits.max_length, reader.progress)
        found = reader.outputs(encoded, ["logits"])
        logits = np.stack(found["logits"])
        predicted = logits.argmax(1) if self.labels else logits[:, 0]
        true = np.asarray(encoded["labels"])
        return Evaluation(self.scores(predicted, true), len(rows), logits)

    def head_options(self) -> dict[str, Any]:
        """Names of the classes, or that it is a number."""
        if not self.labels:
            return {"num_labels": 1, "problem_type": REGRESSION}
        return class_options(self.labels)

    def misfit(self, config: PretrainedConfig) -> str:
        """See :meth:`Task.misfit`."""
        return class_misfit(config, self.name, max(1, len(self.labels)))
