"""How calls are timed: in their steady state, and in turns, so that whatever else the machine does slows them all.

A turn is a lead of calls that don't count and a block of calls that is timed as a whole. The lead matters: threads that
were asleep, cores that ran something else, and caches that others have filled since take a while to come
back. A program that computes has that behind it, and it is not what the contenders differ in.
"""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]

LONGEST_LEAD = 5
"""A lead goes on until every copy was called once, but for at most so many times its seconds."""


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median of the repeats, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        return cls(*(float(np.percentile(seconds, percent)) for percent in (50, 10, 90)))


class Rotation:
    """Calls that do the same on different copies of a weight, one after the other: a turn goes on where the one before
    has stopped. ``lead`` and ``block`` are seconds."""

    def __init__(self, calls: Sequence[Call], lead: float, block: float) -> None:
        self._cycle, self._copies = itertools.cycle(calls), len(calls)
        self._lead, self._block = lead, block

    def turn(self) -> float:
        """Seconds a call of the block, which has one call at least; a lead has, too."""
        gc.collect()
        gc.disable()
        try:
            each = self._warm_up()
            block = list(itertools.islice(self._cycle, max(1, round(self._block / each))))
            started = time.perf_counter()
            for call in block:
                call()
            return (time.perf_counter() - started) / len(block)
        finally:
            gc.enable()

    def _warm_up(self) -> float:
        """Call until threads, caches and clocks are in their steady state; seconds of the last call."""
        started = last = time.perf_counter()
        for count in itertools.count(1):
            next(self._cycle)()
            now = time.perf_counter()
            each, last = now - last, now
            missing = 0 if count >= self._copies else self._lead * LONGEST_LEAD
            if now - started >= max(self._lead, missing):
                return each
        raise AssertionError("unreachable")


class Passes:
    """Calls that do different things, such as batches of different lengths: a turn goes through all of them, as often
    as ``block`` seconds allow but once at least, after ``lead`` seconds of calls that don't count."""

    def __init__(self, calls: Sequence[Call], lead: float, block: float) -> None:
        self._calls, self._lead, self._block = calls, lead, block
        self._each = 0.0

    def turn(self) -> list[float]:
        """Seconds of each call of the block."""
        gc.collect()
        gc.disable()
        try:
            # A call that is longer than the lead gains nothing from one before it.
            if self._each < self._lead:
                self._repeat(self._lead)
            found = self._repeat(self._block)
            self._each = sum(found) / len(found)
            return found
        finally:
            gc.enable()

    def _repeat(self, seconds: float) -> list[float]:
        found: list[float] = []
        began = time.perf_counter()
        while not found or time.perf_counter() - began < seconds:
            for call in self._calls:
                started = time.perf_counter()
                call()
                found.append(time.perf_counter() - started)
        return found
