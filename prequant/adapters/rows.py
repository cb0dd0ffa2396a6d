"""A batch whose rows belong to different tasks, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prequant.model import OUTPUT_CLASS, ModelProgram

from .errors import AdapterError
from .loaded import Adapters


def call_by_rows(
    adapters: Adapters, names: Sequence[str | None], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call the base with a batch, each row with the adapter named for it.

    Where the results of all tasks have the same form, they are one result with the rows in their order; where heads
    differ, there is a tuple with one result, of one row, for each. Each row is to the last bit what the task's Program
    gives for the batch's rows of that task. Raises :class:`AdapterError` for a number of names that is not the batch's,
    and for inputs by which no batch can be told.
    """
    order: list[str | None] = list(dict.fromkeys(names))
    programs = [adapters.program(name) for name in order]
    inputs = _by_name(programs, args, kwargs)
    if any(value.shape[:1] != (len(names),) for value in inputs.values()):
        found = ", ".join(f"{name} is {list(value.shape)}" for name, value in inputs.items())
        raise AdapterError(f"adapters are named for {len(names)} rows; {found}")
    if len(programs) == 1:
        return programs[0](**inputs)
    rows = [torch.tensor([row for row, name in enumerate(names) if name == one]) for one in order]
    flat: list[Tensor] = []
    for program, chosen in zip(programs, rows, strict=True):
        flat += program.bind(
            (), {name: value[chosen] for name, value in inputs.items() if name in program.signature.names}
        )
    results = adapters.together(order)(*flat)
    places = torch.cat(rows).argsort()
    if _have_one_form(programs, results):
        return programs[0].nest_outputs(tuple(torch.cat(parts)[places] for parts in zip(*results, strict=True)))
    single = [
        program.nest_outputs(tuple(part[row : row + 1] for part in result))
        for program, result in zip(programs, results, strict=True)
        for row in range(len(result[0]))
    ]
    return tuple(single[place] for place in places.tolist())


def _by_name(programs: Sequence[ModelProgram], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    names = list(dict.fromkeys(name for program in programs for name in program.signature.names))
    if len(args) > len(names):
        raise TypeError(f"{len(args)} positional inputs given; these Programs take {len(names)}: {', '.join(names)}")
    inputs = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise TypeError(f"unexpected input {name!r}; rows of several tasks take {', '.join(names)}, and no labels")
        if name in inputs:
            raise TypeError(f"input {name!r} given twice")
        if value is not None:
            inputs[name] = value
    return inputs


def _have_one_form(programs: Sequence[ModelProgram], results: Sequence[tuple[Any, ...]]) -> bool:
    """Whether the results can be the rows of one."""
    forms = {
        (str(program.signature.outputs), program.info.extra[OUTPUT_CLASS], *(part.shape[1:] for part in result))
        for program, result in zip(programs, results, strict=True)
    }
    return len(forms) == 1
