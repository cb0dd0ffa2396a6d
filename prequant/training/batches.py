"""The order of batches over a whole training, from any step on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from .settings import TrainingSettings


def steps_of(settings: TrainingSettings, rows: int) -> int:
    """How many steps a training on so many rows takes."""
    return settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * _per_epoch(settings, rows))


def _per_epoch(settings: TrainingSettings, rows: int) -> int:
    return math.ceil(rows / settings.batch_size)


class Batches:
    """Numbers of the rows of each batch, as a DataLoader takes them, after the first ``done`` steps.

    Batches hold rows of similar ``lengths``, in another order each epoch, which depends on the seed and the lengths
    alone: the generator is their own, so that dropout draws what it would without them.
    """

    def __init__(self, lengths: Sequence[int], settings: TrainingSettings, done: int = 0) -> None:
        self.lengths, self.settings, self.done = list(lengths), settings, done
        self.steps = steps_of(settings, len(self.lengths))

    def __len__(self) -> int:
        return self.steps - self.done

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        size, step = self.settings.batch_size, 0
        while True:
            rows = list(LengthGroupedSampler(size, lengths=self.lengths, generator=generator))
            for start in range(0, len(rows), size):
                if step == self.steps:
                    return
                if step >= self.done:
                    yield rows[start : start + size]
                step += 1
