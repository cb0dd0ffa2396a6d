"""The hook that everything which watches a pipeline hangs on: called before and after each pass, and when one fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..text import shown

if TYPE_CHECKING:
    from ..base import Pass, Report
    from ..program import Program


@dataclass(frozen=True)
class Step:
    """Where a pipeline is: its ``index``-th pass (from 0) of ``total``."""

    pass_: Pass
    index: int
    total: int

    def __str__(self) -> str:
        return f"{self.index + 1} of {self.total}, {shown(self.pass_)}"


class Observer:
    """Watches a pipeline; a subclass overrides what it needs.

    A pass rewrites ``program`` in place, so an observer that wants the state before to compare with keeps
    ``program.copy()``, which shares the tensors and is cheap. Observers of one pipeline nest: the first given is
    called first before a pass, and last after it.
    """

    innermost: ClassVar[bool] = False
    """Whether this observer measures the pass itself, and so is called directly around it."""

    def before(self, step: Step, program: Program) -> None:
        """Called before a pass with the Program that it is going to rewrite."""

    def after(self, step: Step, program: Program, report: Report) -> None:
        """Called after a pass with the Program that it rewrote, and its report."""

    def failed(self, step: Step, program: Program, error: BaseException) -> None:
        """Called instead of :meth:`after` where the pass failed; the Program may be half rewritten."""
