import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prequant.runtime.histogram import Histogram

# Magnitudes below 1e-20 would count as 0 beside 1e6: their quotient by the width is no normal float32.
values = st.floats(min_value=-1e6, max_value=1e6, width=32).filter(lambda value: value == 0 or abs(value) > 1e-20)


def counted(batches: list[torch.Tensor], bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for batch in batches:
        histogram.add(batch)
    return histogram


def direct(data: torch.Tensor, width: float, first: int, bins: int) -> list[int]:
    counts = [0] * bins
    for value in data.tolist():
        counts[math.floor(value / width) - first] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(values, min_size=1, max_size=20), min_size=1, max_size=6))
def test_a_stream_counts_like_all_its_values_at_once(batches: list[list[float]]) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    streamed, everything = counted(tensors), torch.cat(tensors)
    at_once = counted([everything])
    assert (streamed.width, streamed.first) == (at_once.width, at_once.first)
    assert streamed.counts.tolist() == direct(everything, streamed.width, streamed.first, 64)
    assert counted(tensors[::-1]).counts.tolist() == streamed.counts.tolist()


def test_the_bins_widen_no_more_than_they_must() -> None:
    histogram = counted([torch.tensor([0.0]), torch.tensor([-1.0, 3.0])])
    assert math.log2(histogram.width).is_integer()
    first, last = histogram.ends()
    assert last - first < 64
    narrower = histogram.width / 2
    assert math.floor(3.0 / narrower) - math.floor(-1.0 / narrower) >= 64


def test_memory_does_not_grow_with_the_stream() -> None:
    histogram = Histogram(64)
    for scale in (1e-3, 1.0, 1e3, 1e6):
        histogram.add(torch.randn(10_000) * scale)
    assert histogram.counts.numel() == 64
    assert histogram.total == 40_000


@pytest.mark.parametrize("rank", [1, 50, 500, 950, 1000])
def test_kth_is_exact_to_a_bin(rank: int) -> None:
    data = torch.randn(1000)
    histogram = counted(list(data.split(100)), bins=8192)
    exact = float(data.kthvalue(rank).values)
    assert abs(histogram.kth(rank) - exact) <= histogram.width
    assert histogram.low == float(data.min()) and histogram.high == float(data.max())


def test_magnitudes_fold_the_negative_side() -> None:
    data = torch.randn(1000)
    folded = counted([data], bins=256).magnitudes()
    assert folded.first == 0
    assert folded.counts.tolist() == direct(data.abs(), folded.width, 0, 256)


def test_coarsening_merges_neighbours() -> None:
    data = torch.randn(1000)
    fine = counted([data], bins=256)
    coarse = fine.coarsened(32)
    assert coarse.counts.numel() == 32 and coarse.width > fine.width
    assert coarse.counts.tolist() == direct(data, coarse.width, coarse.first, 32)
    assert fine.counts.numel() == 256 and fine.total == 1000
