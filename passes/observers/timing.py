"""Timing: seconds and memory of each pass."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import ClassVar

import psutil
from rich.table import Table
from rich.text import Text

from ..base import Report
from ..program import Program
from ..text import shown
from .base import Observer, Step

SAMPLING_SECONDS = 0.002
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class StepTime:
    """One pass: ``seconds`` it ran, and by how many bytes the process was at most larger than before it, and than at
    the start.
    """

    pass_: str
    seconds: float
    growth: int
    growth_since_start: int


class Timing(Observer):
    """Measures each pass: ``steps`` has the figures, :meth:`table` shows them.

    Memory is the resident size of the process, sampled every 2 ms by a thread: a shorter peak can be missed, memory
    that the process held already and uses again does not count, and a GPU's memory isn't in it. What observers take
    is left out of both figures, except for what they leave allocated.
    """

    innermost: ClassVar[bool] = True

    def __init__(self) -> None:
        self.steps: list[StepTime] = []
        self._start = 0
        self._sampler: _Sampler | None = None

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return sum(step.seconds for step in self.steps)

    @property
    def growth(self) -> int:
        """By how many bytes the process was at most larger during a pass than before the first."""
        return max((step.growth_since_start for step in self.steps), default=0)

    def before(self, step: Step, program: Program) -> None:
        """Start sampling."""
        self._sampler = _Sampler()
        if step.index == 0:
            self.steps, self._start = [], self._sampler.first
        self._sampler.start()

    def after(self, step: Step, program: Program, report: Report) -> None:
        """Stop sampling and note the figures."""
        assert self._sampler is not None
        peak = self._sampler.stop()
        first = self._sampler.first
        self.steps.append(StepTime(shown(step.pass_), report.seconds, max(0, peak - first), max(0, peak - self._start)))

    def failed(self, step: Step, program: Program, error: BaseException) -> None:
        """Stop sampling."""
        if self._sampler is not None:
            self._sampler.stop()

    def table(self) -> Table:
        """One row a pass, then the total."""
        table = Table(title="Time and memory")
        table.add_column("pass", overflow="fold")
        for heading in ("seconds", "peak growth (MiB)", "peak since start (MiB)"):
            table.add_column(heading, justify="right")
        for step in self.steps:
            table.add_row(
                Text(step.pass_), f"{step.seconds:.3f}", _mebibytes(step.growth), _mebibytes(step.growth_since_start)
            )
        table.add_section()
        table.add_row("total", f"{self.seconds:.3f}", "", _mebibytes(self.growth))
        return table


def _mebibytes(size: int) -> str:
    return f"{size / MEBIBYTE:.1f}"


class _Sampler:
    """The largest resident size of this process between :meth:`start` and :meth:`stop`, in bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="prequant-timing", daemon=True)
        self.first = self._peak = self._resident()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._peak = max(self._peak, self._resident())
        return self._peak

    def _sample(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self._peak = max(self._peak, self._resident())

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)
