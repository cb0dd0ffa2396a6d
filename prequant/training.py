"""Training through the Hugging Face Trainer: the same loop for an eager model and for a Program."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from transformers.trainer_pt_utils import LengthGroupedSampler

from prequant.measure import PeakMemory, tensor_bytes
from prequant.runtime import PrequantError
from prequant.tasks import Collator


class TrainingError(PrequantError):
    """Settings that describe no training, or a model that has nothing to train."""


SCALES = (".scale", ".alphas", ".first_alphas", ".zero_point")
"""How the names of a compressed weight's scales end."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. ``learning_rate`` is the peak; it warms up over ``warmup`` of the steps and falls linearly to 0.

    ``head_learning_rate`` is for the task head, which starts from random numbers (None: the same);
    ``scale_learning_rate`` for scales, zero points and alphas of compressed weights. It is relative to the mean
    magnitude of each such tensor, which AdamW's steps know nothing of: 8-bit scales are a sixteenth of 4-bit ones.
    ``max_steps`` above 0 overrides ``epochs``.
    ``weight_decay`` acts on matrices (embeddings are some); never on biases, layer norms, or the trainable parts of a
    compressed weight. ``dropout``: whether the model drops what its configuration says; where few parameters train,
    there is little to overfit with. ``eval_steps`` above 0: every so many steps, and at the end, the model is scored on
    the validation set, and the best of these states is what stays (of equal ones the first); else it is the last.
    Raises :class:`TrainingError` for values out of range.
    """

    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-5
    head_learning_rate: float | None = None
    scale_learning_rate: float = 5e-3
    weight_decay: float = 0.01
    warmup: float = 0.06
    max_grad_norm: float = 1.0
    max_steps: int = -1
    seed: int = 42
    dropout: bool = True
    eval_steps: int = 0

    def __post_init__(self) -> None:
        rates = {
            "learning_rate": self.learning_rate,
            "head_learning_rate": self.head_learning_rate,
            "scale_learning_rate": self.scale_learning_rate,
        }
        right = {
            "epochs": (self.epochs, "above 0", self.epochs > 0),
            "batch_size": (self.batch_size, "1 or more", self.batch_size >= 1),
            **{name: (rate, "above 0", rate is None or rate > 0) for name, rate in rates.items()},
            "weight_decay": (self.weight_decay, "0 or more", self.weight_decay >= 0),
            "warmup": (self.warmup, "a share of the steps, from 0 to below 1", 0 <= self.warmup < 1),
            "max_grad_norm": (self.max_grad_norm, "above 0", self.max_grad_norm > 0),
            "max_steps": (
                self.max_steps,
                "1 or more, or -1 for all epochs",
                self.max_steps >= 1 or self.max_steps == -1,
            ),
            "eval_steps": (self.eval_steps, "1 or more, or 0 for the last state", self.eval_steps >= 0),
            "seed": (self.seed, "0 to 2**32 - 1", 0 <= self.seed < 2**32),
        }
        for name, (value, expected, fits) in right.items():
            if not fits or (isinstance(value, float) and not math.isfinite(value)):
                raise TrainingError(f"{name}={value}: expected {expected}")


@dataclass(frozen=True)
class TrainingResult:
    """What a training took: optimizer steps, seconds, the mean loss over all steps, and bytes of memory.

    ``peak_memory`` is what the model's tensors take plus the most by which the process grew while they were trained
    (gradients, optimizer, activations), so that it does not depend on what else the process holds. ``best_step``: whose
    state the model has, where it was scored on the way.
    """

    steps: int
    seconds: float
    loss: float
    peak_memory: int
    best_step: int | None = None


def combined(results: Sequence[TrainingResult]) -> TrainingResult | None:
    """Several trainings, one after the other, as one: the loss is that of the last. None if there was none."""
    if not results:
        return None
    steps, seconds = sum(result.steps for result in results), sum(result.seconds for result in results)
    peak = max(result.peak_memory for result in results)
    return TrainingResult(steps, seconds, results[-1].loss, peak, results[-1].best_step)


def finetune(
    model: nn.Module,
    train: Dataset,
    collate: Collator,
    settings: TrainingSettings,
    head: Iterable[str] = (),
    progress: bool = True,
    after_step: Callable[[], None] | None = None,
    evaluate: Callable[[], float] | None = None,
) -> TrainingResult:
    """Train the parameters of ``model`` that require a gradient, in place, on encoded rows (:meth:`Task.encode`).

    ``model``: anything that returns a loss when called with labels; it trains on the device that it is on. ``collate``
    makes a batch of rows, as :meth:`Task.collator` gives it.
    ``head``: names of the head's parameters. ``after_step`` is called after each step of the optimizer. ``evaluate``
    scores the model for ``settings.eval_steps``: the greater the better, and without a trace in the model.
    Batches group sentences of similar length; their order depends on the seed and the rows alone, so two models see the
    same. The same seed on the same machine with one thread gives the same weights, bit for bit. The model is left in
    eval mode, its configuration as it was. Raises :class:`TrainingError` if nothing is trainable, or states are to be
    scored and nothing does.
    """
    if settings.eval_steps and evaluate is None:
        raise TrainingError(f"eval_steps={settings.eval_steps}: there is nothing to score this training by; leave it 0")
    _load_lazily_loaded()
    set_seed(settings.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, head))
    started = time.perf_counter()
    dropout = contextlib.nullcontext() if settings.dropout else _without_dropout(model)
    with tempfile.TemporaryDirectory() as scratch, _untouched_config(model), dropout:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
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
            model=model,
            args=arguments,
            train_dataset=train,
            data_collator=collate,
            optimizers=(optimizer, None),
        )
        # Both print the closing figures as a dictionary; callers have a report.
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(_Progress)
        if after_step is not None:
            trainer.add_callback(_AfterStep(after_step))
        best = None
        if settings.eval_steps and evaluate is not None:
            best = _Best(model, evaluate, settings.eval_steps)
            trainer.add_callback(best)
        with PeakMemory() as memory:
            outcome = trainer.train()
    if best is not None:
        best.restore()
        if after_step is not None:
            after_step()
    model.eval()
    peak, seconds = tensor_bytes(model) + memory.growth, time.perf_counter() - started
    return TrainingResult(
        outcome.global_step, seconds, outcome.training_loss, peak, None if best is None else best.step
    )


def _load_lazily_loaded() -> None:
    """Take one step with one number: what torch loads only then would count as the memory of a process's first
    training.
    """
    number = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.AdamW([number])
    number.sum().backward()
    nn.utils.clip_grad_norm_([number], 1.0)
    optimizer.step()


class _Trainer(Trainer):
    def get_train_dataloader(self) -> DataLoader:
        """Batches in an order of their own generator: transformers' would come from the one that dropout draws from."""
        rows: Any = self.train_dataset
        size, seed = self.args.train_batch_size, self.args.seed
        lengths = [len(ids) for ids in rows["input_ids"]]
        order = LengthGroupedSampler(size, lengths=lengths, generator=torch.Generator().manual_seed(seed))
        return DataLoader(rows, batch_size=size, sampler=order, collate_fn=self.data_collator)


class _AfterStep(TrainerCallback):
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Behind the optimizer's step."""
        self._call()


class _Best(TrainerCallback):
    """Keeps the trainable parameters of the best state."""

    def __init__(self, model: nn.Module, evaluate: Callable[[], float], every: int) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model, self._evaluate, self._every = model, evaluate, every
        self._best, self._kept = -math.inf, list[torch.Tensor]()
        self.step = 0

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Score the state, if it is time to."""
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        self._model.eval()
        # Loaders draw from the generator that dropout draws from.
        with torch.random.fork_rng(), torch.no_grad():
            score = self._evaluate()
        if score > self._best or not self._kept:
            self._best, self.step = score, state.global_step
            self._kept = [parameter.detach().clone() for parameter in self._trained]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its best state again."""
        for parameter, kept in zip(self._trained, self._kept, strict=True):
            parameter.copy_(kept)


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


def parameter_groups(model: nn.Module, settings: TrainingSettings, head: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The trainable parameters as an optimizer takes them, by learning rate and weight decay.

    Raises :class:`TrainingError` if there are none, or the head names one that the model does not have.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainingError("nothing to train: no parameter requires a gradient")
    of_head = frozenset(head)
    if unknown := sorted(of_head - {name for name, _ in model.named_parameters()}):
        raise TrainingError(f"the head's {unknown[0]!r} is no parameter of the model")
    usual = settings.learning_rate
    head_rate = usual if settings.head_learning_rate is None else settings.head_learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        is_scale = name.endswith(SCALES)
        rate = head_rate if name in of_head else usual
        if is_scale:
            rate = settings.scale_learning_rate * float(parameter.detach().abs().mean())
        # One-dimensional parameters are biases, norms and outlier values.
        decays = parameter.dim() > 1 and not is_scale
        groups.setdefault((rate, settings.weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
