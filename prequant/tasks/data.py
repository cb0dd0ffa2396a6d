"""Reading data sets: from the hub, a folder, or files, by split; and the checks of columns that tasks share."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from prequant.quiet import no_progress_bars

from .errors import TaskError

SAMPLE = "sample"
"""In place of a data path: the few hundred labelled sentences that prequant ships."""

READERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    # A quotation mark is a character like any other, as in GLUE's files: read as the start of a quoted field, one at
    # the beginning of a sentence would swallow all rows up to the next.
    ".tsv": ("csv", {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".txt": ("text", {"keep_linebreaks": True}),
}
"""Types of files by suffix; each may be compressed, with ``.gz`` after it."""
SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "trainset"),
    "validation": ("validation", "valid", "dev", "devset"),
}
"""The splits of a data set, each with what its file, its part of a file, or the hub may call it."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = re.compile(r"(train|validation)=")
"""How a path begins that names a file for each split."""


def read_splits(
    task: str,
    hub: Sequence[str],
    path: str | Path | None = None,
    validation: Sequence[str] = SPLITS["validation"],
    sample: bool = False,
) -> dict[str, Dataset]:
    """The rows of ``train`` and ``validation``, as they are.

    ``path``: a folder with ``train.*`` and ``validation.*`` (or ``dev.*``) as parquet, csv, tsv (without quoting), json
    lines or text; one such file with a ``split`` column; ``train=FILE,validation=FILE``; ``owner/name`` of a data set
    on the hub; ``"sample"`` for the sentences shipped with prequant, where the task is theirs (``sample``); None for
    ``hub``, which is what ``datasets.load_dataset`` takes. ``validation``: what the second split may be called. Raises
    :class:`TaskError`.
    """
    names = {**SPLITS, "validation": tuple(validation)}
    if path is None:
        return _from_hub(task, hub, names, sample)
    text = str(path)
    if text == SAMPLE:
        if not sample:
            raise TaskError(f"prequant ships no sample for task {task!r}: its sentences are sst2's")
        with resources.as_file(resources.files("prequant") / "data" / "sentences.tsv") as file:
            return _split_by_column(read_file(file), file, names)
    if FILES.match(text):
        return {split: read_file(file) for split, file in _listed(text).items()}
    if Path(path).is_dir():
        return {split: read_file(_split_file(Path(path), stems)) for split, stems in names.items()}
    if _is_hub_name(path) and not Path(path).exists():
        return _from_hub(task, (text,), names, sample)
    return _split_by_column(read_file(Path(path)), Path(path), names)


def described(hub: Sequence[str], path: str | Path | None) -> str:
    """Where data came from, in words."""
    return "/".join(hub) if path is None else str(path)


def _is_hub_name(path: str | Path) -> bool:
    return isinstance(path, str) and bool(HUB_NAME.fullmatch(path)) and not reader_of(Path(path))


def reader_of(file: Path) -> str:
    """The suffix in :data:`READERS` that a file goes by; empty if it is of no known type."""
    name = file.name.removesuffix(".gz")
    return next((suffix for suffix in READERS if name.endswith(suffix)), "")


def read_file(file: Path) -> Dataset:
    """The rows of a file. Raises :class:`TaskError` if it is not there, or can't be read as what its name says."""
    if not file.is_file():
        raise TaskError(f"data path {str(file)!r} does not exist")
    suffix = reader_of(file)
    if not suffix:
        raise TaskError(f"{file} is of no known type; use one of {', '.join(READERS)}")
    if not file.stat().st_size:
        raise TaskError(f"{file} is empty")
    builder, options = READERS[suffix]
    try:
        with no_progress_bars():
            return load_dataset(builder, data_files={"rows": str(file)}, split="rows", **options)
    except Exception as error:  # each format has errors of its own, and the library wraps some of them once more
        raise TaskError(f"{file} can't be read as {builder}: {_first_line(error.__cause__ or error)}") from error


def _from_hub(task: str, hub: Sequence[str], names: Mapping[str, Sequence[str]], sample: bool) -> dict[str, Dataset]:
    where = "/".join(hub)
    try:
        found = load_dataset(*hub)
    except (
        Exception
    ) as error:  # no network, no such data set, no disk space: whatever it is, here is what to do instead
        raise TaskError(
            f"the data set {where} of task {task!r} can't be had from the hub ({_first_line(error)}); "
            "give a path with the data" + (f", or {SAMPLE!r}" if sample else "")
        ) from error
    splits = {}
    for split, candidates in names.items():
        present = [name for name in candidates if name in found]
        if not present:
            raise TaskError(f"the data set {where} has no {split} split; it has {', '.join(found)}")
        splits[split] = found[present[0]]
    return splits


def _listed(text: str) -> dict[str, Path]:
    """The file of each split in ``train=FILE,validation=FILE``."""
    parts = re.split(r",(?=(?:train|validation)=)", text)
    files = {split: Path(file) for split, _, file in (part.partition("=") for part in parts)}
    if missing := [split for split in SPLITS if split not in files]:
        raise TaskError(f"data {text!r} names no file for {missing[0]}: write train=FILE,validation=FILE")
    return files


def _split_file(folder: Path, stems: Sequence[str]) -> Path:
    candidates = [folder / (stem + suffix + end) for stem in stems for suffix in READERS for end in ("", ".gz")]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    present = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise TaskError(f"{folder} has no {stems[0]} split: expected {stems[0]}{{{','.join(READERS)}}}, found {present}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _split_by_column(rows: Dataset, file: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Dataset]:
    if "split" not in rows.column_names:
        raise TaskError(
            f"{file} holds one table, which needs a column 'split' of train and validation; it has "
            + ", ".join(rows.column_names)
        )
    split = np.asarray(rows["split"])
    return {name: rows.select(np.flatnonzero(np.isin(split, tuple(called)))) for name, called in names.items()}


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_columns(rows: Dataset, columns: Sequence[str], task: str, where: str) -> None:
    """Raise :class:`TaskError` unless there are rows, and they have these columns."""
    for column in columns:
        if column not in rows.column_names:
            raise TaskError(
                f"{where} has no column {column!r}, which task {task!r} needs; it has {', '.join(rows.column_names)}"
            )
    if not len(rows):
        raise TaskError(f"{where} is empty")


def check_texts(rows: Dataset, columns: Sequence[str], where: str) -> None:
    """Raise :class:`TaskError` unless all that stands in these columns is text."""
    check_values(rows, columns, where, lambda value: isinstance(value, str), "text")


def check_values(
    rows: Dataset, columns: Sequence[str], where: str, right: Callable[[Any], bool], expected: str
) -> None:
    """Raise :class:`TaskError` for the first value in these columns that is not right."""
    for column in columns:
        for number, value in enumerate(rows[column]):
            if not right(value):
                raise TaskError(f"{where}: {column!r} of row {number} is {value!r}, not {expected}")


def check_length(shortest: int, max_length: int, longest: int) -> None:
    """Raise :class:`TaskError` for a ``max_length`` that is not between these."""
    if not shortest <= max_length <= longest:
        raise TaskError(f"max_length={max_length}: expected {shortest} to {longest} tokens")


def mapped(
    rows: Dataset, function: Callable[..., dict[str, Any]], description: str, progress: bool, **options: Any
) -> Dataset:
    """What ``function`` makes of rows, in the place of their columns; ``options`` are those of ``Dataset.map``."""
    with nullcontext() if progress else no_progress_bars():
        return rows.map(function, remove_columns=rows.column_names, desc=description, **options)
