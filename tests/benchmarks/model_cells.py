"""The measurements of the benchmark of whole models: one model, a process for each contender."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from model_contenders import PREQUANT, Contender, packed  # type: ignore[import-not-found]
from model_inputs import Batch, Cell, Source  # type: ignore[import-not-found]
from model_onnx import onnx_contenders  # type: ignore[import-not-found]
from model_openvino import openvino_contenders  # type: ignore[import-not-found]
from model_torch import torch_contenders  # type: ignore[import-not-found]
from processes import Worker, WorkerError, apart  # type: ignore[import-not-found]
from turns import Passes, Times  # type: ignore[import-not-found]

from prequant.measure import PeakMemory

REFERENCE = "torch fp32"


def contenders() -> list[Contender]:
    """Every contender, whether it can run here or not; the reference comes first."""
    return [*torch_contenders(), *onnx_contenders(), *openvino_contenders(), *packed()]


@dataclass(frozen=True)
class Plan:
    """How to measure: ``lead`` and ``block`` are seconds, ``timeout`` too, of preparing and of loading."""

    threads: int
    repeats: int
    warmup: int
    lead: float
    block: float
    timeout: float


@dataclass(frozen=True)
class Loaded:
    """What it takes to hold a model: ``peak`` and ``resident`` are bytes over those of the process with its libraries
    imported, while it loads and runs its first batch, and after; ``disk`` is bytes; the rest is seconds."""

    model: str
    name: str
    library: str
    bits: int
    peak: int
    resident: int
    disk: int
    load: float
    first_call: float


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


@dataclass
class Found:
    """What was measured, and why what is absent is."""

    loaded: list[Loaded] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


class Stand:
    """A contender that is being measured, in a process of its own."""

    def __init__(self, contender: Contender, source: Source, folder: Path, plan: Plan) -> None:
        self._contender, self._source, self._folder, self._plan = contender, source, folder, plan
        torch.set_num_threads(plan.threads)
        contender.imports()
        self._cell = source.cells[0]
        first = source.batches(self._cell)[0]
        with torch.inference_mode(), PeakMemory() as memory:
            started = time.perf_counter()
            contender.load(folder, source, self._cell, plan.threads)
            loaded = time.perf_counter()
            contender.run(first)
            called = time.perf_counter()
        with PeakMemory() as after:
            pass
        disk = sum(file.stat().st_size for file in folder.iterdir())
        whose = (source.name, contender.name, contender.library, contender.bits)
        sizes = (memory.growth, max(0, after.before - memory.before), disk)
        self._loaded = Loaded(*whose, *sizes, loaded - started, called - loaded)

    def loaded(self) -> Loaded:
        return self._loaded

    def begin(self, cell: Cell) -> list[np.ndarray]:
        """Get ready for turns on ``cell``; the outputs of its batches, without those of padding."""
        batches = self._source.batches(cell)
        with torch.inference_mode():
            if cell != self._cell:
                self._contender.load(self._folder, self._source, cell, self._plan.threads)
                self._cell = cell
            calls = [partial(self._contender.run, batch) for batch in batches]
            outputs = [_kept(call(), batch) for call, batch in zip(calls, batches, strict=True)]
        self._passes = Passes(calls, self._plan.lead, self._plan.block)
        return outputs

    def turn(self) -> list[float]:
        """Seconds of each batch."""
        with torch.inference_mode():
            return list(self._passes.turn())


def _kept(hidden: np.ndarray, batch: Batch) -> np.ndarray:
    return np.array(hidden[batch.mask.astype(bool)], dtype=np.float32)


def _prepare(contender: Contender, source: Source, folder: Path, threads: int) -> None:
    """Fill ``folder``, unless it is there from an earlier time."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    torch.set_num_threads(threads)
    with torch.no_grad():
        contender.prepare(source, unfinished)
    unfinished.rename(folder)


def measure_source(
    plan: Plan, source: Source, chosen: Sequence[Contender], work: Path, log: Callable[[str], object]
) -> Found:
    """Prepare and measure ``chosen``, the reference first, on every cell of ``source``, in turns.

    What was prepared in ``work`` before is used again.
    """
    found = Found()
    stands: dict[Contender, Worker] = {}
    with ExitStack() as stack:
        for contender in chosen:
            log(f"{source.name}: {contender.name}")
            folder = work / source.name / contender.slug
            try:
                apart(plan.threads, _prepare, contender, source, folder, plan.threads, timeout=plan.timeout)
                make = partial(Stand, contender, source, folder, plan)
                worker = stack.enter_context(Worker(plan.threads, make, plan.timeout))
                found.loaded.append(worker.call("loaded"))
                stands[contender] = worker
            except (WorkerError, TimeoutError) as error:
                _leave_out(contender, f"{source.name}: {contender.name}", error, found)
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
            taking_part[contender] = _compared(contender, outputs, expected)
        except (WorkerError, TimeoutError, WrongOutputError) as error:
            _leave_out(contender, f"{source.name}, {cell}: {contender.name}", error, found)
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


class WrongOutputError(Exception):
    """A peer computes something else than the model."""


def _compared(
    contender: Contender, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]
) -> tuple[float, float]:
    """Relative error and cosine; raises :class:`WrongOutputError` if a peer is further off than it may be."""
    found, reference = (np.concatenate(parts).astype(np.float64).ravel() for parts in (outputs, expected))
    if found.shape != reference.shape:
        raise WrongOutputError(f"its output has {found.size} values, not {reference.size}")
    norm = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(found - reference)) / norm
    cosine = float(found @ reference) / (float(np.linalg.norm(found)) * norm)
    if contender.library != PREQUANT and not error <= contender.tolerance:
        raise WrongOutputError(f"its output is {error:.3g} from the float32 one, of which {contender.tolerance} may be")
    return error, cosine


def _leave_out(contender: Contender, what: str, error: Exception, found: Found) -> None:
    if contender.library == PREQUANT or contender.name == REFERENCE:
        raise error
    found.absent[what] = str(error)
