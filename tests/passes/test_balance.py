"""Where a chain is cut so that its largest module is small, and what a module counts."""

import pytest

from prequant.passes import lower, partition
from prequant.passes.balance import best_cuts

from .chains import FOURS, blocks, canonical, tower


@pytest.mark.parametrize(
    ("modules", "cuts", "costs"),
    [
        (1, [], (120,)),
        (2, [2], (64, 56)),
        (3, [1, 3], (24, 56, 40)),
        (4, [1, 2, 4], (24, 40, 40, 16)),
        (5, [1, 2, 3, 4], (24, 40, 16, 24, 16)),
    ],
)
def test_the_largest_module_is_as_small_as_it_can_be(modules: int, cuts: list[int], costs: tuple[int, ...]) -> None:
    parts = partition(tower(), modules)
    assert (blocks(parts), parts.costs) == (cuts, costs)
    rows = partition(tower(), modules, balance="flops", sizes={"rows": 7})
    assert (blocks(rows), rows.costs) == (cuts, tuple(7 * cost for cost in costs))


def test_the_measured_costs_of_blocks_decide_where_they_are_given() -> None:
    parts = partition(tower(), 2, costs=[0.5, 0.1, 0.1, 0.1, 0.1])
    assert blocks(parts) == [1] and parts.costs == pytest.approx((0.5, 0.4))


def test_borders_without_a_block_between_them_are_not_both_cuts() -> None:
    assert best_cuts([0, 0, 1, 1, 2, 2], 2, lambda start, stop: stop - start) == (3,)


def test_multiply_adds_are_those_of_linears_and_attention() -> None:
    simulated = FOURS(canonical("bert-masked-lm"))
    block = 12 * (4 * 32 * 32 + 2 * 32 * 48) + 2 * 4 * 6 * 6 * (8 + 8)
    head = 12 * (32 * 32 + 32 * 97)
    for program in (simulated, lower(simulated)):
        parts = partition(program, 2, balance="flops", sizes={"batch": 2, "length": 6})
        assert parts.costs == (block, block + head)
