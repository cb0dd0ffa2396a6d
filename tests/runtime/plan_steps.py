"""Single steps of plans, run by the native library on tensors. Import with ``from .plan_steps import ...``."""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prequant.runtime import memory, native
from prequant.runtime import plan as p


def words(
    kind: int,
    sizes: Sequence[int],
    operands: Sequence[Tensor | None],
    option: int = 0,
    number: float = 0.0,
    layer: int = 0,
) -> p.Words:
    """A ``prequant_step`` whose operand ``i`` lies in buffer ``i``."""
    step = np.zeros(p.STEP_WORDS, dtype=np.int64)
    step[:4] = kind, option, np.float64(number).view(np.int64), layer
    step[p.HEAD_WORDS : p.HEAD_WORDS + len(sizes)] = sizes
    for place in range(p.OPERANDS):
        operand = operands[place] if place < len(operands) else None
        start = p.HEAD_WORDS + p.SIZES + place * p.OPERAND_WORDS
        step[start] = p.ABSENT if operand is None else place
        if operand is not None:
            step[start + 2 : start + 2 + operand.dim()] = operand.stride()
    return step


def run(
    steps: Sequence[p.Words], tensors: Sequence[Tensor | None], threads: int = 1, isa: str | None = None
) -> tuple[int, int]:
    """Run steps on buffers that are the tensors. Returns the status, and the number of the step that failed."""
    name = (isa or native.chosen_isa()).encode()
    table = np.ascontiguousarray(np.stack(steps))
    addresses = np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    needed = native.load().prequant_plan_scratch(table.ctypes.data, len(table), threads, name)
    scratch = memory.aligned_bytes(max(needed, 0))
    failed = ctypes.c_int64(-1)
    status = native.load().prequant_run_plan(
        *(table.ctypes.data, len(table), addresses.ctypes.data, scratch.data_ptr(), scratch.numel(), threads, name),
        ctypes.byref(failed),
    )
    assert (needed < 0) == (status in (3, 4) and bool(len(table))) or status == native.BAD_ROW
    return status, failed.value


def done(step: p.Words, tensors: Sequence[Tensor | None], threads: int = 1) -> None:
    """Run one step, which has to succeed."""
    assert run([step], tensors, threads) == (0, -1)


def ulps(found: Tensor, exact: Tensor) -> float:
    """The largest distance from ``exact`` (float64) in units of the last place that float32 has there."""
    near = exact.float().abs().clamp_min(torch.finfo(torch.float32).tiny)
    unit = torch.nextafter(near, torch.tensor(torch.inf)).double() - near.double()
    return float(((found.double() - exact) / unit).abs().max())
