"""prequant finetune: the uncompressed model, trained the same way; what a compressed one is compared with."""

from __future__ import annotations

from . import options
from .app import command, show


@command("finetune", "Fine-tune the float model, for comparison.")
def finetune(
    model: options.Model,
    out: options.Out,
    task: options.TaskName,
    data: options.Data = None,
    epochs: options.Epochs = 3.0,
    batch_size: options.BatchSize = 32,
    learning_rate: options.LearningRate = None,
    head_learning_rate: options.HeadLearningRate = None,
    dropout: options.Dropout = None,
    max_steps: options.MaxSteps = -1,
    eval_steps: options.EvalSteps = None,
    save_steps: options.SaveSteps = 0,
    precision: options.Precision = None,
    max_length: options.MaxLength = 128,
    seed: options.Seed = 42,
    quiet: options.Quiet = False,
) -> None:
    """Fine-tune MODEL on a task and save it as an ordinary model folder, in float32."""
    from prequant.finetune import finetune_baseline
    from prequant.tasks import task as find_task
    from prequant.training import TrainingSettings

    from .settings import trained_with

    rates = (learning_rate, head_learning_rate, None)
    usual = TrainingSettings()
    training = trained_with(usual, epochs, batch_size, rates, dropout, max_steps, eval_steps, precision, seed)
    figures = finetune_baseline(
        model, find_task(task), data, out, training, max_length=max_length, save_steps=save_steps, progress=not quiet
    )
    show(f"{figures.text()} on {figures.examples:,} examples")
    show(f"saved to {out}")
