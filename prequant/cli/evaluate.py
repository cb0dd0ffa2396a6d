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
    adapter: options.AdapterFile = None,
    quiet: options.Quiet = False,
) -> None:
    """Score a compressed folder, or an ordinary model folder, on a task's validation set."""
    from contextlib import nullcontext

    from prequant.quiet import no_progress_bars
    from prequant.sources import check_length, load_scored
    from prequant.tasks import Limits
    from prequant.tasks import task as find_task

    with no_progress_bars() if quiet else nullcontext():
        wanted = find_task(task)
        wanted.check_metrics()
        model, tokenizer = load_scored(folder, wanted, adapter)
        check_length(model.config, max_length)
        rows = wanted.load(data)["validation"]
        result = wanted.evaluate(model, rows, tokenizer, Limits(max_length, batch_size), progress=not quiet)
    show(f"{result.text()} on {result.examples:,} examples")
