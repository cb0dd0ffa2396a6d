"""The measurements of the benchmark of a linear layer: one shape on one number of threads, a process a library."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from ceilings import Ceilings  # type: ignore[import-not-found]
from contenders import Contender, Layer, Packed  # type: ignore[import-not-found]
from peers import peers  # type: ignore[import-not-found]
from processes import Worker  # type: ignore[import-not-found]
from turns import Rotation, Times  # type: ignore[import-not-found]

OURS = "prequant"


@dataclass(frozen=True)
class Plan:
    """What to measure and how: ``rotated`` is in bytes, ``lead`` and ``block`` in seconds."""

    tokens: tuple[int, ...]
    formats: tuple[str, ...]
    activations: tuple[str, ...]
    libraries: tuple[str, ...]
    repeats: int
    warmup: int
    rotated: int
    lead: float
    block: float


@dataclass
class Measurement:
    """One contender on one layer and number of rows of input, ``M``; times are microseconds.

    ``floor`` is the least that the measured ceilings allow for its own bytes and operations, with the weights read from
    where as many bytes as rotate lie; ``memory_floor`` with the weights read from memory. ``error`` is relative to the
    float layer's output.
    """

    threads: int
    N: int
    K: int
    M: int
    name: str
    library: str
    bits: int
    time: float
    p10: float
    p90: float
    weight_bytes: int
    floor: float
    memory_floor: float
    error: float


@dataclass
class Found:
    """What was measured, and why what is absent is."""

    measurements: list[Measurement] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What a contender says of itself, once its output was found right."""

    name: str
    library: str
    bits: int
    arithmetic: str
    weight_bytes: int
    input_bytes: int
    error: float


class Bench:
    """The contenders of one library on one weight ``[N, K]``. Lives in a process of its own."""

    def __init__(self, plan: Plan, library: str, shape: tuple[int, int], threads: int) -> None:
        torch.set_num_threads(threads)
        self._plan = plan
        self._layer = Layer.random(*shape, max(plan.tokens), plan.rotated, threads)
        self._absent: dict[str, str] = {}
        self._prepared: list[Contender] = []
        self._rotations: list[Rotation] = []
        everybody = [peer for peer in peers() if peer.library == library]
        if library == OURS:
            everybody = [Packed(format, activation) for format in plan.formats for activation in plan.activations]
        for contender in everybody:
            try:
                contender.prepare(self._layer)
                self._prepared.append(contender)
            except Exception as error:
                self._leave_out(contender, contender.name, error)

    def begin(self, tokens: int) -> tuple[list[Entry], dict[str, str]]:
        """Get ready for turns on ``tokens`` rows of input: who takes part, and why the others don't."""
        (rows, columns), input = self._layer.weight.shape, self._layer.inputs[:tokens]
        entries, self._rotations = [], []
        with torch.inference_mode():
            float_output = input @ self._layer.weight.T
            for contender in self._prepared:
                try:
                    calls = contender.calls(input)
                    error = contender.check(contender.output(calls[0]()), float_output)
                    for call in calls[1:]:
                        call()
                except Exception as failure:
                    self._leave_out(contender, f"{contender.name}, {rows} × {columns}, M = {tokens}", failure)
                    continue
                c = contender
                entries.append(Entry(c.name, c.library, c.bits, c.arithmetic, c.bytes, c.input_bytes, error))
                self._rotations.append(Rotation(calls, self._plan.lead, self._plan.block))
        # Some libraries change it as they load.
        torch.set_num_threads(self._layer.threads)
        return entries, self._absent

    def turn(self) -> list[float]:
        """One turn of each: seconds a call."""
        with torch.inference_mode():
            return [rotation.turn() for rotation in self._rotations]

    def _leave_out(self, contender: Contender, what: str, error: Exception) -> None:
        if contender.library == OURS:
            raise error
        text = str(error).strip()
        self._absent[what] = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def measure_shape(plan: Plan, shape: tuple[int, int], ceilings: Ceilings) -> Found:
    """Measure every contender of ``plan`` on a weight ``[N, K]`` and each number of rows of input."""
    found = Found()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(ceilings.threads, partial(Bench, plan, library, shape, ceilings.threads)))
            for library in (OURS, *plan.libraries)
        ]
        for tokens in plan.tokens:
            found.measurements += _measure(plan, shape, workers, tokens, ceilings, found.absent)
    return found


def _measure(
    plan: Plan,
    shape: tuple[int, int],
    workers: Sequence[Worker],
    tokens: int,
    ceilings: Ceilings,
    absent: dict[str, str],
) -> list[Measurement]:
    """Time all contenders in turns on ``tokens`` rows of input; who can't run or is wrong goes to ``absent``."""
    entries: list[Entry] = []
    for worker in workers:
        theirs, missing = worker.call("begin", tokens)
        entries += theirs
        absent |= missing
    seconds: list[list[float]] = [[] for _ in entries]
    for turn in range(plan.warmup + plan.repeats):
        found = [each for worker in workers for each in worker.call("turn")]
        if turn >= plan.warmup:
            for past, each in zip(seconds, found, strict=True):
                past.append(each)
    return [
        _measurement(shape, tokens, entry, Times.of(times), ceilings)
        for entry, times in zip(entries, seconds, strict=True)
    ]


def _measurement(shape: tuple[int, int], tokens: int, entry: Entry, seconds: Times, ceilings: Ceilings) -> Measurement:
    rows, columns = shape
    bytes_ = entry.weight_bytes + tokens * (rows + columns) * entry.input_bytes
    floors = [
        ceilings.floor(bytes_, 2 * tokens * rows * columns, entry.arithmetic, from_memory)
        for from_memory in (False, True)
    ]
    return Measurement(
        threads=ceilings.threads,
        N=rows,
        K=columns,
        M=tokens,
        name=entry.name,
        library=entry.library,
        bits=entry.bits,
        time=1e6 * seconds.median,
        p10=1e6 * seconds.p10,
        p90=1e6 * seconds.p90,
        weight_bytes=entry.weight_bytes,
        floor=1e6 * floors[0],
        memory_floor=1e6 * floors[1],
        error=entry.error,
    )
