"""A Program on another device, or in another floating-point type: the graph goes with its tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from prequant.runtime import PrequantError

from .devices import set_device
from .dtypes import set_dtype
from .program import Program
from .shapes import propagate_shapes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that a graph can compute in."""


def move(program: Program, change: Callable[[Tensor], Tensor], apply: Callable[[], object]) -> None:
    """Let ``apply`` change all tensors of ``program`` by ``change``, and its graph follow.

    Raises :class:`PrequantError` for a type that no graph computes in; nothing has changed then.
    """
    old = _float_dtype(program)
    new = None if old is None else change(torch.empty(0, dtype=old)).dtype
    constants: dict[str, Tensor] = {}
    if old is not None and new is not None and new is not old:
        if new not in FLOATS:
            raise PrequantError(f"a Program can't compute in {new}; it takes {', '.join(map(str, FLOATS))}")
        propagate_shapes(program)
        set_dtype(program, old, new, program.info.constants)
        constants = {name: program.tensor(name) for name in program.info.constants}
    apply()
    program.drop_plan()
    held = next(chain(program.parameters(), program.buffers()), None)
    for name, constant in constants.items():
        program.set_tensor(name, constant.to(program.tensor(name).device))
    moved = held is not None and set_device(program.graph, held.device)
    if new is not old:
        propagate_shapes(program)
    if moved or new is not old:
        program.recompile()


def _float_dtype(program: Program) -> torch.dtype | None:
    """The type of the floating-point parameters (the first of them): what the graph computes in."""
    floats = (tensor for tensor in program.parameters() if tensor.is_floating_point())
    return next((tensor.dtype for tensor in floats), None)
