"""Example batches: inputs of a Program that a pass may look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from prequant.runtime import PrequantError

from .program import Program


class BatchError(PrequantError):
    """Batches that a Program can't be called with; names the batch."""


class ExampleBatches:
    """Batches of inputs, each a mapping by name, kept to be gone through more than once.

    It is an option of a pass that has no text form: in text, a pass works without. Raises :class:`BatchError` for none
    at all.
    """

    def __init__(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self.batches = tuple(batches)
        if not self.batches:
            raise BatchError("there is no batch")

    def __len__(self) -> int:
        return len(self.batches)

    def __str__(self) -> str:
        return f"{len(self)} batches"

    def bound(self, program: Program) -> Iterator[tuple[Tensor, ...]]:
        """Each batch as the flat inputs of ``program``. Raises :class:`BatchError` for one that it does not take."""
        for number, batch in enumerate(self.batches):
            yield bound(program, batch, number)


def bound(program: Program, batch: Any, number: int) -> tuple[Tensor, ...]:
    """A batch as flat inputs; ``number`` names it in the :class:`BatchError` of one that does not fit."""
    if not isinstance(batch, Mapping):
        raise BatchError(f"batch {number} is a {type(batch).__name__}, not a mapping of inputs by name")
    try:
        return program.bind((), batch)
    except (TypeError, PrequantError) as error:
        raise BatchError(f"batch {number}: {error}") from error
