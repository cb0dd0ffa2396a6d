"""Fine-tuning the float model on a task: the comparison that every compressed model needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from prequant.checkpoint.atomic import replacing
from prequant.checkpoint.folder import is_ours
from prequant.evaluation import Evaluation, evaluate
from prequant.measure import installed_versions
from prequant.quiet import no_progress_bars
from prequant.report_file import write_report
from prequant.sources import check_length, check_output, head_parameters, load_classifier, load_tokenizer
from prequant.tasks import Task, encode, load_task_data
from prequant.training import TrainingSettings, finetune


def finetune_baseline(
    source: str | Path,
    task: Task,
    data: str | Path | None,
    out: str | Path,
    training: TrainingSettings,
    *,
    max_length: int = 128,
    progress: bool = True,
) -> Evaluation:
    """Fine-tune the model ``source`` for ``task`` in float32, save it to ``out`` with its tokenizer, and score it.

    Arguments as in :func:`prequant.compress.compress`, of which it is the comparison: the same head to start from and
    the same order of examples for a seed. The folder, with settings, versions and the score beside the model, appears
    whole or not at all.
    """
    with nullcontext() if progress else no_progress_bars():
        check_output(Path(out), source)
        tokenizer = load_tokenizer(source)
        model, _ = load_classifier(source, task, training.seed, tokenizer)
        check_length(model.config, max_length)
        rows = load_task_data(task, data)
        train, validation = (
            encode(rows[split], task, tokenizer, max_length, progress) for split in ("train", "validation")
        )
        result = finetune(model, train, tokenizer, training, head_parameters(model), progress)
        score = evaluate(model, task, validation, tokenizer, progress=progress)
        content = {
            "metric_name": score.metric_name,
            "metric": score.metric,
            "examples": score.examples,
            "training": asdict(result),
            "settings": {
                "model": str(source),
                "task": task.name,
                "data": str(data) if data is not None else "/".join(task.hub),
                "max_length": max_length,
                **asdict(training),
                "versions": installed_versions(),
            },
            "weights": [],
        }
        with replacing(Path(out), is_ours) as staging, no_progress_bars():
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            write_report(staging, content)
    return score
