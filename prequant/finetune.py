"""Fine-tuning the float model on a task: the comparison that every compressed model needs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

from prequant.checkpoint.atomic import replacing
from prequant.checkpoint.folder import is_ours
from prequant.measure import installed_versions
from prequant.quiet import no_progress_bars
from prequant.report_file import write_report
from prequant.sources import check_length, check_output, head_of, load_for, load_tokenizer
from prequant.tasks import Evaluation, Limits, Task
from prequant.tasks.data import described
from prequant.training import TrainingSettings, Unfinished, finetune


def finetune_baseline(
    source: str | Path,
    task: Task,
    data: str | Path | None,
    out: str | Path,
    training: TrainingSettings,
    *,
    max_length: int = 128,
    save_steps: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Fine-tune the model ``source`` for ``task`` in float32, save it to ``out`` with its tokenizer, and score it.

    Arguments as in :func:`prequant.compress.compress`, of which it is the comparison: the same head to start from and
    the same order of examples for a seed. The folder, with settings, versions and the score beside the model, appears
    whole or not at all.
    """
    with nullcontext() if progress else no_progress_bars():
        unfinished = Unfinished(Path(out), save_steps, {"task": task.name, "max_length": max_length})
        check_output(Path(out), source)
        task.check_metrics()
        tokenizer = load_tokenizer(source)
        model, _ = load_for(source, task, training.seed, tokenizer)
        check_length(model.config, max_length)
        rows = task.load(data)
        train = task.encode(rows["train"], tokenizer, max_length, progress)
        limits = Limits(max_length)
        evaluate = partial(task.goodness, model, rows["validation"], tokenizer, limits)
        collate, head = task.collator(tokenizer), head_of(model, task)
        kept = unfinished.checkpoints("training")
        result = finetune(model, train, collate, training, head, progress, None, evaluate, kept)
        score = task.evaluate(model, rows["validation"], tokenizer, limits, progress)
        content = {
            "metric_name": score.metric_name,
            "metric": score.metric,
            "scores": dict(score.scores),
            "examples": score.examples,
            "training": asdict(result),
            "settings": {
                "model": str(source),
                "task": task.name,
                "data": described(task.hub, data),
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
        unfinished.remove()
    return score
