"""The calibration set: texts without labels, in batches of similar length that stay the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prequant.checkpoint.tensors import hash_tensors
from prequant.tasks.data import check_texts, mapped, read_file
from prequant.tasks.predicting import INPUTS

from .modules import ReconstructionError

TEXT_COLUMNS = ("text", "sentence", "sentence1", "question1", "premise", "question", "context")
"""What a column of texts may be called; the first that a file has is read."""
PAIRS = {
    "sentence1": ("sentence2",),
    "question1": ("question2",),
    "premise": ("hypothesis",),
    "question": ("sentence", "context"),
}
"""Columns whose texts are read together with those of another: the first that there is."""


def encode_texts(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = True) -> Dataset:
    """The texts of a file as token ids, cut to ``max_length`` and not padded.

    The file is one of lines, or a table (parquet, csv, tsv, json lines) with a column of :data:`TEXT_COLUMNS`. Raises
    :class:`TaskError` for one that can't be read, and :class:`ReconstructionError` for one without texts.
    """
    rows = read_file(path)
    column = next((name for name in TEXT_COLUMNS if name in rows.column_names), None)
    if column is None:
        raise ReconstructionError(
            f"{path} has no column of texts: one of {', '.join(TEXT_COLUMNS)} is read; it has "
            f"{', '.join(rows.column_names)}"
        )
    columns = [column, *[name for name in PAIRS.get(column, ()) if name in rows.column_names][:1]]
    rows = rows.filter(lambda row: row[columns[0]] is not None and str(row[columns[0]]).strip() != "")
    check_texts(rows, columns, str(path))
    if not len(rows):
        raise ReconstructionError(f"{path} has no texts")

    def tokenize(batch: dict[str, list[str]]) -> Any:
        encoded: Any = tokenizer(*(batch[name] for name in columns), truncation=True, max_length=max_length)
        return dict(encoded)

    return mapped(rows, tokenize, "tokenizing the calibration set", progress, batched=True)


class CalibrationSet(Sequence[Mapping[str, Tensor]]):
    """Batches of a model's inputs, by number. Rows of similar length are together, so that there is little padding."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        if not batches:
            raise ReconstructionError("the calibration set is empty")
        self.batches = tuple(batches)

    @classmethod
    def of(
        cls, rows: Dataset, tokenizer: PreTrainedTokenizerBase, size: int, batch_size: int, seed: int
    ) -> CalibrationSet:
        """``size`` of the encoded rows, drawn by ``seed`` (all if there are no more), padded in each batch."""
        chosen = np.random.default_rng(seed).permutation(len(rows))[:size]
        columns = [name for name in rows.column_names if name in INPUTS]
        read = rows.select_columns(columns)
        lengths = [len(ids) for ids in read["input_ids"]]
        order = sorted(map(int, chosen), key=lambda row: (lengths[row], row))
        starts = range(0, len(order), batch_size)
        return cls(
            [
                dict(tokenizer.pad([read[row] for row in order[start : start + batch_size]], return_tensors="pt"))
                for start in starts
            ]
        )

    def __getitem__(self, number: Any) -> Any:
        return self.batches[number]

    def __len__(self) -> int:
        return len(self.batches)

    def spread(self, count: int) -> CalibrationSet:
        """So many batches (all if there are no more), from the shortest texts to the longest, evenly."""
        count = min(count, len(self))
        return CalibrationSet([self.batches[(2 * i + 1) * len(self) // (2 * count)] for i in range(count)])

    def to(self, device: torch.device) -> CalibrationSet:
        """The batches on a device."""
        return CalibrationSet([{name: value.to(device) for name, value in batch.items()} for batch in self.batches])

    @property
    def rows(self) -> int:
        """How many texts there are."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all batches, in hexadecimal."""
        sha = hashlib.sha256()
        for batch in self.batches:
            hash_tensors(sha, batch)
        return sha.hexdigest()

    def order(self, seed: int) -> Iterator[int]:
        """Numbers of batches without an end: all of them in an order drawn by the seed, and then again in another."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(self), generator=generator).tolist()
