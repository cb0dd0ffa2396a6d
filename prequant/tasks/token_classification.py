"""A class for each word: names, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, PretrainedConfig, PreTrainedTokenizerBase

from prequant.losses import TOKEN_CLASSIFICATION

from .base import Evaluation, Task, class_misfit, class_options
from .data import check_columns, check_length, check_values, mapped
from .errors import TaskError
from .metrics import ENTITY_F1, TOKEN_ACCURACY, Metric
from .predicting import IGNORED, Collator, Reader


@dataclass(frozen=True)
class TokenClassification(Task):
    """A class for each word of a text that comes as words: of its first token.

    ``labels``: names of the classes, in the order of their numbers; with ``B-`` and ``I-``, where they name parts of
    entities. ``words`` and ``tags``: the columns with the words and their classes. Predictions are the names of the
    classes, a list for each row; words that were cut off count as ``labels[0]``.
    """

    labels: tuple[str, ...] = ()
    words: str = "tokens"
    tags: str = "ner_tags"

    kind: ClassVar[str] = TOKEN_CLASSIFICATION

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See :attr:`Task.metrics`."""
        return (ENTITY_F1, TOKEN_ACCURACY)

    def checked(self, rows: Dataset, where: str) -> Dataset:
        """See :meth:`Task.checked`."""
        check_columns(rows, (self.words, self.tags), self.name, where)
        check_values(rows, [self.words], where, _is_words, "a list of words")
        for number, (words, tags) in enumerate(zip(rows[self.words], rows[self.tags], strict=True)):
            if len(words) != len(tags):
                raise TaskError(f"{where}: row {number} has {len(words)} words and {len(tags)} {self.tags}")
            for tag in tags:
                if not isinstance(tag, int) or not 0 <= tag < len(self.labels):
                    expected = f"the integers 0 ({self.labels[0]}) to {len(self.labels) - 1} ({self.labels[-1]})"
                    raise TaskError(f"{where}: {self.tags} of row {number} holds {tag!r}, not one of {expected}")
        return rows.select_columns([self.words, self.tags])

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
    ) -> Dataset:
        """See :meth:`Task.encode`; ``labels`` are those of each word at its first token, :data:`IGNORED` elsewhere."""
        if not tokenizer.is_fast:
            raise TaskError(f"task {self.name!r} needs a fast tokenizer, which says which word a token is of")
        special: int = tokenizer.num_special_tokens_to_add()
        check_length(special + 1, max_length, tokenizer.model_max_length)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded: Any = tokenizer(
                batch[self.words], is_split_into_words=True, truncation=True, max_length=max_length
            )
            labels = [_at_first_tokens(tags, encoded.word_ids(i)) for i, tags in enumerate(batch[self.tags])]
            return {**encoded, "labels": labels}

        return mapped(rows, tokenize, f"tokenizing {self.name}", progress, batched=True)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """See :meth:`Task.collator`."""
        return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)

    def judged(self, reader: Reader, rows: Dataset) -> Evaluation:
        """See :meth:`Task.judged`."""
        encoded = self.encode(rows, reader.tokenizer, reader.limits.max_length, reader.progress)
        found = reader.outputs(encoded, ["logits"])
        predicted = []
        for logits, labels, tags in zip(found["logits"], encoded["labels"], rows[self.tags], strict=True):
            firsts = np.flatnonzero(np.asarray(labels) != IGNORED)
            # Padding stands on the side of the tokenizer: tokens are counted from the other.
            tokens = logits[: len(labels)] if reader.tokenizer.padding_side == "right" else logits[-len(labels) :]
            names = [self.labels[i] for i in tokens[firsts].argmax(1)]
            predicted.append(names + [self.labels[0]] * (len(tags) - len(names)))
        true = [[self.labels[tag] for tag in tags] for tags in rows[self.tags]]
        return Evaluation(self.scores(predicted, true), len(rows), predicted)

    def head_options(self) -> dict[str, Any]:
        """Names of the classes."""
        return class_options(self.labels)

    def misfit(self, config: PretrainedConfig) -> str:
        """See :meth:`Task.misfit`."""
        return class_misfit(config, self.name, len(self.labels))


def _is_words(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(word, str) for word in value)


def _at_first_tokens(tags: Sequence[int], words: Sequence[int | None]) -> list[int]:
    """The tag of each word at its first token."""
    before = [None, *words[:-1]]
    pairs = zip(words, before, strict=True)
    return [tags[word] if word is not None and word != previous else IGNORED for word, previous in pairs]
