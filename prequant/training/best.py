"""The best state of a training, by a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class Best(TrainerCallback):
    """Keeps the trainable parameters of the best of the states that are scored: every so many steps, and the last."""

    def __init__(self, model: nn.Module, evaluate: Callable[[], float], every: int) -> None:
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._model, self._evaluate, self._every = model, evaluate, every
        self.score, self.step = -math.inf, 0
        self.kept: Mapping[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Score the state, if it is time to."""
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        self._model.eval()
        # Loaders draw from the generator that dropout draws from.
        with torch.random.fork_rng(), torch.no_grad():
            score = self._evaluate()
        if math.isnan(score):  # of a model whose results are no numbers
            score = -math.inf
        if score > self.score or not self.kept:
            self.score, self.step = score, state.global_step
            self.kept = {name: parameter.detach().clone() for name, parameter in self._trained.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its best state again."""
        for name, value in self.kept.items():
            self._trained[name].copy_(value)
