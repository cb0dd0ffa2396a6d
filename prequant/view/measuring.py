"""Running a Program node by node on a batch: how long each takes, and how far its value is from the original's."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from prequant.passes import Program
from prequant.passes.aliasing import mutated
from prequant.passes.nesting import named_results
from prequant.runtime import sqnr

SECONDS = 1.0
"""How long a stage is timed, beside the first run, which does not count."""
RUNS = (3, 20)
"""How often it is run at least and at most."""


@dataclass
class Baseline:
    """Values of the original on the batch: of its nodes by name, and of its results. Floats only."""

    inputs: Mapping[str, Tensor]
    values: dict[str, Tensor] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Of each node by name: ``errors`` in dB (``inf`` where its value is the same) and median ``seconds``; of each
    result by name its error.
    """

    errors: dict[str, float]
    seconds: dict[str, float]
    results: dict[str, float]


def baseline(program: Program, inputs: Mapping[str, Tensor]) -> Baseline:
    """Run the original in eval mode and keep its values."""
    program = program.copy().train(False)
    found = Baseline(inputs)
    # A value that a later node writes into is another one by then.
    writes = any(True for node in program.graph.nodes for _ in mutated(node))

    def keep(node: fx.Node, value: Any) -> None:
        if _is_float(value):
            found.values[node.name] = value.clone() if writes else value

    flat = _Watched(program, keep).results(inputs)
    found.results = {name: value for name, value in _named(program, flat).items() if _is_float(value)}
    return found


def measure(program: Program, original: Baseline, origins: Mapping[str, str]) -> Measured:
    """Compare each value with that of the original's node that ``origins`` names for it, then time the nodes.

    Times are of one op after the other, each by itself, in eval mode and not by a plan.
    """
    program = program.copy().train(False)
    errors: dict[str, float] = {}

    def compare(node: fx.Node, value: Any) -> None:
        exact = original.values.get(origins.get(node.name, ""))
        if exact is not None and (error := _error(exact, value)) is not None:
            errors[node.name] = error

    flat = _Watched(program, compare).results(original.inputs)
    named = _named(program, flat)
    results = {name: _error(exact, named.get(name)) for name, exact in original.results.items()}
    return Measured(
        errors,
        _seconds(program, original.inputs),
        {name: error for name, error in results.items() if error is not None},
    )


def _seconds(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    began = last = time.perf_counter()

    def note(node: fx.Node, value: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        times.setdefault(node.name, []).append(now - last)
        last = time.perf_counter()

    for run in range(RUNS[1]):
        last = time.perf_counter()
        _Watched(program, note).results(inputs)
        if run + 1 >= RUNS[0] and time.perf_counter() - began > SECONDS:
            break
    return {name: statistics.median(seconds) for name, seconds in times.items()}


class _Watched(fx.Interpreter):
    """Runs a graph and shows each value of a node as it comes."""

    def __init__(self, program: Program, watch: Any) -> None:
        super().__init__(program)
        self.program, self.watch = program, watch
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.watch(n, value)
        return value

    def results(self, inputs: Mapping[str, Tensor]) -> Any:
        with torch.no_grad():
            return self.run(*self.program.bind((), inputs))


def _named(program: Program, flat: Any) -> dict[str, Any]:
    return {name: flat[index] for name, index in named_results(program.signature.outputs)}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _error(exact: Tensor, value: Any) -> float | None:
    """SQNR in dB; None for a value that can't be compared: of another shape, or not finite."""
    if not _is_float(value) or value.shape != exact.shape or not value.numel():
        return None
    error = sqnr(exact, value)
    return None if math.isnan(error) or error == -math.inf else error
