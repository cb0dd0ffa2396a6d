"""Damage: how far the results move from those of the Program before the pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from prequant.runtime import PrequantError, sqnr

from ..base import Report
from ..nesting import named_results
from ..program import Program
from ..text import shown
from .base import Observer, Step


@dataclass(frozen=True)
class OutputDamage:
    """One result after one pass: ``sqnr`` in dB (``inf`` where nothing moved), ``error``: the largest absolute
    difference.
    """

    pass_: str
    output: str
    sqnr: float
    error: float


class Damage(Observer):
    """Runs the Program before the pipeline and after each pass on ``inputs``, one sample batch by input name, in eval
    mode.

    ``results`` has a row for each pass and each result of floats; :meth:`table` shows them. Every pass is measured
    against the Program that the pipeline was given, so the figures add up along the pipeline.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs = dict(inputs)
        self.results: list[OutputDamage] = []
        self._original: dict[str, Tensor] = {}

    def before(self, step: Step, program: Program) -> None:
        """Keep the results that all passes are measured against."""
        if step.index == 0:
            self.results = []
            self._original = self._outputs(program)
            if not self._original:
                raise PrequantError("the Program returns no float tensor that damage could be measured on")

    def after(self, step: Step, program: Program, report: Report) -> None:
        """Measure. Raises :class:`PrequantError` where a result is gone or has another shape."""
        outputs = self._outputs(program)
        for name, original in self._original.items():
            if name not in outputs or outputs[name].shape != original.shape:
                now = f"the shape {list(outputs[name].shape)}" if name in outputs else "gone"
                raise PrequantError(f"the result {name!r} had the shape {list(original.shape)} and is now {now}")
            error = float((outputs[name].double() - original.double()).abs().max()) if original.numel() else 0.0
            self.results.append(OutputDamage(shown(step.pass_), name, sqnr(original, outputs[name]), error))

    def table(self) -> Table:
        """One row for each pass and result."""
        table = Table(title="Damage, against the Program before the first pass")
        table.add_column("after pass", overflow="fold")
        table.add_column("result")
        table.add_column("SQNR (dB)", justify="right")
        table.add_column("max abs error", justify="right")
        for row in self.results:
            quality = "equal" if row.sqnr == math.inf else f"{row.sqnr:.2f}"
            table.add_row(Text(row.pass_), Text(row.output), quality, f"{row.error:.3g}")
        return table

    def _outputs(self, program: Program) -> dict[str, Tensor]:
        program = program.copy().train(False)  # a copy, because the mode is part of the graph
        with torch.no_grad():
            flat = program.forward(*program.bind((), self.inputs))
        named = ((name, flat[index]) for name, index in named_results(program.signature.outputs))
        return {name: value for name, value in named if isinstance(value, Tensor) and value.is_floating_point()}
