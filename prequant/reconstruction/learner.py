"""The training of one module: AdamW on what the module's student and teacher give, and nothing beyond the module."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prequant.passes import weights
from prequant.passes.latent_scales import following
from prequant.training import Checkpoints, TrainingError, TrainingSettings, parameter_groups
from prequant.training.checkpoints import State, identity, read_state, restore, tensors_of, write_state
from prequant.training.precision import computing_in

from .modules import MASKS, Module, Results, Values, reconstruction_loss

WINDOW = 50
"""Over so many steps, or a tenth of all, losses are averaged: at the end with weights that fall that fast."""


@dataclass(frozen=True)
class ModuleFigures:
    """What the reconstruction of a module took. Losses are means over the first steps and the last. ``peak_memory``:
    bytes of the modules that the process trained, and how much it grew by that. ``seconds_before``: those of
    ``seconds`` that were spent before the training went on. ``trained``: how many numbers trained in the module; what
    several modules read trains in none.
    """

    number: int
    blocks: int
    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    peak_memory: int
    seconds_before: float = 0.0
    trained: int = 0


class Learner:
    """Trains the student of a module for ``steps`` steps; learning rates rise and fall as ``settings`` say.

    ``scales_follow``: scales of latent weights are chosen anew after each step. ``padding``: whether padded positions
    count. ``checkpoints``: where the state is kept on the way; one that is there is gone on from, and :attr:`done` says
    how many steps it has.
    """

    def __init__(
        self,
        module: Module,
        settings: TrainingSettings,
        steps: int,
        scales_follow: bool = False,
        padding: bool = False,
        checkpoints: Checkpoints | None = None,
        data: str = "",
    ) -> None:
        self.module, self.settings, self.steps, self.padding = module, settings, steps, padding
        self._trained: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in module.student.named_parameters() if parameter.requires_grad
        }
        self._optimizer = torch.optim.AdamW(parameter_groups(module.student, settings), fused=True)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        latent = any("latent" in view.tensors for view in weights(module.student))  # none where it is the head alone
        self._renew = following(module.student).renew if scales_follow and latent else None
        self._checkpoints = checkpoints
        self._window = max(1, min(WINDOW, steps // 10))
        self._first_sum, self._last = 0.0, 0.0
        self._seconds, self._seconds_before = 0.0, 0.0
        self.peak_memory = 0
        self.done = 0
        if checkpoints is not None:
            self._known_by = identity(module.student, data, settings, checkpoints.about)
            if checkpoints.path.exists():
                self._go_on(checkpoints.path)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.done >= self.steps

    def step(self, inputs: Values, targets: Results) -> tuple[Results, float]:
        """One step on a batch; returns what the student gave before it, without gradients, and the loss."""
        started = time.perf_counter()
        factor = self._factor()
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        with computing_in(self.settings.precision, next(iter(inputs.values())).device):
            found = self.module.results(inputs)
        found = found.as_float32()
        masks = () if self.padding else [inputs[name] for name in MASKS if name in inputs]
        loss = reconstruction_loss(found.compared, targets.compared, masks)
        if not math.isfinite(value := loss.item()):
            raise TrainingError(
                f"the loss of module {self.module.number + 1} was {value} in step {self.done + 1}: its training has "
                "diverged; a smaller learning rate may help"
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained.values(), self.settings.max_grad_norm)
        self._optimizer.step()
        if self._renew is not None:
            self._renew()
        self.done += 1
        self._first_sum += value if self.done <= self._window else 0.0
        self._last += (value - self._last) / min(self.done, self._window)
        self._seconds += time.perf_counter() - started
        self._keep()
        handed_on = {name: result.detach() for name, result in found.handed_on.items()}
        return Results(handed_on, ()), value

    def _factor(self) -> float:
        """Of the learning rates in the next step: up in a line, then down to 0, as the trainings of whole models."""
        warmup = math.ceil(self.settings.warmup * self.steps)
        if self.done < warmup:
            return self.done / warmup
        return (self.steps - self.done) / max(1, self.steps - warmup)

    def figures(self) -> ModuleFigures:
        """What it took."""
        first = self._first_sum / max(1, min(self.done, self._window))
        return ModuleFigures(
            self.module.number,
            self.module.blocks,
            self.done,
            self._seconds,
            first,
            self._last,
            self.peak_memory,
            self._seconds_before,
            sum(parameter.numel() for parameter in self._trained.values()),
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        checkpoints = self._checkpoints
        if checkpoints is None or (self.done % checkpoints.every and not self.finished):
            return
        tensors = tensors_of(self._trained, self._optimizer, {})
        state = State(self.done, self._last, self._seconds, self.peak_memory, None, tensors, self._first_sum)
        write_state(checkpoints.path, self._known_by, state)

    def _go_on(self, path: Path) -> None:
        state = read_state(path, self._known_by, tensors_of(self._trained, self._optimizer, {}), self.steps)
        restore(self._trained, self._optimizer, state.tensors)
        if self._renew is not None:
            self._renew()
        self.done, self._seconds, self.peak_memory = state.step, state.seconds, state.peak_memory
        self._last, self._first_sum, self._seconds_before = state.loss, state.first_loss, state.seconds
