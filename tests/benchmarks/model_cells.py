"""The measurements of the benchmark of whole encoders: one model, a process for each contender."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from model_contenders import Encoding, packed  # type: ignore[import-not-found]
from model_inputs import Batch, Cell, Source  # type: ignore[import-not-found]
from model_onnx import onnx_contenders  # type: ignore[import-not-found]
from model_openvino import openvino_contenders  # type: ignore[import-not-found]
from model_torch import torch_contenders  # type: ignore[import-not-found]
from processes import Worker  # type: ignore[import-not-found]
from stands import (  # type: ignore[import-not-found]
    FAILURES,
    Contender,
    Found,
    Plan,
    Stand,
    WrongOutputError,
    compared,
    open_stands,
)
from turns import Passes, Times  # type: ignore[import-not-found]


def contenders() -> list[Contender]:
    """Every contender, whether it can run here or not; the reference comes first."""
    return [*torch_contenders(), *onnx_contenders(), *openvino_contenders(), *packed()]


@dataclass(frozen=True)
class Measurement:
    """One contender on one cell: seconds of a batch, and sentences a second over all of them.

    ``error`` and ``cosine`` compare the hidden states of all tokens that are no padding with the reference's.
    """

    model: str
    cell: str
    name: str
    library: str
    bits: int
    median: float
    p10: float
    p90: float
    throughput: float
    error: float
    cosine: float


class EncoderStand(Stand):
    """An encoder that is being measured."""

    def get_inputs(self) -> None:
        self._contender, self._source = cast(Encoding, self.contender), cast(Source, self.source)
        self._cell = self._source.cells[0]
        self._first = self._source.batches(self._cell)[0]

    def load(self) -> None:
        self._contender.load(self.folder, self._source, self._cell, self.plan.threads)

    def first_call(self) -> None:
        self._contender.run(self._first)

    def begin(self, cell: Cell) -> list[np.ndarray]:
        """Get ready for turns on ``cell``; the outputs of its batches, without those of padding."""
        batches = self._source.batches(cell)
        with torch.inference_mode():
            if cell != self._cell:
                self._contender.load(self.folder, self._source, cell, self.plan.threads)
                self._cell = cell
            calls = [partial(self._contender.run, batch) for batch in batches]
            outputs = [_kept(call(), batch) for call, batch in zip(calls, batches, strict=True)]
        self._passes = Passes(calls, self.plan.lead, self.plan.block)
        return outputs

    def turn(self) -> list[float]:
        """Seconds of each batch."""
        with torch.inference_mode():
            return list(self._passes.turn())


def _kept(hidden: np.ndarray, batch: Batch) -> np.ndarray:
    return np.array(hidden[batch.mask.astype(bool)], dtype=np.float32)


def measure_source(
    plan: Plan, source: Source, chosen: Sequence[Contender], work: Path, log: Callable[[str], object]
) -> Found:
    """Measure ``chosen``, the reference first, on every cell of ``source``, in turns."""
    found = Found()
    with ExitStack() as stack:
        stands = open_stands(stack, EncoderStand, plan, source, chosen, work, found, log)
        for cell in source.cells:
            log(f"{source.name}: {cell}")
            found.measurements += _measure(plan, source, cell, stands, found)
    return found


def _measure(
    plan: Plan, source: Source, cell: Cell, stands: Mapping[Contender, Worker], found: Found
) -> list[Measurement]:
    """Time ``stands`` in turns; who can't run ``cell`` or is wrong is left out."""
    expected: list[np.ndarray] = []
    taking_part: dict[Contender, tuple[float, float]] = {}
    for contender, worker in stands.items():
        try:
            outputs = worker.call("begin", cell, timeout=plan.timeout)
            expected = expected or outputs
            taking_part[contender] = compared(contender, outputs, expected)
        except (*FAILURES, WrongOutputError) as error:
            found.leave_out(contender, f"{source.name}, {cell}", error)
    seconds: dict[Contender, list[float]] = {contender: [] for contender in taking_part}
    for turn in range(plan.warmup + plan.repeats):
        for contender, past in seconds.items():
            each = stands[contender].call("turn")
            if turn >= plan.warmup:
                past += each
    measurements = []
    for contender, past in seconds.items():
        times = Times.of(past)
        whose = (source.name, str(cell), contender.name, contender.library, contender.bits)
        throughput = cell.batch * len(past) / sum(past)
        measurements.append(
            Measurement(*whose, times.median, times.p10, times.p90, throughput, *taking_part[contender])
        )
    return measurements
