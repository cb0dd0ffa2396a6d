"""Distillation: a student learns what its teacher computes, layer by layer, and no labels.

One stage, as XTC has it (Li et al., arXiv 2206.01859): the sum, unweighted, of how far logits, attention scores before
softmax, and hidden states are from the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss

from prequant.losses import LOGITS, SEQUENCE_CLASSIFICATION
from prequant.model import ModelProgram
from prequant.passes import ExposeOutputs
from prequant.passes.expose_outputs import HIDDEN_STATES, SCORES
from prequant.runtime import PrequantError

COMPARED = ExposeOutputs(hidden_states=True, attention_scores=True)
"""What a student and its teacher have to expose."""


class DistillationError(PrequantError):
    """A student and a teacher whose values can't be compared."""


@dataclass(frozen=True)
class LayerMap:
    """Which of the teacher's values each of the student's is compared with, by number: of attention scores one a layer,
    of hidden states one more, as the first is what enters the first layer.
    """

    scores: tuple[int, ...]
    states: tuple[int, ...]


def layer_map(kept: Sequence[int], published: bool = False) -> LayerMap:
    """The map for a student whose layers are the teacher's numbered ``kept``.

    A layer's scores, and the state that leaves it, go with those of the layer that it was; the state that enters the
    first one with what entered that layer. ``published``: the latter with the state before, as XTC's code has it, so
    that its indices begin with ``kept[0] - 1`` (which it does not guard: for a student with the first layer that is the
    teacher's last state; here it is the first). Raises :class:`DistillationError` for no layers, or numbers out of
    order.
    """
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0:
        raise DistillationError(f"kept={list(kept)}: expected numbers of the teacher's layers, in order")
    first = max(kept[0] - 1, 0) if published else kept[0]
    return LayerMap(tuple(kept), (first, *(number + 1 for number in kept)))


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy of the student's classes under the teacher's, averaged over rows *and* classes, as published: by
    the number of classes less than the usual one.
    """
    return -(teacher.softmax(-1) * log_softmax(student, -1)).mean()


class Distiller(nn.Module):
    """A student that returns its distance from a teacher as its loss, for any loop that trains on ``loss``.

    Both are ModelPrograms that expose what is :data:`COMPARED`; the teacher is in eval mode, without gradients, and no
    part of this module. Labels of a batch are not looked at. Of values that two stacks have (T5), each is compared with
    that of the same stack, by the same map.
    """

    accepts_loss_kwargs = False
    """For the ``Trainer``: the loss is a mean."""

    def __init__(self, student: ModelProgram, teacher: ModelProgram, layers: LayerMap) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher.train(False)]  # in a list: its parameters are not the student's
        self._pairs = list(_pairs(student, teacher, layers))

    @property
    def config(self) -> Any:
        """The student's."""
        return self.student.config

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """``loss`` and its parts: ``logits``, ``attention_scores``, ``hidden_states``, each a mean for each layer,
        summed over layers.
        """
        inputs = {name: value for name, value in batch.items() if name in self.student.signature.names}
        with torch.no_grad():
            wanted, theirs = self._teacher[0].call_with_exposed(**inputs)
        given, ours = self.student.call_with_exposed(**inputs)
        parts = {"logits": self._of_logits(given, wanted)}
        for name, other in self._pairs:
            kind = HIDDEN_STATES if HIDDEN_STATES in name else SCORES
            distance = mse_loss(ours[name].float(), theirs[other].float())
            parts[kind] = parts[kind] + distance if kind in parts else distance
        return {"loss": torch.stack(list(parts.values())).sum(), **{f"{k}_loss": v.detach() for k, v in parts.items()}}

    def _of_logits(self, given: Any, wanted: Any) -> Tensor:
        task = self.student.task
        names = LOGITS[task] if task is not None else ("logits",)
        regression = task == SEQUENCE_CLASSIFICATION and given[names[0]].shape[-1] == 1
        distance = mse_loss if regression else soft_cross_entropy
        return torch.stack([distance(given[name].float(), wanted[name].float()) for name in names]).sum()


def _pairs(student: ModelProgram, teacher: ModelProgram, layers: LayerMap) -> Iterator[tuple[str, str]]:
    """Names of the student's exposed values, each with the teacher's."""
    for name in student.signature.exposed:
        kind, _, number = name.rpartition(".")
        if not (kind.endswith((HIDDEN_STATES, SCORES)) and number.isdigit()):
            continue
        numbers = layers.states if kind.endswith(HIDDEN_STATES) else layers.scores
        if int(number) >= len(numbers):
            raise DistillationError(f"the student has {name}; the map is for {len(layers.scores)} layers: {layers}")
        other = f"{kind}.{numbers[int(number)]}"
        if other not in teacher.signature.exposed:
            raise DistillationError(f"the student's {name} goes with the teacher's {other}, which that does not expose")
        yield name, other
