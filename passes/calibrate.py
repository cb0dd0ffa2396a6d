"""calibrate: static activation scales from batches of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, fx
from tqdm.auto import tqdm

from prequant.runtime import Calibrator, PrequantError, WeightFormat, calibrator, ops

from .program import Program
from .properties import define_property
from .quantize_activations import set_static
from .reports import Report


class CalibrationError(PrequantError):
    """Batches that give no scales; names the batch or the activation."""


def calibrate(program: Program, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True) -> Program:
    """A copy of ``program`` whose static activation scales are those of ``batches``; the original stays as it was.

    Each batch is a mapping of the Program's inputs. The Program runs in eval mode, without gradients, and with its
    activations in float; every ``uncalibrated`` node shows what it reads to its observer, and becomes a
    ``fake_quantize`` with the scale (and zero point) that the observer finds. Positions that are only padding are seen
    like all others: batches without padding give the ranges of real tokens alone. The last of the result's reports says
    which range each activation has. Raises :class:`CalibrationError` if there is nothing to calibrate, no batch, or a
    batch with inputs, or activations, that can't be used.
    """
    result, report = program.copy(), Report("calibrate")
    marked = result.graph.find_nodes(op="call_function", target=ops.uncalibrated)
    if not marked:
        raise CalibrationError(
            "nothing to calibrate: quantize-activations{dynamic=false,granularity=tensor} comes first"
        )
    observers = {node: calibrator(str(node.kwargs["observer"])) for node in marked}
    result.eval()
    watch = _Watch(result, observers)
    count = 0
    for batch in tqdm(batches, "calibrating", unit="batch", disable=not progress, total=_length(batches)):
        if not isinstance(batch, Mapping):
            raise CalibrationError(f"batch {count} is a {type(batch).__name__}, not a mapping of inputs by name")
        try:
            flat = result.bind((), batch)
        except TypeError as error:
            raise CalibrationError(f"batch {count}: {error}") from error
        with torch.no_grad():
            watch.run(*flat)
        count += 1
    if not count:
        raise CalibrationError("there is no batch to calibrate with")
    for node, seen in observers.items():
        format = WeightFormat.parse(str(node.kwargs["format"]))
        try:
            scale, zero_point = seen.scale(format)
            low, high = seen.range(format)
        except PrequantError as error:
            raise CalibrationError(f"{node.kwargs['name']}: {error}") from error
        name, how = str(node.kwargs["name"]), f"{format}, {node.kwargs['observer']}"
        set_static(result, node, scale, zero_point)
        report.rewrite(name, how, low=low, high=high, scale=float(scale))
    report.totals.update(batches=count, calibrated=len(observers))
    result.recompile()
    result.train(program.training)
    result.reports = (*program.reports, report)
    return result


class _Watch(fx.Interpreter):
    """Runs the graph and shows each observer the input of its node, which passes through as it is."""

    def __init__(self, program: Program, observers: Mapping[fx.Node, Calibrator]) -> None:
        super().__init__(program)
        self.observers = observers
        self.extra_traceback = False  # a complaint says which activation it is; torch would add lines on the node

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.observers:
            return super().run_node(n)
        (value,), _ = self.fetch_args_kwargs_from_env(n)
        try:
            self.observers[n].observe(value)
        except PrequantError as error:
            raise CalibrationError(f"{n.kwargs['name']}: {error}") from error
        return value


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None


@define_property("calibrated")
def _calibrated(program: Program) -> str | None:
    """Every static activation scale is known."""
    for node in program.graph.find_nodes(op="call_function", target=ops.uncalibrated):
        return f"%{node.name} has no scale yet: calibrate {node.kwargs['name']}"
    return None
