"""Saving what a pipeline made of a model, with the errors of its weights for ``inspect`` to show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prequant.checkpoint import save
from prequant.checkpoint.atomic import replacing
from prequant.checkpoint.folder import is_ours
from prequant.inspection import rows_to_json, weight_rows
from prequant.measure import installed_versions
from prequant.passes import Canonicalize, DropLayers, Pipeline, Program, weights
from prequant.report_file import recorded_errors, write_report


def save_with_errors(
    program: Program,
    original: Program,
    source: str | Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    steps: Pipeline,
    settings: Mapping[str, object] = {},
) -> None:
    """Save ``program``, and beside it a report: the error of each weight, what the passes did, settings.

    ``steps`` made it from ``original``, which ``source`` holds and against which errors are measured. Where that is
    compressed itself, what was recorded beside it stands for the weights that are still the same; of others it is not
    known. ``settings``: what else it was made with (the file of texts that passes measured with, the type of floats),
    for the report; None is what was not given.
    """
    # Where layers are dropped, others take their names: a weight is compared with what it was made of.
    dropped = [step for step in steps.passes if isinstance(step, DropLayers)]
    original = Pipeline([Canonicalize(), *dropped])(original)
    if all(view.tensors.keys() == {"dense"} for view in weights(original)):
        rows = weight_rows(program, original)
    else:
        known = {} if dropped else recorded_errors(Path(source)) or {}
        before = {view.name: view.value() for view in weights(original) if view.name in known}
        same = [
            view.name for view in weights(program) if view.name in before and _equal(view.value(), before[view.name])
        ]
        rows = weight_rows(program, recorded={name: known[name] for name in same})
    content = {
        "weights": rows_to_json(rows),
        "passes": [report.to_dict() for report in program.reports],
        "settings": {
            "model": str(source),
            "pipeline": str(steps),
            **{name: str(value) for name, value in settings.items() if value is not None},
            "versions": installed_versions(),
        },
    }
    with replacing(folder, is_ours) as staging:
        save(program, staging, tokenizer)
        write_report(staging, content)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first, second))
