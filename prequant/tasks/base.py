"""What a task is: where its data comes from, what a model reads of it, and how a model is scored on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .data import SPLITS, described, read_splits
from .metrics import Metric
from .predicting import Collator, Limits, Reader

LIMITS = Limits()


@dataclass(frozen=True)
class Evaluation:
    """What a model scored on ``examples`` rows.

    ``scores`` by the name of the metric, the task's first metric first. ``predictions``: one for each row, in the order
    of the rows; what they are says the task.
    """

    scores: Mapping[str, float]
    examples: int
    predictions: Any

    @property
    def metric_name(self) -> str:
        """The task's first metric, by which models are compared."""
        return next(iter(self.scores))

    @property
    def metric(self) -> float:
        """The score by that metric."""
        return self.scores[self.metric_name]

    def text(self) -> str:
        """All scores in a line."""
        return ", ".join(f"{name} {score:.4f}" for name, score in self.scores.items())


@dataclass(frozen=True)
class Task(ABC):
    """A task.

    ``hub``: what ``datasets.load_dataset`` takes to find its data on the hub. ``validation``: what the rows to score on
    may be called there, and in files. ``has_sample``: whether the sentences that prequant ships are for this task.
    """

    name: str
    hub: tuple[str, ...]
    validation: tuple[str, ...] = field(default=SPLITS["validation"], kw_only=True)
    has_sample: bool = field(default=False, kw_only=True)

    kind: ClassVar[str] = ""
    """The loss and the head that it takes: one of ``prequant.losses.CLASSES``."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[Metric, ...]:
        """How it is scored; models are compared by the first."""

    def load(self, path: str | Path | None = None) -> DatasetDict:
        """Its ``train`` and ``validation`` rows, checked; ``path`` as in :func:`prequant.tasks.data.read_splits`.

        Raises :class:`TaskError` if they can't be read, or a split, column or value is missing or not what it has.
        """
        splits = read_splits(self.name, self.hub, path, self.validation, self.has_sample)
        source = described(self.hub, path)
        return DatasetDict({name: self.checked(rows, f"the {name} split of {source}") for name, rows in splits.items()})

    @abstractmethod
    def checked(self, rows: Dataset, where: str) -> Dataset:
        """Rows as the task takes them, from rows as they were read; ``where`` they were read, for messages.

        Raises :class:`TaskError` for those that are not the task's.
        """

    @abstractmethod
    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True
    ) -> Dataset:
        """What a model trains on: token ids and labels of rows, cut to ``max_length`` tokens, not padded.

        Raises :class:`TaskError` for a ``max_length`` that leaves no room for text, or is longer than the tokenizer's
        model takes.
        """

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collator:
        """What makes a batch of encoded rows."""

    def evaluate(
        self,
        model: nn.Module,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits = LIMITS,
        progress: bool = True,
    ) -> Evaluation:
        """Score ``model`` on rows, on the device that it is on. The model is left in eval mode."""
        words = f"evaluating {self.name}"
        return self.judged(Reader(model, tokenizer, self.collator(tokenizer), limits, words, progress), rows)

    @abstractmethod
    def judged(self, reader: Reader, rows: Dataset) -> Evaluation:
        """The score of the model that reads, on rows."""

    def scores(self, predictions: Any, targets: Any) -> dict[str, float]:
        """Every metric's score."""
        return {metric.name: metric(predictions, targets) for metric in self.metrics}

    def head_options(self) -> dict[str, Any]:
        """What the configuration of a model with a head for this task says, beyond the model's own."""
        return {}

    def misfit(self, config: PretrainedConfig) -> str:
        """Why a model with a head of the right kind does not serve this task; empty if it does."""
        return ""

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower score is a better one, by the first metric."""
        return self.metrics[0].lower_is_better

    def goodness(
        self, model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limits: Limits = LIMITS
    ) -> float:
        """The first metric's score of a model on rows, negative where less is better, without a progress bar."""
        score = self.evaluate(model, rows, tokenizer, limits, progress=False).metric
        return -score if self.lower_is_better else score

    def check_metrics(self) -> None:
        """Raise :class:`TaskError` if a library that scores it is not installed: before any work, not after."""
        for metric in self.metrics:
            metric.check()


def class_options(labels: Sequence[str]) -> dict[str, Any]:
    """What the configuration of a model says about its classes."""
    names = dict(enumerate(labels))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def class_misfit(config: PretrainedConfig, task: str, classes: int) -> str:
    """Why a model's classes are not a task's; empty if they are as many."""
    return "" if config.num_labels == classes else f"it has {config.num_labels} classes; {task} has {classes}"
