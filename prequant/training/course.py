"""How far a training is: what its steps took, kept in checkpoints where there are some, and gone on from there."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

from prequant.measure import PeakMemory, tensor_bytes

from .best import Best
from .checkpoints import Checkpoints, State, read_state, restore, tensors_of, write_state
from .settings import TrainingError, TrainingResult


class Course(TrainerCallback):
    """A training of ``steps`` steps, of which ``done`` are before those that run now."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, best: Best | None, steps: int) -> None:
        self._model, self._optimizer, self._best = model, optimizer, best
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._file: tuple[Checkpoints, Mapping[str, Any]] | None = None
        self._now: Callable[[], tuple[float, float, int]] = lambda: (0.0, 0.0, 0)
        self._before = (0.0, 0.0, 0)
        self._state: State | None = None
        self.steps, self.done = steps, 0

    def keep(self, checkpoints: Checkpoints, known_by: Mapping[str, Any], progress: bool) -> None:
        """Keep checkpoints, and go on from the one that is there already, if there is."""
        self._file = checkpoints, known_by
        if not checkpoints.path.exists():
            return
        like = tensors_of(self._trained, self._optimizer, {})
        state = read_state(checkpoints.path, known_by, like, self.steps)
        kept = restore(self._trained, self._optimizer, state.tensors)
        if self._best is not None and state.best is not None:
            self._best.step, self._best.score = state.best
            self._best.kept = kept
        self.done, self._state = state.step, state
        self._before = (state.loss, state.seconds, state.peak_memory)
        if progress:
            tqdm.write(f"going on from step {state.step:,} of {self.steps:,}: {checkpoints.path}", file=sys.stderr)

    @contextmanager
    def running(self, loss: Callable[[], float]) -> Iterator[None]:
        """Measure the steps that run inside; ``loss`` gives the sum of their losses so far."""
        started = time.perf_counter()
        with PeakMemory() as memory:
            self._now = lambda: (loss(), time.perf_counter() - started, tensor_bytes(self._model) + memory.growth)
            yield
        end = self._now()
        self._now = lambda: end

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Put the trainer where the checkpoint was."""
        if not self.done:
            return
        state.global_step = self.done
        scheduler = about["lr_scheduler"]
        rates = [
            rate * factor(self.done) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler.load_state_dict(
            {**scheduler.state_dict(), "last_epoch": self.done, "_step_count": self.done + 1, "_last_lr": rates}
        )
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        assert self._state is not None
        restore(self._trained, self._optimizer, self._state.tensors)  # the generators, which the trainer seeded anew
        self._state = None  # as large as the training

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Write a checkpoint, if it is time to."""
        if self._file is None:
            return
        checkpoints, known_by = self._file
        if state.global_step % checkpoints.every and state.global_step != state.max_steps:
            return
        loss, seconds, peak = self._totals()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss was {loss:g} by step {state.global_step}: this training has diverged; a smaller learning "
                f"rate may help. {checkpoints.path} has no such state"
            )
        best = self._best if self._best is not None and self._best.kept else None
        tensors = tensors_of(self._trained, self._optimizer, {} if best is None else best.kept)
        of_best = None if best is None else (best.step, best.score)
        write_state(checkpoints.path, known_by, State(state.global_step, loss, seconds, peak, of_best, tensors))

    def _totals(self) -> tuple[float, float, int]:
        before, now = self._before, self._now()
        return before[0] + now[0], before[1] + now[1], max(before[2], now[2])

    def result(self) -> TrainingResult:
        """What all steps took."""
        loss, seconds, peak = self._totals()
        step = None if self._best is None else self._best.step
        return TrainingResult(self.steps, seconds, loss / self.steps, peak, step)
