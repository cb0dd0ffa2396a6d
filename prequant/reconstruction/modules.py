"""A model and its quantized copy in modules, each of which learns to give what its float twin gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from prequant.losses import LOGITS, QUESTION_ANSWERING
from prequant.measure import tensor_bytes
from prequant.passes import ExposeOutputs, HideOutputs, Partitioned, Program, partition
from prequant.passes.blocks import find_stacks
from prequant.runtime import PrequantError

Objective: TypeAlias = Literal["output", "layers"]
MASKS = ("attention_mask", "decoder_attention_mask")
"""Inputs that say which positions are text and not padding."""

OF_POSITIONS = LOGITS[QUESTION_ANSWERING]
"""Results [batch, length] that are one number for each position, where others of two axes are one for each class."""

Values: TypeAlias = Mapping[str, Tensor]


class ReconstructionError(PrequantError):
    """A model that can't be reconstructed in modules, or a calibration set that can't be used."""


@dataclass(frozen=True)
class Results:
    """What a call of a module gave: ``handed_on`` to the next one, by name, and what is ``compared``, in order."""

    handed_on: Values
    compared: tuple[Tensor, ...]

    def as_float32(self) -> Results:
        """The same, with what was computed in bfloat16 as float32: what other modules are given."""
        return Results(
            {name: _float32(value) for name, value in self.handed_on.items()}, tuple(map(_float32, self.compared))
        )

    def mixed(self, given: Values, share: float) -> Values:
        """What is handed on, of which ``share`` comes from elsewhere: annealed teacher forcing's mixture (MREM)."""
        if not share:
            return self.handed_on
        return {
            name: torch.lerp(value, given[name], share) if value.is_floating_point() else value
            for name, value in self.handed_on.items()
        }


@dataclass(frozen=True)
class Module:
    """The part of the model that one process reconstructs: ``teacher`` in float, ``student`` quantized.

    ``blocks``: how many. ``exposed``: names of further values that are compared, of the teacher and the student each.
    ``taken``: inputs that are values of the module before.
    """

    number: int
    blocks: int
    teacher: Program
    student: Program
    exposed: tuple[tuple[str, str], ...] = ()
    taken: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what it is called with: the model's own inputs, and what the module before hands on."""
        return self.teacher.signature.names

    def to(self, device: torch.device) -> Module:
        """The module on a device."""
        return replace(self, teacher=self.teacher.to(device), student=self.student.to(device))

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return tensor_bytes(self.teacher) + tensor_bytes(self.student)

    def targets(self, inputs: Values) -> Results:
        """What the teacher gives, without gradients."""
        with torch.no_grad():
            return self._results(self.teacher, inputs, [ours for ours, _ in self.exposed])

    def results(self, inputs: Values) -> Results:
        """What the student gives."""
        return self._results(self.student, inputs, [name for _, name in self.exposed])

    def _results(self, program: Program, inputs: Values, exposed: Sequence[str]) -> Results:
        given, seen = program.call_with_exposed(**{name: inputs[name] for name in self.inputs if name in inputs})
        outputs = {f"{key}": value for key, value in _flat(given)}
        # What is only passed on is no work of this module.
        new = [
            value.unsqueeze(-1) if name in OF_POSITIONS else value
            for name, value in outputs.items()
            if value is not inputs.get(name) and value.is_floating_point()
        ]
        return Results(outputs, (*new, *(seen[name] for name in exposed)))


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value


def _flat(value: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """The tensors among results, by their place."""
    if isinstance(value, Tensor):
        return [(path, value)]
    if isinstance(value, Mapping):
        parts = value.items()
    else:
        parts = enumerate(value) if isinstance(value, (list, tuple)) else ()  # type: ignore[assignment]
    return [found for key, part in parts for found in _flat(part, f"{path}.{key}" if path else str(key))]


def reconstruction_loss(given: Sequence[Tensor], wanted: Sequence[Tensor], masks: Sequence[Tensor] = ()) -> Tensor:
    """The mean squared error of each value, summed over the values (MREM, arXiv 2109.15082, its objective for a module
    but for a factor).

    ``masks`` ``[batch, length]``: positions where one is 0 are padding, and do not count in values ``[batch, length,
    ...]`` of its size.
    """
    losses = []
    for ours, theirs in zip(given, wanted, strict=True):
        mask = next((mask for mask in masks if ours.dim() > 2 and ours.shape[:2] == mask.shape), None)
        if mask is None:
            losses.append(mse_loss(ours, theirs))
        else:
            weight = mask.reshape(*mask.shape, *(1,) * (ours.dim() - 2)).to(ours.dtype)
            count = weight.sum() * ours[0, 0].numel()
            losses.append(((ours - theirs).square() * weight).sum() / count)
    return torch.stack(losses).sum()


def split(
    teacher: Program,
    student: Program,
    modules: int | None = None,
    boundaries: Sequence[int] | None = None,
    balance: Literal["parameters", "flops"] = "flops",
    objective: Objective = "output",
) -> tuple[tuple[Module, ...], Partitioned]:
    """Both models cut at the same blocks, the first module with the embeddings and the last with the head; and the
    student's parts, which make one Program again.

    ``modules``, ``boundaries`` (numbers of blocks) and ``balance`` as in
    :func:`prequant.passes.partition`. What several modules read does not train in any. A module is compared by what it
    hands on, the last by what the model returns and by what its last block gives; with ``objective="layers"`` by what
    every block gives. Raises :class:`PassError` where the model can't be cut so, and :class:`ReconstructionError` where
    the two differ in what crosses.
    """
    parts = partition(teacher, modules, boundaries, balance=balance)
    cuts = [cut.blocks for cut in parts.cuts]
    ours = partition(student, boundaries=cuts) if cuts else partition(student, 1)
    for name in ours.shared:
        for module in ours.modules:
            if name in dict(module.named_parameters(remove_duplicate=False)):
                module.set_tensor(name, module.tensor(name), trainable=False)
    edges = [node.name for stack in find_stacks(teacher) for node in stack.boundaries[1:]]
    own = [node.name for stack in find_stacks(student) for node in stack.boundaries[1:]]
    made = []
    for number, pair in enumerate(zip(parts.modules, ours.modules, strict=True)):
        first, last = ([0, *cuts, len(edges)][number + step] for step in (0, 1))
        if pair[0].signature != pair[1].signature:
            raise ReconstructionError(
                f"module {number + 1} of the quantized model takes or hands on something else than the float one: "
                f"{pair[1].signature} instead of {pair[0].signature}"
            )
        # A module may hold no block: the embeddings or the head alone.
        ends = range(first, last) if objective == "layers" else range(max(first, last - 1), last)
        if number < len(parts) - 1:
            ends = range(ends.start, max(ends.start, last - 1))  # the last one is what is handed on
        names = [(edges[block], own[block]) for block in ends]
        exposed = [_exposing(program, [name[side] for name in names]) for side, program in enumerate(pair)]
        taken = tuple(item.name for item in parts.cuts[number - 1].crossing) if number else ()
        made.append(Module(number, last - first, exposed[0].eval(), exposed[1].eval(), tuple(names), taken))
    return tuple(made), ours


def _exposing(program: Program, names: Sequence[str]) -> Program:
    return ExposeOutputs(include=tuple(names))(program) if names else program


def joined(parts: Partitioned, modules: Sequence[Module]) -> Program:
    """The students as one Program again."""
    return parts.with_modules([HideOutputs()(module.student) for module in modules]).whole()
