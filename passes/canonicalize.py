"""Canonicalize: the graph in the one form that other passes expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Pass, Report
from .functional import make_functional
from .linear_forms import make_linear
from .noops import bind_constants, remove_assertions, remove_dead_code, remove_noops
from .program import Program


@dataclass(frozen=True)
class Canonicalize(Pass):
    """addmm(bias, view(x), w), matmul(x, t(w)), ...  ->  linear(x, w, bias), and nothing left that computes nothing.

    Every product with a stored weight becomes a ``linear`` with a weight ``[out, in]``; one that was stored the other
    way round (GPT-2's Conv1D) is transposed once and listed in ``info.transposed``, unless it is read elsewhere as it
    was. Ops that write into an intermediate value become functional, and every dropout ``aten.dropout``, which train
    and eval mode switch. Assertions, casts and views that change nothing, numbers that are always the same, and dead
    code go.
    """

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[tuple[str, ...]] = ("canonical", "no-orphans", "valid-signature")

    def run(self, program: Program) -> Report:
        """Bring the graph into that form."""
        report = self.report()
        before = len(program.graph.nodes)
        remove_assertions(program, report)
        make_functional(program, report)
        bind_constants(program, report)
        remove_noops(program, report)
        make_linear(program, report)
        remove_dead_code(program, report)
        report.totals = {"nodes before": before, "nodes after": len(program.graph.nodes)}
        return report
