"""Extractive question answering, as in SQuAD: the answer is a span of the context."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from prequant.losses import QUESTION_ANSWERING

from .base import Evaluation, Task
from .data import check_columns, check_length, check_texts, check_values, mapped
from .errors import TaskError
from .metrics import Metric
from .predicting import Collator, Reader

COLUMNS = ("question", "context", "answers")
START, END, OFFSETS, ROW = "start_positions", "end_positions", "offsets", "row"
BEST = 20
"""Candidates for the first and for the last token of an answer that are looked at."""


# ---- the score -------------------------------------------------------------------------------------------------------


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks: how SQuAD's official script compares answers."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(answer: str, truth: str) -> float:
    """Whether two answers are the same, normalized."""
    return float(normalized(answer) == normalized(truth))


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall of an answer's words, normalized."""
    said, true = normalized(answer).split(), normalized(truth).split()
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true)) if common else 0.0


def _best(score: Callable[[str, str], float]) -> Callable[[Any, Any], float]:
    """The mean over questions, in percent, of the best score against any of the true answers."""

    def mean(answers: Sequence[str], truths: Sequence[Sequence[str]]) -> float:
        pairs = zip(answers, truths, strict=True)
        return 100 * float(np.mean([max(score(answer, truth) for truth in several) for answer, several in pairs]))

    return mean


F1 = Metric("F1", _best(token_f1))
EXACT_MATCH = Metric("exact match", _best(exact_match))


# ---- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Where in a context the answer to a question stands; every question has one.

    Contexts that are too long are cut into parts that overlap by ``stride`` tokens, each beside the whole question. An
    answer has ``longest_answer`` tokens at most. Predictions are the answers as text.
    """

    stride: int = 64
    longest_answer: int = 30

    kind: ClassVar[str] = QUESTION_ANSWERING

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See :attr:`Task.metrics`."""
        return (F1, EXACT_MATCH)

    def checked(self, rows: Dataset, where: str) -> Dataset:
        """See :meth:`Task.checked`."""
        check_columns(rows, COLUMNS, self.name, where)
        check_texts(rows, COLUMNS[:2], where)
        check_values(rows, ["answers"], where, _is_answers, "{text: [answer, ...], answer_start: [position, ...]}")
        for number, (context, answers) in enumerate(zip(rows["context"], rows["answers"], strict=True)):
            for text, start in zip(answers["text"], answers["answer_start"], strict=True):
                if context[start : start + len(text)] != text:
                    raise TaskError(
                        f"{where}: the answer {text!r} of row {number} does not stand at {start} of its context"
                    )
        return rows.select_columns(list(COLUMNS))

    # ---- tokens

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
    ) -> Dataset:
        """See :meth:`Task.encode`; one row for each part of a context, with the first answer's ``start_positions`` and
        ``end_positions``: of the first token, or the one for the whole text, where the part does not hold it.
        """

        def targets(batch: dict[str, list[Any]]) -> dict[str, Any]:
            found = [
                _span(answers["answer_start"][0], answers["text"][0], offsets)
                for answers, offsets in zip(batch["answers"], batch[OFFSETS], strict=True)
            ]
            return {START: [start for start, _ in found], END: [end for _, end in found]}

        parts = self._parts(rows, tokenizer, max_length, progress)
        answered = parts.add_column("answers", [rows["answers"][number] for number in parts[ROW]])
        columns, words = ["answers", OFFSETS], f"finding answers of {self.name}"
        spans = mapped(answered.select_columns(columns), targets, words, progress, batched=True)
        kept = parts.remove_columns([OFFSETS, ROW])
        return kept.add_column(START, list(spans[START])).add_column(END, list(spans[END]))

    def _parts(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool) -> Dataset:
        """Each part of each context, with its row, and where each token stands in the context; [] for other tokens."""
        if not tokenizer.is_fast:
            raise TaskError(f"task {self.name!r} needs a fast tokenizer, which says where in the text a token stands")
        special: int = tokenizer.num_special_tokens_to_add(pair=True)
        check_length(self.stride + special + 2, max_length, tokenizer.model_max_length)

        def tokenize(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            room = max_length - special - self.stride - 1  # a question leaves some of the context in each part
            asked: Any = tokenizer(
                batch["question"],
                add_special_tokens=False,
                truncation=True,
                max_length=room,
                return_offsets_mapping=True,
            )
            ends = [places[-1][1] if places else 0 for places in asked["offset_mapping"]]
            given = [question[:end] for question, end in zip(batch["question"], ends, strict=True)]
            encoded: Any = tokenizer(
                given,
                batch["context"],
                truncation="only_second",
                max_length=max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            offsets = [
                [list(place) if of == 1 else [] for place, of in zip(places, encoded.sequence_ids(i), strict=True)]
                for i, places in enumerate(encoded.pop("offset_mapping"))
            ]
            row = [numbers[sample] for sample in encoded.pop("overflow_to_sample_mapping")]
            return {**encoded, OFFSETS: offsets, ROW: row}

        return mapped(rows, tokenize, f"tokenizing {self.name}", progress, batched=True, with_indices=True)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """See :meth:`Task.collator`."""
        return DataCollatorWithPadding(tokenizer)

    # ---- answers

    def judged(self, reader: Reader, rows: Dataset) -> Evaluation:
        """See :meth:`Task.judged`."""
        parts = self._parts(rows, reader.tokenizer, reader.limits.max_length, reader.progress)
        logits = ("start_logits", "end_logits")
        found = reader.outputs(parts, logits)
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(rows)
        contexts = rows["context"]
        for row, offsets, start, end in zip(parts[ROW], parts[OFFSETS], *(found[name] for name in logits), strict=True):
            score, first, last = self._best_span(start, end, offsets)
            if score > best[row][0]:
                best[row] = score, contexts[row][first:last]
        answers = [text for _, text in best]
        truths = [answers_of["text"] for answers_of in rows["answers"]]
        return Evaluation(self.scores(answers, truths), len(rows), answers)

    def _best_span(
        self, start: np.ndarray, end: np.ndarray, offsets: Sequence[Sequence[int]]
    ) -> tuple[float, int, int]:
        """The likeliest span of the context: its score, and where it begins and ends in the text."""
        inside = np.flatnonzero([bool(place) for place in offsets])
        if not inside.size:
            return -np.inf, 0, 0
        firsts = inside[np.argsort(-start[inside], kind="stable")[:BEST]]
        lasts = inside[np.argsort(-end[inside], kind="stable")[:BEST]]
        scores = start[firsts][:, None] + end[lasts][None, :]
        apart = lasts[None, :] - firsts[:, None]
        scores = np.where((apart >= 0) & (apart < self.longest_answer), scores, -np.inf)
        i, j = np.unravel_index(int(scores.argmax()), scores.shape)
        return float(scores[i, j]), offsets[firsts[i]][0], offsets[lasts[j]][1]


def _is_answers(value: Any) -> bool:
    if not isinstance(value, Mapping) or not {"text", "answer_start"} <= value.keys():
        return False
    texts, starts = value["text"], value["answer_start"]
    right = all(isinstance(text, str) for text in texts) and all(isinstance(start, int) for start in starts)
    return right and len(texts) == len(starts) > 0


def _span(position: int, text: str, offsets: Sequence[Sequence[int]]) -> tuple[int, int]:
    """First and last token of an answer that begins at ``position``; (0, 0) where these tokens don't hold all of it."""
    places = [(token, place) for token, place in enumerate(offsets) if place]
    last = position + len(text)
    if not places or places[0][1][0] > position or places[-1][1][1] < last:
        return 0, 0
    first_token = max(token for token, place in places if place[0] <= position)
    last_token = min(token for token, place in places if place[1] >= last)
    return first_token, last_token
