"""Plan: a lowered Program runs as one native call instead of node by node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Pass, Report
from ..packed import PACKED_OPS
from ..program import Program


@dataclass(frozen=True)
class Plan(Pass):
    """Calls of the Program go by a plan: native steps on planned memory, fused where they can be, run by one call.

    The graph stays as it is: it is what trains, what is saved and exported, and what runs on other devices, in train
    mode and where gradients are recorded. Results differ from the graph's by float32's rounding. Nodes that the native
    library does not compute stay calls of PyTorch within the plan, each in the report with the reason.
    """

    name: ClassVar[str] = "plan"

    def run(self, program: Program) -> Report:
        """Mark the Program and report what its plan covers."""
        report = self.report()
        program.planned = True
        runner = program.runner
        if runner is None or runner.obstacle:
            report.keep("graph", runner.obstacle if runner is not None else "not planned")
            return report
        coverage = runner.coverage
        for name, reason in coverage.torch:
            report.keep(name, reason)
        report.totals.update(native=len(coverage.native), torch=len(coverage.torch))
        return report


def is_lowered(program: Program) -> bool:
    """Whether anything in the graph computes on packed codes: what a plan is for."""
    return any(node.target in PACKED_OPS for node in program.graph.nodes)
