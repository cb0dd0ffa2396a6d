"""prequant eval: score a folder on a task."""

from __future__ import annotations

from . import options
from .app import command, show


@command("eval", "Score a model on a task.")
def evaluate(
    folder: options.Model,
    task: options.TaskName,
    data: options.Data = None,
    batch_size: options.BatchSize = 64,
    max_length: options.MaxLength = 128,
    quiet: options.Quiet = False,
) -> None:
    """Score a compressed folder, or an ordinary model folder, on a task's validation set."""
    from contextlib import nullcontext

    from prequant.evaluation import evaluate as score
    from prequant.quiet import no_progress_bars
    from prequant.sources import check_length, load_scored
    from prequant.tasks import encode, load_task_data
    from prequant.tasks import task as find_task

    with no_progress_bars() if quiet else nullcontext():
        wanted = find_task(task)
        model, tokenizer = load_scored(folder, wanted)
        check_length(model.config, max_length)
        rows = encode(load_task_data(wanted, data)["validation"], wanted, tokenizer, max_length, progress=not quiet)
        result = score(model, wanted, rows, tokenizer, batch_size, progress=not quiet)
    show(f"{result.metric_name} {result.metric:.4f} on {result.examples:,} examples")
