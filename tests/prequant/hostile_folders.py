"""A folder with every kind of stored weight in it, to be damaged. Import with ``from .hostile_folders import ...``."""

import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

import prequant.transformers_quantizer  # noqa: F401  (registers the quantization method)
from prequant.checkpoint import CheckpointError, load, save

from .checkpoint_models import mixed_bert

LAYER = "bert.encoder.layer.0."
WORDS = "bert.embeddings.word_embeddings.weight"
QUERY, KEY, VALUE = (f"{LAYER}attention.self.{part}.weight" for part in ("query", "key", "value"))
PLANES = f"{LAYER}intermediate.dense.weight"
POOLER = "bert.pooler.dense"

_home = tempfile.TemporaryDirectory()


@lru_cache
def _saved() -> Path:
    return save(mixed_bert(), Path(_home.name) / "model")


def fresh_folder(parent: Path) -> Path:
    """A copy of the folder, for one test."""
    return Path(shutil.copytree(_saved(), parent / "model"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_refused(folder: Path, *words: str) -> None:
    """``load`` says all of the words, and leaves everything as it was."""
    before = snapshot(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert snapshot(folder) == before


def assert_transformers_refuses(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        AutoModelForSequenceClassification.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def set_entry(*path: Any, value: Any) -> Callable[[Any], Any]:
    """A change of one entry in nested JSON."""

    def change(graph: Any) -> None:
        inner = graph
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change
