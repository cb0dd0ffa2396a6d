"""Tasks: which columns hold the text and the label, and how predictions are scored. Data comes from a hub, a folder or
a file.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset

from prequant.quiet import no_progress_bars
from prequant.runtime import PrequantError

Metric = Callable[[np.ndarray, np.ndarray], float]
SAMPLE = "sample"
"""In place of a data path: the few hundred labelled sentences that prequant ships."""

HIDDEN_LABEL = -1
"""What GLUE's test sets carry instead of a label."""


class TaskError(PrequantError):
    """A task or data set that is not what it should be."""


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal entries."""
    return float((predictions == labels).mean())


@dataclass(frozen=True)
class Task:
    """A sequence classification task.

    ``text``: the columns with the text, one or two. ``labels``: names of the classes, in the order of their numbers.
    ``metric`` takes predicted and true class numbers ``[examples]``. ``hub``: where ``datasets.load_dataset`` finds it.
    """

    name: str
    text: tuple[str, ...]
    labels: tuple[str, ...]
    metric_name: str
    metric: Metric
    hub: tuple[str, str]


TASKS: Mapping[str, Task] = {
    "sst2": Task("sst2", ("sentence",), ("negative", "positive"), "accuracy", accuracy, ("nyu-mll/glue", "sst2")),
}


def task(name: str) -> Task:
    """The task of that name. Raises :class:`TaskError` if there is none."""
    if name not in TASKS:
        raise TaskError(f"task {name!r} is unknown; known are {', '.join(sorted(TASKS))}")
    return TASKS[name]


# ---- data ------------------------------------------------------------------------------------------------------------

READERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    # A quotation mark is a character like any other, as in GLUE's files: read as the start of a quoted field, one at
    # the beginning of a sentence would swallow all rows up to the next.
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
}
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev")}


def load_task_data(task: Task, path: str | Path | None = None) -> DatasetDict:
    """The ``train`` and ``validation`` sets of a task.

    ``path``: a folder with ``train.*`` and ``validation.*`` (or ``dev.*``) as parquet, csv, tsv (without quoting) or
    json lines; one such file with a ``split`` column; ``"sample"`` for the sentences shipped with prequant; None for
    the hub. Raises :class:`TaskError` if data can't be read, or a split, column, text or label is missing or not what
    the task has.
    """
    if path is None:
        splits = _from_hub(task)
    elif str(path) == SAMPLE:
        with resources.as_file(resources.files("prequant") / "data" / "sentences.tsv") as file:
            splits = _split_by_column(_read(file), file)
    elif Path(path).is_dir():
        splits = {name: _read(_split_file(Path(path), name)) for name in SPLITS}
    else:
        splits = _split_by_column(_read(Path(path)), Path(path))
    return DatasetDict({name: _checked(rows, task, name, path) for name, rows in splits.items()})


def _from_hub(task: Task) -> dict[str, Dataset]:
    where = "/".join(task.hub)
    try:
        found = load_dataset(*task.hub)
    except (
        Exception
    ) as error:  # no network, no such data set, no disk space: whatever it is, here is what to do instead
        raise TaskError(
            f"the data set {where} of task {task.name!r} can't be had from the hub ({_first_line(error)}); "
            f"give a path with the data, or {SAMPLE!r}"
        ) from error
    if missing := [name for name in SPLITS if name not in found]:
        raise TaskError(f"the data set {where} has no {missing[0]} split; it has {', '.join(found)}")
    return {name: found[name] for name in SPLITS}


def _split_file(folder: Path, split: str) -> Path:
    candidates = [folder / (stem + suffix) for stem in SPLITS[split] for suffix in READERS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    present = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise TaskError(f"{folder} has no {split} split: expected {split}{{{','.join(READERS)}}}, found {present}")


def _read(file: Path) -> Dataset:
    if not file.is_file():
        raise TaskError(f"data path {str(file)!r} does not exist")
    if file.suffix not in READERS:
        raise TaskError(f"{file} is of no known type; use one of {', '.join(READERS)}")
    builder, options = READERS[file.suffix]
    try:
        with no_progress_bars():
            return load_dataset(builder, data_files={"rows": str(file)}, split="rows", **options)
    except Exception as error:  # each format has errors of its own, and the library wraps some of them once more
        raise TaskError(f"{file} can't be read as {builder}: {_first_line(error.__cause__ or error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _split_by_column(rows: Dataset, file: Path) -> dict[str, Dataset]:
    if "split" not in rows.column_names:
        raise TaskError(
            f"{file} holds one table, which needs a column 'split' of train and validation; it has "
            + ", ".join(rows.column_names)
        )
    split = np.asarray(rows["split"])
    return {name: rows.select(np.flatnonzero(np.isin(split, names))) for name, names in SPLITS.items()}


def _checked(rows: Dataset, task: Task, split: str, path: str | Path | None) -> Dataset:
    where = f"the {split} split of {path or '/'.join(task.hub)}"
    for column in (*task.text, "label"):
        if column not in rows.column_names:
            raise TaskError(
                f"{where} has no column {column!r}, which task {task.name!r} needs; it has "
                + ", ".join(rows.column_names)
            )
    if not len(rows):
        raise TaskError(f"{where} is empty")
    for column in task.text:
        for number, text in enumerate(rows[column]):
            if not isinstance(text, str):
                raise TaskError(f"{where}: {column!r} of row {number} is {text!r}, not text")
    labels = np.asarray(rows["label"])
    expected = f"the integers 0 ({task.labels[0]}) to {len(task.labels) - 1} ({task.labels[-1]})"
    if not np.issubdtype(labels.dtype, np.integer):
        odd = next((label for label in rows["label"] if not isinstance(label, int)), labels[0])
        raise TaskError(f"{where}: the label {odd!r} is no integer; expected {expected}")
    wrong = labels[(labels < 0) | (labels >= len(task.labels))]
    if wrong.size:
        hint = "; it looks like a test split with hidden labels" if (wrong == HIDDEN_LABEL).all() else ""
        raise TaskError(f"{where}: the label {int(wrong[0])} is not one of {expected}{hint}")
    return rows.select_columns([*task.text, "label"])


def encode(rows: Dataset, task: Task, tokenizer: Any, max_length: int, progress: bool = True) -> Dataset:
    """Tokenize, cut to ``max_length`` tokens, not padded; the label becomes ``labels``.

    Raises :class:`TaskError` for a ``max_length`` that leaves no room for text, or is longer than the tokenizer's model
    takes.
    """
    shortest = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2) + len(task.text)
    if not shortest <= max_length <= tokenizer.model_max_length:
        raise TaskError(f"max_length={max_length}: expected {shortest} to {tokenizer.model_max_length} tokens")

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[column] for column in task.text), truncation=True, max_length=max_length)
        return {**encoded, "labels": batch["label"]}

    with contextlib.nullcontext() if progress else no_progress_bars():
        return rows.map(tokenize, batched=True, remove_columns=rows.column_names, desc=f"tokenizing {task.name}")
