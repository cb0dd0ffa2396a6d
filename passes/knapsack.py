"""One choice for each item: the least cost within a budget, or the least size within a limit of cost.

A multiple-choice knapsack, as an integer program: ``x[i, k]`` in {0, 1} says that item ``i`` takes its choice ``k``,
and there is one for each item. HAWQ-V3 (Yao et al., arXiv 2011.10680) chooses bit widths so. HiGHS, by way of
``scipy.optimize.milp``, solves it to the optimum.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from prequant.runtime import PrequantError

EXTRA = "prequant[allocate]"
TRIES = 8
"""How often a limit is drawn closer to keep a sum of costs within it, to the last bit."""


class KnapsackError(PrequantError):
    """No solver is installed, or it gave no answer."""


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Which choice each item takes so that the costs sum up to the least, and the sizes to at most ``budget``.

    ``costs`` and ``sizes``: of every choice of every item; costs are finite and not negative. Raises
    :class:`KnapsackError` where the smallest sizes are more than the budget.
    """
    least = sum(map(min, sizes))
    if least > budget:
        raise KnapsackError(f"a budget of {budget:,} is below the least possible, {least:,}")
    scale = _scale(costs)
    objective, room = [[cost / scale for cost in of_item] for of_item in costs], budget
    while True:
        chosen = _solved(objective, sizes, room)
        size = _total(sizes, chosen)
        if size <= budget:
            return chosen
        # The solver calls a sum within a budget that is above it by its tolerance.
        room -= size - budget


def smallest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], limit: float) -> list[int]:
    """Which choice each item takes so that the sizes sum up to the least, and the costs to at most ``limit``.

    Raises :class:`KnapsackError` where the least costs are more than the limit.
    """
    least = sum(map(min, costs))
    if least > limit:
        raise KnapsackError(f"a limit of {limit:g} is below the least possible, {least:g}")
    cheap = [int(np.argmin(of_item)) for of_item in costs]
    # In units of the limit; where that is 0, a cost is 0 or above it.
    rows = [[cost / limit if limit > 0 else 2.0 * (cost > 0) for cost in of_item] for of_item in costs]
    room = 1.0
    for _ in range(TRIES):
        if sum(map(min, rows)) > room:
            break
        chosen = _solved(sizes, rows, room)
        total = _total(rows, chosen)
        if total <= 1.0:
            return chosen
        room -= 2 * (total - 1.0)
    return cheap


def _scale(costs: Sequence[Sequence[float]]) -> float:
    """What brings the sum of the least costs to 1: solvers stop at absolute differences of 1e-6."""
    least = sum(map(min, costs))
    positive = [cost for of_item in costs for cost in of_item if cost > 0]
    return least if least > 0 else min(positive, default=1.0)


def _total(values: Sequence[Sequence[Any]], chosen: Sequence[int]) -> Any:
    return sum(of_item[choice] for of_item, choice in zip(values, chosen, strict=True))


def _solved(objective: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], room: float) -> list[int]:
    """The choices with the least sum of ``objective`` among those whose ``weights`` sum up to at most ``room``."""
    optimize = solver()
    counts = [len(of_item) for of_item in objective]
    starts = np.cumsum([0, *counts])
    one_each = np.zeros((len(counts), starts[-1]))
    for item, (start, count) in enumerate(zip(starts, counts, strict=False)):
        one_each[item, start : start + count] = 1
    flat_weights = np.concatenate([np.asarray(of_item, float) for of_item in weights])
    found = optimize.milp(
        np.concatenate([np.asarray(of_item, float) for of_item in objective]),
        integrality=np.ones(starts[-1]),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(flat_weights[None], -np.inf, room),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise KnapsackError(f"the solver gave no answer: {found.message}")
    return [int(np.argmax(found.x[start : start + count])) for start, count in zip(starts, counts, strict=False)]


def solver() -> Any:
    """``scipy.optimize``. Raises :class:`KnapsackError` where it is not installed."""
    try:
        return importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise KnapsackError(f"choosing bits needs scipy: pip install '{EXTRA}' ({error})") from error
