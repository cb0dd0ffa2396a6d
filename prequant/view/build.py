"""From a model on disk or on the hub to its Record: loading, a batch to measure on, the pipeline, the original."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prequant.inspection import check_depths
from prequant.model import MODEL_CLASS, ModelProgram
from prequant.passes import Pipeline, Program
from prequant.quiet import no_progress_bars
from prequant.reconstruction.calibration import CalibrationSet, encode_texts
from prequant.report_file import recorded_errors
from prequant.sources import (
    canonical_program,
    example_inputs_of,
    find_tokenizer,
    holds_program,
    load_model_like,
    load_program,
    load_tokenizer,
)
from prequant.tasks.data import SAMPLE

from .record import Record
from .recorder import Recorder

TEXTS, MAX_LENGTH = 8, 64
"""Of a file of texts so many are measured on, cut to so many tokens."""


def record_model(
    source: str,
    pipeline: Pipeline | None = None,
    against: str | None = None,
    data: str | Path | None = None,
    measured: bool = True,
    progress: bool = True,
) -> Record:
    """What there is to show of ``source`` (a folder that prequant saved, a model folder or a hub name) and of what
    ``pipeline`` makes of it.

    ``against``: the float model that a compressed folder was made of, for its errors. ``data``: a file of texts (see
    :func:`~prequant.reconstruction.calibration.encode_texts`), or ``"sample"`` for the sentences that prequant ships,
    to measure errors of values and times on; without it, two short texts. ``measured=False`` leaves both out. Raises
    :class:`~prequant.runtime.PrequantError` for what can't be read, and an original that is another model.
    """
    program, original = load_program(source), None
    if against is not None:
        original = canonical_program(load_model_like(against, program), find_tokenizer(against))
        check_depths(program, original)
    inputs, batch = _batch(program, source, data) if measured else (None, "")
    saved = holds_program(source)
    recorder = Recorder(
        _title(program, source),
        inputs,
        batch,
        original,
        (recorded_errors(Path(source)) or {}) if saved and original is None else {},
        progress,
    )
    if pipeline is None or not pipeline.passes:
        recorder.start(program)
    else:
        pipeline(program, [recorder])
    return recorder.record


def _title(program: Program, source: str) -> str:
    name = Path(source).resolve().name if Path(source).is_dir() else source
    kind = str(program.info.extra.get(MODEL_CLASS, "")).rpartition(".")[2]
    return f"{name} · {kind}" if kind else name


def _batch(program: Program, source: str, data: str | Path | None) -> tuple[Mapping[str, Tensor] | None, str]:
    """A batch of inputs and what it is in words; nothing for a Program that reads no text."""
    if not isinstance(program, ModelProgram) and data is None:
        return None, ""
    inputs = (
        dict(example_inputs_of(program, find_tokenizer(source)))
        if data is None
        else _texts(program, load_tokenizer(source), data)
    )
    rows, length = next(iter(inputs.values())).shape[:2]
    return inputs, f"on {rows} texts of up to {length} tokens"


def _texts(program: Program, tokenizer: PreTrainedTokenizerBase, data: str | Path) -> dict[str, Tensor]:
    expected = example_inputs_of(program, tokenizer)
    with resources.as_file(resources.files("prequant") / "data" / "sentences.tsv") as sample:
        path = sample if str(data) == SAMPLE else Path(data)
        with no_progress_bars():
            rows = encode_texts(path, tokenizer, MAX_LENGTH, progress=False)
    inputs = dict(CalibrationSet.of(rows, tokenizer, TEXTS, TEXTS, seed=0)[0])
    if "decoder_input_ids" in expected:
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    return {name: value for name, value in inputs.items() if name in program.signature.names}
