"""HideOutputs: a Program returns what its model returns, and no more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .base import Pass, Report
from .nesting import leaves, nest
from .noops import remove_dead_code
from .program import Program


@dataclass(frozen=True)
class HideOutputs(Pass):
    """Values that expose-outputs added are no results any more, and what computed them alone is removed.

    For the end of a distillation: the student is lowered and saved without what only its training looked at. Passes
    that fuse nodes find again what an exposed value between these kept apart.
    """

    name: ClassVar[str] = "hide-outputs"
    ensures: ClassVar[tuple[str, ...]] = ("valid-signature",)

    def run(self, program: Program) -> Report:
        """Hide every exposed value."""
        report = self.report()
        hidden = hide(program)
        for name in hidden:
            report.rewrite(name, "hidden")
        if hidden:
            remove_dead_code(program, report)
        else:
            report.keep("outputs", "no value is exposed")
        report.totals.update(hidden=len(hidden))
        return report


def hide(program: Program) -> tuple[str, ...]:
    """Take the exposed values out of the results; their nodes stay. Returns their names."""
    signature, output = program.signature, program.graph.output_node()
    flat: Any = output.args[0]
    dropped = set(signature.exposed.values()) - set(leaves(signature.outputs))
    kept = [index for index in range(len(flat)) if index not in dropped]
    numbers = [kept.index(index) if index in kept else -1 for index in range(len(flat))]
    output.args = (tuple(flat[index] for index in kept),)
    program.update_info(signature=replace(signature, outputs=nest(signature.outputs, numbers), exposed={}))
    return tuple(signature.exposed)
