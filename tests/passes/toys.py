"""Passes for tests: one that does what a test says, and a few that go wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from prequant.passes import Pass, Program, Report, WeightPass


@dataclass(frozen=True)
class Do(Pass):
    """Calls ``what`` on the Program."""

    name: ClassVar[str] = "do"

    what: Callable[[Program], Any]

    def run(self, program: Program) -> Report:
        self.what(program)
        return self.report()


@dataclass(frozen=True)
class Nothing(Pass):
    """Changes nothing."""

    name: ClassVar[str] = "nothing"

    count: int = 0

    def run(self, program: Program) -> Report:
        return self.report()


@dataclass(frozen=True)
class FailAt(WeightPass):
    """Fails at the weight of that name, having rewritten those before it."""

    name: ClassVar[str] = "fail-at"

    weight: str = "second.weight"

    def run(self, program: Program) -> Report:
        report = self.report()
        for site in self.sites(program, report):
            if site.name == self.weight:
                raise RuntimeError("out of luck")
            program.set_tensor(site.name, site.dense.detach() * 2)
            report.rewrite(site, "doubled")
        return report
