"""Timing calls that take turns, so that whatever else the machine does in the meantime slows them all."""

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Call = Callable[[], object]

BLOCK_SECONDS, LONGEST_BLOCK = 1e-3, 50
"""About how long one timed block of consecutive calls takes, and the most calls in it."""

LONG_CALL_SECONDS = 0.02
"""Calls so long need none before them that wakes their threads."""


@dataclass(frozen=True)
class Times:
    """Seconds a call: the median of the repeats, and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


def take_turns(rotations: Sequence[Sequence[Call]], repeats: int, warmup: int, pause: float) -> list[Times]:
    """Time each of ``rotations``: calls that do the same on different copies of a weight, one after the other.

    A turn is a pause of ``pause`` seconds, in which the idle threads of the one before stop spinning, a few calls that
    wake its own and don't count, and a block of calls that is timed as a whole. A rotation goes on in its next turn
    where it stopped. Every copy is called once first, then ``warmup`` turns that don't count, then ``repeats``.
    """
    for call in itertools.chain.from_iterable(rotations):
        call()
    lengths = [_lengths(calls) for calls in rotations]
    cycles = [itertools.cycle(calls) for calls in rotations]
    seconds: list[list[float]] = [[] for _ in rotations]
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + repeats):
            for (lead, length), cycle, found in zip(lengths, cycles, seconds, strict=True):
                time.sleep(pause)
                for call in itertools.islice(cycle, lead):
                    call()
                block = list(itertools.islice(cycle, length))
                started = time.perf_counter()
                for call in block:
                    call()
                ended = time.perf_counter()
                if turn >= warmup:
                    found.append((ended - started) / length)
    finally:
        gc.enable()
    return [Times(*(float(np.percentile(found, percent)) for percent in (50, 10, 90))) for found in seconds]


def _lengths(calls: Sequence[Call]) -> tuple[int, int]:
    """How many calls a turn makes before its block, and in it."""
    few = calls[:5]
    started = time.perf_counter()
    for call in few:
        call()
    each = (time.perf_counter() - started) / len(few)
    length = max(1, min(LONGEST_BLOCK, int(BLOCK_SECONDS / each)))
    return 0 if each > LONG_CALL_SECONDS else -(-length // 4), length
