"""What a pass is: a frozen dataclass whose fields are its options, that rewrites a Program in place and reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from prequant.runtime import PrequantError, ops

from .options import OptionError, fit, options_of
from .packed import packed_uses, packed_weight_name, scoped
from .program import Program
from .reports import Change, Kept, Report
from .scope import Pattern, Scope
from .sites import WeightSite, weight_sites
from .text import shown, to_text

__all__ = ["Change", "Kept", "Pass", "PassError", "Report", "WeightPass", "current_site"]

current_site: ContextVar[WeightSite | None] = ContextVar("current_site", default=None)
"""The weight that a pass is at, so that a failure can name it."""


class PassError(PrequantError):
    """A pass that can't do what it was asked.

    The pipeline adds which pass, with which options, and at which node or weight.
    """

    def __init__(self, message: str, *, node: str | WeightSite | fx.Node | None = None) -> None:
        super().__init__(message)
        self.node = node


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a Program. Subclasses are frozen dataclasses; ``name`` is the text form's head.

    ``requires`` names properties that must hold before, ``ensures`` those that hold after, ``breaks`` those of
    earlier passes that no longer do; a property is the name of a check in :mod:`prequant.passes.properties`. A pass
    never writes into a tensor: it replaces it, because the Program that it works on shares its tensors with the one
    that the pipeline was given.

    ``str(pass_)`` is the text form and raises :class:`PassTextError` where an option is a function.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()
    breaks: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check the options against their types, and bring them into these: a list into a tuple, ``"row"`` into its
        enum.

        A subclass that checks more calls this first. Raises :class:`OptionError`.
        """
        for option in options_of(type(self)):
            try:
                value = fit(getattr(self, option.name), option.type)
            except OptionError as error:
                raise OptionError(f"option {option.name!r} of pass {self.name!r}: {error}") from error
            object.__setattr__(self, option.name, value)

    @abstractmethod
    def run(self, program: Program) -> Report:
        """Rewrite ``program`` in place."""

    def report(self) -> Report:
        """An empty report of this pass."""
        return Report(shown(self))

    def __str__(self) -> str:
        return to_text(self)

    def __call__(self, program: Program) -> Program:
        """Run this pass alone, on a copy that shares the tensors it does not rewrite."""
        from .pipeline import Pipeline

        return Pipeline((self,))(program)


@dataclass(frozen=True)
class WeightPass(Pass):
    """A pass over weight sites, with a scope (see :mod:`prequant.passes.scope`)."""

    include: tuple[Pattern, ...] = field(default=(), kw_only=True)
    """Only the weights that one of these patterns matches (a glob over names, or ``type:Class``); all if empty."""
    exclude: tuple[Pattern, ...] = field(default=(), kw_only=True)
    """Not the weights that one of these patterns matches."""

    def sites(self, program: Program, report: Report) -> Iterator[WeightSite]:
        """The sites in scope; the others go into the report."""
        inside, outside = Scope(self.include, self.exclude).split(weight_sites(program))
        for site in outside:
            report.keep(site, "out of scope")
        for site in inside:
            current_site.set(site)
            yield site
        current_site.set(None)

    def packed_linear_nodes(self, program: Program, report: Report) -> list[tuple[str, fx.Node]]:
        """The ``packed_linear`` nodes in scope, each with the name of its weight; the others go into the report."""
        uses = [use for use in packed_uses(program.graph) if use.node.target is ops.packed_linear]
        candidates = [scoped(program, packed_weight_name(use), (use.node,)) for use in uses]
        inside, outside = Scope(self.include, self.exclude).split(candidates)
        for site in outside:
            report.keep(site, "out of scope")
        return [(site.name, site.consumers[0]) for site in inside]
