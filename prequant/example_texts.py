"""Example batches from texts: what passes and measurements look at, without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prequant.model import ModelProgram
from prequant.passes import AllocateBits, ExampleBatches, Pipeline, Program
from prequant.reconstruction import CalibrationSet, encode_texts
from prequant.sources import SourceError, check_length
from prequant.tasks import Task

MAX_LENGTH = 128
"""Tokens that texts are cut to where nothing else is said."""


def example_batches(
    program: Program,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | None,
    *,
    task: Task | None = None,
    texts: int = 128,
    max_length: int | None = None,
    batch_size: int = 32,
    seed: int = 42,
    progress: bool = True,
) -> ExampleBatches:
    """Batches of ``program``'s inputs: so many ``texts``, drawn by ``seed``, those of similar length together.

    ``data`` is a file of texts (:func:`prequant.reconstruction.encode_texts`); with a ``task``, its data as in
    :func:`prequant.tasks.data.read_splits`, of which the training set's rows are read, and not their labels. Texts are
    cut to ``max_length`` tokens: :data:`MAX_LENGTH` by default, or as many as the model takes. Raises
    :class:`SourceError` for a program that reads no texts, or takes more than one for an answer, and what reading
    raises.
    """
    if not isinstance(program, ModelProgram) or program.config.is_encoder_decoder:
        raise SourceError("example texts are for a model of transformers that reads one text: give batches in Python")
    positions: int = getattr(program.config, "max_position_embeddings", None) or MAX_LENGTH
    length = min(MAX_LENGTH, tokenizer.model_max_length, positions) if max_length is None else max_length
    check_length(program.config, length)
    if task is not None:
        rows = task.encode(task.load(data)["train"], tokenizer, length, progress)
    elif data is None:
        raise SourceError("there are no texts: give a file of texts, or a task with its data")
    else:
        rows = encode_texts(Path(data), tokenizer, length, progress)
    drawn = CalibrationSet.of(rows, tokenizer, texts, batch_size, seed)
    known = program.signature.names
    return ExampleBatches({name: value for name, value in batch.items() if name in known} for batch in drawn)


def with_batches(steps: Pipeline, batches: ExampleBatches) -> Pipeline:
    """The same passes, with batches for those that can look at some and have none."""
    return Pipeline(
        replace(step, batches=batches) if isinstance(step, AllocateBits) and step.batches is None else step
        for step in steps.passes
    )
