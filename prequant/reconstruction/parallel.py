"""MREM-P (Bai et al., arXiv 2109.15082): all modules at once, each on a queue of what the one before it gave lately.

Every module trains on its own clock: it draws an entry of its queue, takes a step on it, and puts what it gave into the
queue of the next module, which drops its oldest entry for it. At first the entries are the teacher's values, so that no
module learns on the errors of untrained ones; then mixtures of these with the student's, whose share grows to all in a
line (annealed teacher forcing).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from tqdm.auto import tqdm

from prequant.measure import PeakMemory

from .calibration import CalibrationSet
from .learner import Learner, ModuleFigures
from .modules import Module, ReconstructionError, Values
from .targets import Targets

ORDERS = 1 << 20
"""What seeds of queues are apart from seeds of orders."""


@dataclass(frozen=True)
class Schedule:
    """``queue`` entries (the paper's t0) are made for each module before it trains. In ``forcing`` steps (T0) the
    teacher's share of what is handed on falls from 1 to 0; 0 hands on the student's values from the start.
    """

    queue: int = 100
    forcing: int = 0

    def __post_init__(self) -> None:
        """Raises :class:`ReconstructionError` for numbers out of range."""
        if self.queue < 1:
            raise ReconstructionError(f"queue={self.queue}: expected 1 entry or more")
        if self.forcing < 0:
            raise ReconstructionError(f"forcing={self.forcing}: expected a number of steps, or 0 for none")

    def share(self, step: int) -> float:
        """The teacher's share of what is handed on in a step, counted from 0."""
        return max(1 - step / self.forcing, 0.0) if self.forcing else 0.0


class Worker:
    """One module in the chain: its learner, its queue, and what its teacher gives for every batch."""

    def __init__(
        self, learner: Learner, calibration: CalibrationSet, targets: Targets, schedule: Schedule, seed: int
    ) -> None:
        self.learner, self.module = learner, learner.module
        self._calibration, self._targets, self._schedule = calibration, targets, schedule
        self._queue: deque[tuple[int, Values]] = deque(maxlen=schedule.queue)
        self._first = self.module.number == 0
        # The first module has no queue: what it reads is there.
        self._order: Iterator[int] = calibration.order(seed)
        self._draws = torch.Generator().manual_seed(seed + ORDERS + self.module.number)

    def receive(self, batch: int, values: Values) -> None:
        """Put what the module before gave for a batch into the queue."""
        self._queue.append((batch, values))

    def next_batch(self) -> int:
        """What the first module reads next."""
        return next(self._order)

    @torch.no_grad()
    def handed_on(self, batch: int, values: Values) -> Values:
        """What the module hands on for a batch without training on it."""
        targets, share = self._targets[batch], self._schedule.share(self.learner.done)
        if share == 1.0:
            return targets.handed_on
        return self.module.results({**self._calibration[batch], **values}).mixed(targets.handed_on, share)

    def turn(self) -> tuple[int, Values, float | None]:
        """One step: the batch, what is handed on for it, and the loss; None from a module that is finished, and only
        feeds the others.
        """
        batch, values = (self.next_batch(), {}) if self._first else self._drawn()
        if self.learner.finished:
            return batch, self.handed_on(batch, values), None
        targets, share = self._targets[batch], self._schedule.share(self.learner.done)
        results, loss = self.learner.step({**self._calibration[batch], **values}, targets)
        return batch, results.mixed(targets.handed_on, share), loss

    def _drawn(self) -> tuple[int, Values]:
        return self._queue[int(torch.randint(len(self._queue), (), generator=self._draws))]


def reconstruct_interleaved(
    modules: Sequence[Module],
    calibration: CalibrationSet,
    learner_of: Callable[[Module], Learner],
    schedule: Schedule,
    seed: int,
    progress: bool = True,
) -> list[ModuleFigures]:
    """Train the modules' students in place, in one process: a step of each in turn.

    The schedule is that of a process for each module, all as fast as each other. The same seed on one thread gives the
    same weights, bit for bit.
    """
    with PeakMemory() as memory:
        workers: list[Worker] = []
        given: list[Values] = [{} for _ in calibration]
        for module in modules:
            targets = Targets(module, calibration, module is modules[-1])
            given = [targets.add(batch, values) for batch, values in enumerate(given)]
            workers.append(Worker(learner_of(module), calibration, targets, schedule, seed))
        for _ in range(schedule.queue if len(workers) > 1 else 0):
            batch = workers[0].next_batch()
            values: Values = {}
            for worker, following in pairwise(workers):
                values = worker.handed_on(batch, values)
                following.receive(batch, values)
        steps = max(worker.learner.steps for worker in workers)
        bars = [
            tqdm(
                desc=f"module {number + 1} of {len(workers)}",
                total=steps,
                initial=worker.learner.done,
                unit="step",
                disable=not progress,
                position=number,
            )
            for number, worker in enumerate(workers)
        ]
        while not all(worker.learner.finished for worker in workers):
            for number, worker in enumerate(workers):
                batch, values, loss = worker.turn()
                bars[number].update(int(loss is not None))
                if loss is not None and not worker.learner.done % 10:
                    bars[number].set_postfix(loss=f"{loss:.3g}", refresh=False)
                if number + 1 < len(workers):
                    workers[number + 1].receive(batch, values)
        for bar in bars:
            bar.close()
    for worker in workers:
        worker.learner.peak_memory = memory.growth + sum(module.bytes for module in modules)
    return [worker.learner.figures() for worker in workers]
