"""The loop of a training: the Hugging Face Trainer's, for an eager model and for a Program."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from prequant.runtime.memory import RETURN_EVERY, return_freed_memory
from prequant.tasks import Collator

from .batches import Batches, steps_of
from .best import Best
from .checkpoints import Checkpoints, hash_of, identity
from .course import Course
from .precision import Precision, collator_for, computing_in
from .settings import TrainingError, TrainingResult, TrainingSettings, parameter_groups


def finetune(
    model: nn.Module,
    train: Dataset,
    collate: Collator,
    settings: TrainingSettings,
    head: Iterable[str] = (),
    progress: bool = True,
    after_step: Callable[[], None] | None = None,
    evaluate: Callable[[], float] | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Train the parameters of ``model`` that require a gradient, in place, on encoded rows (:meth:`Task.encode`).

    ``model``: anything that returns a loss when called with labels; it trains on the device that it is on. ``collate``
    makes a batch of rows, as :meth:`Task.collator` gives it.
    ``head``: names of the head's parameters. ``after_step`` is called after each step of the optimizer. ``evaluate``
    scores the model for ``settings.eval_steps``: the greater the better, and without a trace in the model.
    Batches group sentences of similar length; their order depends on the seed and the rows alone, so two models see the
    same. The same seed on the same machine with one thread gives the same weights, bit for bit; also where the training
    was ended in between, and went on from one of its ``checkpoints``. The model is left in eval mode, its configuration
    as it was. Raises :class:`TrainingError` if nothing is trainable, states are to be scored and nothing does, the loss
    was not finite, the checkpoint is of another training, or a launcher started several processes;
    :class:`CheckpointError` for a checkpoint that can't be read.
    """
    if settings.eval_steps and evaluate is None:
        raise TrainingError(f"eval_steps={settings.eval_steps}: there is nothing to score this training by; leave it 0")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise TrainingError(
            f"{processes} processes were started (WORLD_SIZE), and this training works in one: start it without "
            "torchrun, which is for mrem with --parallel"
        )
    _load_lazily_loaded()
    set_seed(settings.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, head), fused=True)
    best = None
    if settings.eval_steps and evaluate is not None:
        best = Best(model, evaluate, settings.eval_steps)
    lengths = [len(ids) for ids in train["input_ids"]]
    steps = steps_of(settings, len(lengths))
    course = Course(model, optimizer, best, steps)
    if checkpoints is not None:
        course.keep(checkpoints, identity(model, hash_of(train), settings, checkpoints.about), progress)
        if course.done and after_step is not None:
            after_step()  # what it makes of the weights is in no checkpoint, and the next step reads it
    if course.done < steps:
        order = Batches(lengths, settings, course.done)
        _train(model, train, collate, settings, optimizer, order, progress, after_step, best, course)
    if best is not None:
        best.restore()
    if after_step is not None and (best is not None or course.done):
        after_step()
    model.eval()
    return course.result()


def _train(
    model: nn.Module,
    train: Dataset,
    collate: Collator,
    settings: TrainingSettings,
    optimizer: torch.optim.Optimizer,
    order: Batches,
    progress: bool,
    after_step: Callable[[], None] | None,
    best: Best | None,
    course: Course,
) -> None:
    """The steps that are left."""
    dropout = contextlib.nullcontext() if settings.dropout else _without_dropout(model)
    with tempfile.TemporaryDirectory() as scratch, _untouched_config(model), dropout:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=order.steps,
            per_device_train_batch_size=settings.batch_size,
            warmup_steps=settings.warmup,
            lr_scheduler_type="linear",
            max_grad_norm=settings.max_grad_norm,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=not progress,
            seed=settings.seed,
            use_cpu=next(model.parameters()).device.type == "cpu",
        )
        trainer = _Trainer(
            order,
            settings.precision,
            model=model,
            args=arguments,
            train_dataset=train,
            data_collator=collator_for(settings.precision, collate),
            optimizers=(optimizer, None),
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # the Trainer would split batches over all GPUs
        # Both print the closing figures as a dictionary; callers have a report.
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_Progress)
        if after_step is not None:
            trainer.add_callback(_AfterStep(after_step))
        if best is not None:
            trainer.add_callback(best)
        trainer.add_callback(_ReturnMemory())
        trainer.add_callback(course)  # the last: what it keeps of a step is all that the others did
        with course.running(lambda: float(trainer.loss_sum)):
            trainer.train()
        if not math.isfinite(loss := float(trainer.loss_sum)):
            raise TrainingError(f"the loss was {loss:g}: this training has diverged; a smaller learning rate may help")


def _load_lazily_loaded() -> None:
    """Take one step with one number: what torch loads only then would count as the memory of a process's first
    training.
    """
    number = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([number], fused=True)
    number.sum().backward()
    nn.utils.clip_grad_norm_([number], 1.0)
    optimizer.step()


class _Trainer(Trainer):
    """Takes batches in their own order, and sums up the losses of all steps."""

    def __init__(self, order: Batches, precision: Precision, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._order, self._precision = order, precision
        self.loss_sum = torch.zeros((), device=self.args.device)

    def get_train_dataloader(self) -> DataLoader:
        """A generator of its own: a loader draws a number from the one that dropout draws from, otherwise."""
        rows: Any = self.train_dataset
        own = torch.Generator()
        return DataLoader(rows, batch_sampler=self._order, collate_fn=self.data_collator, generator=own)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """In the precision of the settings. The Trainer's own way to it would leave its wrapper on the model."""
        with computing_in(self._precision, self.args.device):
            return super().compute_loss(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step, whose loss counts."""
        loss = super().training_step(*args, **kwargs)
        self.loss_sum += loss.detach()
        return loss


class _AfterStep(TrainerCallback):
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Behind the optimizer's step."""
        self._call()


class _ReturnMemory(TrainerCallback):
    """Gives freed memory back every few steps."""

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Behind the optimizer's step."""
        if state.global_step % RETURN_EVERY == 0:
            return_freed_memory()


class _Progress(ProgressCallback):
    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Show no figures between the steps of the bar."""


@contextlib.contextmanager
def _untouched_config(model: nn.Module) -> Iterator[None]:
    """Put back what the Trainer writes into a model's configuration, which is saved with the model."""
    config = getattr(model, "config", None)
    before = dict(vars(config)) if config is not None else {}
    try:
        yield
    finally:
        if config is not None:
            vars(config).clear()
            vars(config).update(before)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode, in which nothing is dropped, whatever mode the Trainer asks for.

    Language models know no other difference: their norms keep no running figures.
    """
    model.train = lambda mode=True: type(model).train(model, False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.train
