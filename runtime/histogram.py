"""A histogram of a stream in a fixed number of bins, exact whatever the order and the batches it came in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_WIDTH = 2.0**-120
"""Width of the bins until a value other than 0 comes."""


class Histogram:
    """Counts of values on a grid of bins ``[k * width, (k + 1) * width)``; ``first`` is the ``k`` of ``counts[0]``.

    The width is the smallest power of two at which ``bins`` bins reach from the lowest value to the highest, with 0.
    Widening merges neighbours exactly, because the grid is anchored at 0 and widths double: what was counted earlier
    stands where it would had the final width been known from the start.
    """

    def __init__(self, bins: int = 8192) -> None:
        self.bins = bins
        self.width = SMALLEST_WIDTH
        self.first = 0
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.low, self.high = math.inf, -math.inf

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def add(self, values: Tensor) -> None:
        """Count finite float32 values, at least one."""
        low, high = (float(end) for end in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(self.bins)
        # Dividing by a power of two is exact (short of underflow), so no value lands in its neighbour's bin.
        positions = torch.floor(values.flatten() / self.width).to(torch.int64) - self.first
        self.counts += torch.bincount(positions, minlength=self.bins).cpu()

    # ---- reading

    def ends(self) -> tuple[int, int]:
        """Bins that hold the lowest value or 0, and the highest value or 0; both belong to the range."""
        return _bin(min(self.low, 0.0), self.width), _bin(max(self.high, 0.0), self.width)

    def kth(self, rank: int) -> float:
        """The ``rank``-th smallest value (from 1), to a bin: linear within it, and never outside what was seen."""
        cumulative = self.counts.cumsum(0)
        position = int(torch.searchsorted(cumulative, rank))
        before = int(cumulative[position - 1]) if position else 0
        within = (rank - before) / int(self.counts[position])
        return min(max((self.first + position + within) * self.width, self.low), self.high)

    def magnitudes(self) -> Histogram:
        """The histogram of the values' magnitudes, on the same grid."""
        folded = Histogram(self.bins)
        folded.width = self.width
        folded.low, folded.high = 0.0, max(abs(self.low), abs(self.high))
        occupied = self.counts.nonzero().flatten()
        index = occupied + self.first
        folded.counts.index_add_(0, torch.where(index < 0, -1 - index, index), self.counts[occupied])
        return folded

    def coarsened(self, bins: int) -> Histogram:
        """The same in ``bins`` bins (fewer than now), by merging neighbours."""
        coarse = Histogram(self.bins)
        coarse.width, coarse.first, coarse.counts = self.width, self.first, self.counts
        coarse.low, coarse.high = self.low, self.high
        coarse._widen(bins)
        coarse.counts, coarse.bins = coarse.counts[:bins], bins
        return coarse

    def _widen(self, bins: int) -> None:
        """Double the width until the range fits into ``bins`` bins, and move the counts to where they belong then."""
        old_width, old_first = self.width, self.first
        first, last = self.ends()
        while last - first >= bins:
            self.width *= 2
            first, last = self.ends()
        if (self.width, first) == (old_width, old_first):
            return
        doublings = round(math.log2(self.width / old_width))
        occupied = self.counts.nonzero().flatten()
        # An arithmetic shift rounds down, as bins below 0 need it.
        moved = ((occupied + old_first) >> doublings) - first
        self.counts = torch.zeros_like(self.counts).index_add(0, moved, self.counts[occupied])
        self.first = first


def _bin(value: float, width: float) -> int:
    return math.floor(value / width)
