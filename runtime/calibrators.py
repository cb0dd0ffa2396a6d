"""Calibrators: what range of an activation its static scale should cover, found from batches of it.

A calibrator (observer) is fed tensors and keeps a fixed amount of memory however many there are. ``scale(format)``
turns what it saw into the ``[1, 1]`` scale (and zero point, if the format is asymmetric) of a per-tensor format. The
text form may carry one number: ``"moving-average:0.99"``, ``"percentile:99.9"``.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import FormatError, PrequantError
from .formats import Granularity, Scheme, WeightFormat
from .histogram import Histogram
from .strategies import ScaleAndZeroPoint, _covering

SEARCH_BINS = 2048
"""Resolution of the entropy search."""
EMPTY = 1e-4
"""What an empty bin counts in a divergence (the smoothing of MXNet's and ONNX Runtime's calibrators)."""


class Calibrator(ABC):
    """Sees the values of one activation, batch by batch, and says which range ``(low, high)`` to represent."""

    seen: int = 0
    """How many values were observed."""

    def observe(self, values: Tensor) -> None:
        """Take in a batch of any shape. Raises :class:`PrequantError` if it holds NaN or infinity."""
        values = values.detach()
        if values.numel() == 0:
            return
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            raise PrequantError(f"{int((~finite).sum())} of {values.numel()} values are NaN or infinite")
        self.seen += values.numel()
        self._observe(values.float())

    def range(self, format: WeightFormat) -> tuple[float, float]:
        """Lowest and highest value to represent. Raises :class:`PrequantError` if nothing was observed."""
        if not self.seen:
            raise PrequantError("no values were observed, so there is no range")
        return self._range(format)

    def scale(self, format: WeightFormat) -> ScaleAndZeroPoint:
        """Scale and zero point (None if symmetric), ``[1, 1]`` float32, whose levels cover the range."""
        check_static(format)
        low, high = (torch.full((1, 1), end) for end in self.range(format))
        return _covering(low, high, format)

    @abstractmethod
    def _observe(self, values: Tensor) -> None:
        """Take in finite float32 values, at least one."""

    @abstractmethod
    def _range(self, format: WeightFormat) -> tuple[float, float]:
        """The range, once something was seen."""


def check_static(format: WeightFormat) -> None:
    """Raise :class:`FormatError` unless activations can have a static scale in ``format``."""
    if format.scheme is not Scheme.AFFINE or format.granularity is not Granularity.TENSOR:
        raise FormatError(f"static activation scales are affine and per tensor, such as 'affine8:tensor', not {format}")


class MinMax(Calibrator):
    """The range of everything seen: nothing is clipped."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    def _observe(self, values: Tensor) -> None:
        low, high = values.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def _range(self, format: WeightFormat) -> tuple[float, float]:
        return self.low, self.high


class MovingAverage(Calibrator):
    """Exponential moving average of each batch's range, ``momentum * old + (1 - momentum) * new``.

    It starts at the first batch's. The default momentum is that of DeepSpeed's compression library.
    """

    def __init__(self, momentum: float = 0.95) -> None:
        if not 0 <= momentum < 1:
            raise PrequantError(f"moving-average: momentum {momentum} is outside [0, 1)")
        self.momentum = momentum
        self.low = self.high = 0.0
        self.started = False

    def _observe(self, values: Tensor) -> None:
        low, high = (float(end) for end in values.aminmax())
        kept = self.momentum if self.started else 0.0
        self.low, self.high = kept * self.low + (1 - kept) * low, kept * self.high + (1 - kept) * high
        self.started = True

    def _range(self, format: WeightFormat) -> tuple[float, float]:
        return self.low, self.high


class Percentile(Calibrator):
    """The range that holds ``percent`` % of the values (of their magnitudes, if symmetric), to a bin of a histogram."""

    def __init__(self, percent: float = 99.99) -> None:
        if not 50 < percent <= 100:
            raise PrequantError(f"percentile: {percent} is outside (50, 100]")
        self.percent = percent
        self.histogram = Histogram()

    def _observe(self, values: Tensor) -> None:
        self.histogram.add(values)

    def _range(self, format: WeightFormat) -> tuple[float, float]:
        total = self.histogram.total
        rank = max(1, round(self.percent / 100 * total))
        if format.symmetric:
            extent = self.histogram.magnitudes().kth(rank)
            return -extent, extent
        return self.histogram.kth(total - rank + 1), self.histogram.kth(rank)


class Entropy(Calibrator):
    """The range whose levels lose the least information: the least Kullback-Leibler divergence of what is represented.

    For symmetric formats this is TensorRT's calibrator (Migacz, "8-bit inference with TensorRT", 2017): over the
    histogram of magnitudes, with ``2 ** (bits - 1)`` levels. Asymmetric formats try the ranges
    ``[max(lowest, -t), min(highest, t)]`` with all ``2 ** bits`` levels. The bin that holds 0 counts as much as its
    neighbour: exact zeros (ReLU, padding) need no level's width.
    """

    def __init__(self) -> None:
        self.histogram = Histogram()

    def _observe(self, values: Tensor) -> None:
        self.histogram.add(values)

    def _range(self, format: WeightFormat) -> tuple[float, float]:
        seen = self.histogram.magnitudes() if format.symmetric else self.histogram
        seen = seen.coarsened(SEARCH_BINS)
        extent = max(abs(seen.low), abs(seen.high))
        levels = 2 ** (format.bits - 1) if format.symmetric else 2**format.bits
        counts, zero = seen.counts.numpy().astype(np.float64), -seen.first
        if counts[zero] and zero + 1 < counts.size:
            counts[zero] = counts[zero + 1]
        first_bin, last_bin = seen.ends()
        low_bins, high_bins = -first_bin, last_bin + 1
        best, threshold = math.inf, extent
        # From the widest range down, so that of equal divergences the one that clips less wins.
        for bins in range(max(low_bins, high_bins), 0, -1):
            first, last = zero - min(bins, low_bins), zero + min(bins, high_bins)
            if last - first < levels:
                break
            found = _divergence(counts, first, last, levels)
            if found < best:
                best, threshold = found, min(bins * seen.width, extent)
        if format.symmetric:
            return -threshold, threshold
        return max(seen.low, -threshold), min(seen.high, threshold)


class LearnedStep(Calibrator):
    """Where learned step size quantization (LSQ, arXiv 1902.08153) starts, from all values seen: for scales that train.

    The scale is ``2 * mean(|x|) / sqrt(Q)`` with ``Q = 2 ** (bits - 1) - 1``. Asymmetric formats have levels that start
    at the minimum, and ``4 * mean(x - minimum) / sqrt(Q)`` with ``Q = 2 ** bits - 1`` (BinaryBERT, arXiv 2012.15701);
    the minimum counts as 0 if it lies above, and the scale is no smaller than it takes to reach 0. At 8 bits the range
    ends far beyond most values, at 2 bits among them: training is to move it.
    """

    def __init__(self) -> None:
        self.sum = self.magnitudes = 0.0
        self.low = math.inf

    def _observe(self, values: Tensor) -> None:
        self.sum += float(values.sum(dtype=torch.float64))
        self.magnitudes += float(values.abs().sum(dtype=torch.float64))
        self.low = min(self.low, float(values.min()))

    def _range(self, format: WeightFormat) -> tuple[float, float]:
        if format.symmetric:
            reach = 2 * self.magnitudes / self.seen * math.sqrt(2 ** (format.bits - 1) - 1)
            return -reach, reach
        low = min(self.low, 0.0)
        return low, low + 4 * (self.sum / self.seen - low) * math.sqrt(format.levels - 1)


def _divergence(counts: npt.NDArray[np.float64], first: int, last: int, levels: int) -> float:
    """``KL(P || Q)`` if ``levels`` levels represent the bins ``[first, last)`` and the others are clipped to its ends.

    P is the clipped histogram; Q gives each level's count in equal parts to the bins of the level that are not empty.
    """
    inside = counts[first:last]
    if not inside.any():
        return math.inf
    occupied = inside > 0
    level = np.arange(inside.size) * levels // inside.size
    share = np.bincount(level, inside, levels) / np.maximum(np.bincount(level, occupied, levels), 1)
    quantized = np.where(occupied, share[level], 0.0)
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    # Without it, clipping into an empty bin would make every narrower range infinitely bad.
    p, q = (np.where(side > 0, side, EMPTY) for side in (clipped, quantized))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


_calibrators: dict[str, type[Calibrator]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "lsq": LearnedStep,
}


def calibrator(text: str) -> Calibrator:
    """A new calibrator, from ``"name"`` or ``"name:number"``. Raises :class:`PrequantError` if there is none."""
    name, _, number = text.partition(":")
    if name not in _calibrators:
        raise PrequantError(f"observer {name!r} is unknown; known are {list(calibrator_names())}")
    kind = _calibrators[name]
    if not number:
        return kind()
    if not inspect.signature(kind).parameters:
        raise PrequantError(f"observer {name!r} takes no number, got {text!r}")
    try:
        value = float(number)
    except ValueError:
        raise PrequantError(f"observer {text!r}: {number!r} is not a number") from None
    return kind(value)  # type: ignore[call-arg]


def calibrator_names() -> tuple[str, ...]:
    """Every calibrator."""
    return tuple(sorted(_calibrators))
