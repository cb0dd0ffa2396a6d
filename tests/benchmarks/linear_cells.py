"""The measurements of the benchmark of a linear layer: one shape on one number of threads, in a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from ceilings import Ceilings  # type: ignore[import-not-found]
from contenders import Contender, Layer, Packed  # type: ignore[import-not-found]
from peers import peers  # type: ignore[import-not-found]
from turns import Call, take_turns  # type: ignore[import-not-found]


@dataclass(frozen=True)
class Plan:
    """What to measure and how: ``rotated`` is in bytes, ``pause`` in seconds."""

    tokens: tuple[int, ...]
    formats: tuple[str, ...]
    activations: tuple[str, ...]
    libraries: tuple[str, ...]
    repeats: int
    warmup: int
    rotated: int
    pause: float


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


def measure_shape(plan: Plan, shape: tuple[int, int], ceilings: Ceilings) -> Found:
    """Measure every contender of ``plan`` on a weight ``[N, K]`` and each number of rows of input."""
    layer = Layer.random(*shape, max(plan.tokens), plan.rotated, ceilings.threads)
    found = Found()
    ours = [Packed(format, activation) for format in plan.formats for activation in plan.activations]
    prepared = [*ours, *(peer for peer in peers() if peer.library in plan.libraries)]
    for contender in list(prepared):
        try:
            contender.prepare(layer)
        except Exception as error:
            if contender.library == "prequant":
                raise
            prepared.remove(contender)
            found.absent[contender.name] = _reason(error)
    for tokens in plan.tokens:
        found.measurements += _measure(plan, prepared, layer, tokens, ceilings, found.absent)
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _measure(
    plan: Plan, prepared: Sequence[Contender], layer: Layer, tokens: int, ceilings: Ceilings, absent: dict[str, str]
) -> list[Measurement]:
    """Time ``prepared`` in turns on ``tokens`` rows of input; who can't run or is wrong goes to ``absent``."""
    (rows, columns), input = layer.weight.shape, layer.inputs[:tokens]
    runners: list[tuple[Contender, list[Call], float]] = []
    with torch.inference_mode():
        float_output = input @ layer.weight.T
        for contender in prepared:
            try:
                calls = contender.calls(input)
                runners.append((contender, calls, contender.check(contender.output(calls[0]()), float_output)))
            except Exception as error:
                if contender.library == "prequant":
                    raise
                absent[f"{contender.name}, {rows} × {columns}, M = {tokens}"] = _reason(error)
        torch.set_num_threads(layer.threads)
        times = take_turns([calls for _, calls, _ in runners], plan.repeats, plan.warmup, plan.pause)
    measurements = []
    for (contender, _, off), seconds in zip(runners, times, strict=True):
        bytes_ = contender.bytes + tokens * (rows + columns) * contender.input_bytes
        floors = [
            ceilings.floor(bytes_, 2 * tokens * rows * columns, contender.arithmetic, from_memory)
            for from_memory in (False, True)
        ]
        measurements.append(
            Measurement(
                threads=ceilings.threads,
                N=rows,
                K=columns,
                M=tokens,
                name=contender.name,
                library=contender.library,
                bits=contender.bits,
                time=1e6 * seconds.median,
                p10=1e6 * seconds.p10,
                p90=1e6 * seconds.p90,
                weight_bytes=contender.bytes,
                floor=1e6 * floors[0],
                memory_floor=1e6 * floors[1],
                error=off,
            )
        )
    return measurements
