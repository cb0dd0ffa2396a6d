import itertools
import sys

import numpy as np
import pytest

from prequant.passes.knapsack import KnapsackError, cheapest, smallest


def by_hand(first: list[list[float]], second: list[list[float]], room: float) -> float:
    """The least sum of the first over all choices whose second sums up to at most the room."""
    sums = [
        sum(row[k] for row, k in zip(first, chosen, strict=True))
        for chosen in itertools.product(*(range(len(row)) for row in first))
        if sum(row[k] for row, k in zip(second, chosen, strict=True)) <= room
    ]
    return min(sums)


def total(rows: list[list[float]], chosen: list[int]) -> float:
    return sum(row[k] for row, k in zip(rows, chosen, strict=True))


def test_worked_by_hand() -> None:
    # Both narrow is 5 bytes and costs 13; the second item gains more for its 3 bytes than the first for its 2.
    costs, sizes = [[4.0, 1.0], [9.0, 2.0]], [[2, 4], [3, 6]]
    assert cheapest(costs, sizes, 5) == [0, 0]
    assert cheapest(costs, sizes, 7) == [1, 0]
    assert cheapest(costs, sizes, 8) == cheapest(costs, sizes, 9) == [0, 1]
    assert cheapest(costs, sizes, 10) == cheapest(costs, sizes, 10**9) == [1, 1]
    assert smallest(costs, sizes, 13) == [0, 0]
    assert smallest(costs, sizes, 12.9) == [1, 0]
    assert smallest(costs, sizes, 6) == [0, 1]
    assert smallest(costs, sizes, 3) == [1, 1]


@pytest.mark.parametrize("seed", range(8))
def test_against_every_choice_there_is(seed: int) -> None:
    random = np.random.default_rng(seed)
    items = int(random.integers(1, 6))
    counts = random.integers(1, 5, items)
    # As noise does over bits: from 1 down to a millionth. Sizes are those of a real matrix.
    costs = [sorted((10.0 ** random.uniform(-6, 0, count)).tolist(), reverse=True) for count in counts]
    sizes = [sorted(random.integers(1, 10**7, count).tolist()) for count in counts]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in {least, *random.integers(least, most + 1, 6).tolist(), most}:
        chosen = cheapest(costs, sizes, budget)
        assert total(sizes, chosen) <= budget
        assert total(costs, chosen) == pytest.approx(by_hand(costs, sizes, budget), rel=1e-9)
    best, worst = sum(map(min, costs)), sum(map(max, costs))
    for limit in (best, *random.uniform(best, worst, 6).tolist(), worst):
        chosen = smallest(costs, sizes, limit)
        assert total(costs, chosen) <= limit * (1 + 1e-12)
        assert total(sizes, chosen) == by_hand(sizes, costs, limit * (1 + 1e-12))


def test_tiny_costs_are_told_apart() -> None:
    # Solvers stop at absolute differences, here far above all costs.
    costs = [[3e-12, 2e-12], [5e-12, 1e-12]]
    assert cheapest(costs, [[1, 2], [1, 2]], 3) == [0, 1]


def test_costs_of_nothing() -> None:
    assert cheapest([[0.0, 0.0], [1.0, 0.0]], [[1, 2], [1, 2]], 3) == [0, 1]
    assert smallest([[0.0, 0.0], [1.0, 0.0]], [[1, 2], [1, 2]], 0.0) == [0, 1]


def test_what_can_not_be() -> None:
    with pytest.raises(KnapsackError, match="a budget of 4 is below the least possible, 5"):
        cheapest([[4.0, 1.0], [9.0, 2.0]], [[2, 4], [3, 6]], 4)
    with pytest.raises(KnapsackError, match=r"a limit of 2\.9 is below the least possible, 3"):
        smallest([[4.0, 1.0], [9.0, 2.0]], [[2, 4], [3, 6]], 2.9)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(KnapsackError, match=r"needs scipy: pip install 'prequant\[allocate\]'"):
        cheapest([[1.0]], [[1]], 1)
