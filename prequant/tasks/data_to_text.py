"""Putting data into words: E2E, WebNLG, DART. A decoder continues the data, written in a line, with a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from prequant.losses import CAUSAL_LM

from .base import Evaluation, Task
from .data import check_columns, check_length, mapped
from .errors import TaskError
from .metrics import BLEU, NIST, ROUGE_L, Metric
from .predicting import IGNORED, Collator, Reader

SEPARATOR = " ||"
"""Between the data and the text, as in the fine-tuning of GPT-2 by Hu et al. (arXiv 2106.09685)."""


@dataclass(frozen=True)
class Reading:
    """How rows with these ``columns`` are read: ``read`` gives the data in a line, and the texts that say it."""

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[str, list[str]]]


# ---- data, written in a line -----------------------------------------------------------------------------------------


def _slots(text: str) -> str:
    """``name[Blue Spice], eatType[pub]`` as ``name : Blue Spice | eatType : pub``."""
    slots = [slot.partition("[") for slot in text.strip().removesuffix("]").split("], ")]
    if not text.strip().endswith("]") or not all(bracket for _, bracket, _ in slots):
        raise TaskError(f"{text!r} is no meaning representation: expected name[value], name[value], ...")
    return " | ".join(f"{name} : {value}" for name, _, value in slots)


def _e2e(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    return _slots(row["mr"]), [row["ref"]]


def _e2e_of_hub(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    return _slots(row["meaning_representation"]), [row["human_reference"]]


def _dart(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    return _triples(row["tripleset"]), list(row["annotations"]["text"])


def _web_nlg(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    # The first of the sets of triples: the others say the same.
    triples = [[part.strip() for part in triple.split("|")] for triple in row["modified_triple_sets"]["mtriple_set"][0]]
    said = zip(row["lex"]["text"], row["lex"]["comment"], strict=True)
    return _triples(triples), [text for text, comment in said if comment != "bad"]


def _triples(triples: Sequence[Sequence[str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)


E2E = (Reading(("mr", "ref"), _e2e), Reading(("meaning_representation", "human_reference"), _e2e_of_hub))
DART = (Reading(("tripleset", "annotations"), _dart),)
WEB_NLG = (Reading(("modified_triple_sets", "lex"), _web_nlg),)


# ---- the task --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataToText(Task):
    """A text for some data. Rows become ``source``, the data in a line, and ``references``, all its texts.

    Trained on each text by itself, on the tokens of the text and the end token alone. Scored on each source once,
    against all its references; predictions are the texts. ``beams`` and ``length_penalty``: how the text is searched
    for, by default as Hu et al. (arXiv 2106.09685) do for E2E.
    """

    readings: tuple[Reading, ...]
    measures: tuple[Metric, ...] = (BLEU, ROUGE_L, NIST)
    beams: int = 10
    length_penalty: float = 0.9
    longest_text: int = 64

    kind: ClassVar[str] = CAUSAL_LM

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See :attr:`Task.metrics`."""
        return self.measures

    def checked(self, rows: Dataset, where: str) -> Dataset:
        """See :meth:`Task.checked`; the texts of the same data are brought together."""
        fitting = [reading for reading in self.readings if set(reading.columns) <= set(rows.column_names)]
        reading = (fitting or self.readings)[0]
        check_columns(rows, reading.columns, self.name, where)
        texts: dict[str, list[str]] = {}
        for number, row in enumerate(rows):
            try:
                source, references = reading.read(row)
            except TaskError as error:
                raise TaskError(f"{where}, row {number}: {error}") from error
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
                shown = {column: row[column] for column in reading.columns}
                raise TaskError(f"{where}: row {number} is not what {self.name} has: {shown}") from error
            if not all(isinstance(text, str) and text.strip() for text in references):
                raise TaskError(f"{where}: row {number} has a text that is none: {references}")
            texts.setdefault(source, []).extend(references)
        kept = {source: references for source, references in texts.items() if references}
        return Dataset.from_dict({"source": list(kept), "references": list(kept.values())})

    def prompt(self, source: str) -> str:
        """What the model continues."""
        return source + SEPARATOR

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
    ) -> Dataset:
        """See :meth:`Task.encode`; a row for each reference, ``labels`` that ignore the prompt.

        What is too long loses the end of its text.
        """
        self._check(tokenizer, max_length)

        def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
            encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
            for source, references in zip(batch["source"], batch["references"], strict=True):
                given = self._prompt_ids(tokenizer, source, max_length)
                for text in references:
                    written = [
                        *tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"],
                        tokenizer.eos_token_id,
                    ]
                    ids = (given + written)[:max_length]
                    encoded["input_ids"].append(ids)
                    encoded["attention_mask"].append([1] * len(ids))
                    encoded["labels"].append([IGNORED] * len(given) + ids[len(given) :])
            return encoded

        return mapped(rows, tokenize, f"tokenizing {self.name}", progress, batched=True)

    def _check(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise TaskError(f"task {self.name!r} needs a tokenizer with an end token, by which a model ends a text")
        check_length(self.longest_text + 2, max_length, tokenizer.model_max_length)

    def _prompt_ids(self, tokenizer: PreTrainedTokenizerBase, source: str, max_length: int) -> list[int]:
        """The prompt's tokens; of one that leaves no room for a text, the end."""
        ids: list[int] = tokenizer(self.prompt(source))["input_ids"]
        return ids[-(max_length - self.longest_text) :]

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """See :meth:`Task.collator`."""
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)

    def judged(self, reader: Reader, rows: Dataset) -> Evaluation:
        """See :meth:`Task.judged`."""
        tokenizer, length = reader.tokenizer, reader.limits.max_length
        self._check(tokenizer, length)
        ids = [self._prompt_ids(tokenizer, source, length) for source in rows["source"]]
        prompts = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
        settings: dict[str, Any] = {
            "max_new_tokens": self.longest_text,
            "num_beams": self.beams,
            "length_penalty": self.length_penalty,
            "do_sample": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        texts = reader.generated(prompts, **settings)
        return Evaluation(self.scores(texts, list(rows["references"])), len(rows), texts)
