"""Where to cut a chain of blocks so that the largest part is as small as it can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

Cost = Callable[[int, int], float]
"""What a part from one border to another costs, by their numbers."""


def best_cuts(blocks: Sequence[int], parts: int, cost: Cost) -> tuple[int, ...]:
    """Numbers of the borders at which to cut into ``parts`` parts that hold a block each at least.

    ``blocks`` says how many blocks are before each border, in order; the first border is the start and the last the
    end, neither of them a cut. Exact: of all choices, one whose largest cost is the smallest. There has to be one.
    """
    cost = cache(cost)
    end = len(blocks) - 1

    @cache
    def best(parts: int, stop: int) -> tuple[float, tuple[int, ...]]:
        """The largest cost of what is before ``stop``, cut the best way, and the cuts."""
        if parts == 1:
            return cost(0, stop), ()
        found: list[tuple[float, tuple[int, ...]]] = []
        for start in reversed(range(1, stop)):
            if parts - 1 <= blocks[start] < blocks[stop]:
                largest, cuts = best(parts - 1, start)
                found.append((max(largest, cost(start, stop)), (*cuts, start)))
        return min(found, key=lambda each: each[0])

    return best(parts, end)[1]
