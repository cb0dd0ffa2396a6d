import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prequant.runtime.arena import placed
from prequant.runtime.memory import ALIGNMENT

lives = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda ends: (min(ends), max(ends)))
buffers = st.lists(st.tuples(st.integers(0, 500), lives), max_size=14)


def meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


@settings(deadline=None)
@given(buffers)
def test_what_lives_at_the_same_time_lies_apart(buffers: list[tuple[int, tuple[int, int]]]) -> None:
    sizes = np.array([size for size, _ in buffers], dtype=np.int64)
    offsets, total = placed(sizes, [life for _, life in buffers])
    assert not (offsets % ALIGNMENT).any()
    assert total == max((int(o + s) for o, s in zip(offsets, sizes, strict=True)), default=0)
    for i, (size, life) in enumerate(buffers):
        for j, (other_size, other_life) in enumerate(buffers[:i]):
            apart = offsets[i] + size <= offsets[j] or offsets[j] + other_size <= offsets[i]
            assert apart or not meet(life, other_life) or not (size and other_size)


@settings(deadline=None)
@given(buffers)
def test_memory_lies_between_the_fullest_step_and_all_buffers(buffers: list[tuple[int, tuple[int, int]]]) -> None:
    sizes = np.array([size for size, _ in buffers], dtype=np.int64)
    _, total = placed(sizes, [life for _, life in buffers])
    fullest = max((sum(size for size, life in buffers if meet(life, (at, at))) for at in range(13)), default=0)
    assert fullest <= total <= sum(-(-size // ALIGNMENT) * ALIGNMENT for size, _ in buffers)


def test_a_chain_takes_turns_in_the_memory_of_two() -> None:
    offsets, total = placed(np.full(6, 128, dtype=np.int64), [(i, i + 1) for i in range(6)])
    assert total == 256
    assert offsets.tolist() == [0, 128] * 3


def test_a_small_buffer_goes_into_the_gap_that_it_fits() -> None:
    # The large ones leave [64, 128) free while the small one lives.
    offsets, total = placed(np.array([300, 200, 64]), [(0, 3), (4, 9), (2, 5)])
    assert offsets.tolist() == [0, 0, 320]
    assert total == 384
