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
    """Fine-tune MODEL on a task in float32 and save it as an ordinary model folder."""
    from prequant.finetune import finetune_baseline
    from prequant.tasks import task as find_task
    from prequant.training import TrainingSettings

    usual = TrainingSettings()
    training = TrainingSettings(
        epochs=epochs,
        batch_size=batch_size,
        max_steps=max_steps,
        seed=seed,
        learning_rate=usual.learning_rate if learning_rate is None else learning_rate,
        head_learning_rate=head_learning_rate,
        dropout=usual.dropout if dropout is None else dropout,
        eval_steps=usual.eval_steps if eval_steps is None else eval_steps,
    )
    figures = finetune_baseline(
        model, find_task(task), data, out, training, max_length=max_length, save_steps=save_steps, progress=not quiet
    )
    show(f"{figures.text()} on {figures.examples:,} examples")
    show(f"saved to {out}")
