"""A Program of one's own, and a count of the calls that go by a plan."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from prequant.passes import Program
from prequant.runtime import plan as runtime_plan

from .small import lowered


@pytest.fixture
def program() -> Program:
    return copy.deepcopy(lowered())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with every call of a plan."""
    made: list[int] = []
    call = runtime_plan.Plan.__call__

    def counted(self: runtime_plan.Plan, *inputs: Tensor) -> tuple[Any, ...]:
        made.append(len(made))
        return call(self, *inputs)

    monkeypatch.setattr(runtime_plan.Plan, "__call__", counted)
    yield made
