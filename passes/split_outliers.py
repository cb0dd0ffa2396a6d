"""SplitOutliers: the few extreme weights of a matrix become a sparse float matrix of their own."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from prequant.runtime import ops
from prequant.runtime.metrics import all_finite

from .base import PassError, Report, WeightPass
from .options import DTYPES
from .program import Program


@dataclass(frozen=True)
class SplitOutliers(WeightPass):
    """linear(x, w, b)  ->  linear(x, add_outliers(dense, values, columns, row_offsets), b), likewise for embeddings.

    Outliers are chosen on the float weight, per matrix, by standardised magnitude ``|w - mean| / deviation``
    (PreQuant's density test on a Gaussian is the same order). Their positions are fixed from then on. ``dense`` is the
    very tensor that was there: a later quantizer looks at it with the outliers clipped (:attr:`WeightSite.bulk`), so
    that they do not widen its range.

    In ``delta`` mode ``values`` are added to the dense weight; they are 0 at first, and take up what a quantizer then
    changes under them, so that outliers stay what they were (weight decay pulls towards the quantized value). In
    ``replace`` mode ``values``, the outliers themselves, stand in the place of the dense ones. Which of the two the
    paper (arXiv 2306.00014) trains is not known. Columns take 16 bits each where the weight has at most 65,536.
    """

    name: ClassVar[str] = "split-outliers"
    ensures: ClassVar[tuple[str, ...]] = ("valid-formats",)

    ratio: float | None = None
    """Share of each matrix that becomes outliers, between 0 and 1, rounded to a whole number of them."""
    threshold: float | None = None
    """Instead of a ratio: what lies more than so many standard deviations from the mean."""
    mode: Literal["delta", "replace"] = "delta"
    """Whether the values are added to the dense weight, or replace it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """How the values are stored."""
    choice: Literal["largest", "random"] = "largest"
    """Which weights they are: the extreme ones, or as many of any size (what the paper compares itself with)."""
    seed: int = 0
    """Of the random choice, which is the same for a weight wherever it stands."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` for none or both of ratio and threshold, and for one that is out of range."""
        super().__post_init__()
        if (self.ratio is None) == (self.threshold is None):
            given = f"ratio={self.ratio}, threshold={self.threshold}"
            raise PassError(f"split-outliers: give either ratio or threshold, not {given}")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise PassError(f"split-outliers: ratio={self.ratio} is not between 0 and 1")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise PassError(f"split-outliers: threshold={self.threshold} is not a positive number of deviations")
        if self.choice == "random" and self.ratio is None:
            raise PassError("split-outliers: choice=random takes a ratio, not a threshold")

    def run(self, program: Program) -> Report:
        """Split every dense weight in scope."""
        report = self.report()
        split = total = 0
        for site in self.sites(program, report):
            if not site.is_dense:
                report.keep(site, f"already {site.format}: outliers are chosen on the float weight")
                continue
            if site.outliers is not None:
                report.keep(site, "its outliers are split already")
                continue
            weight = site.dense.detach()
            if weight.dim() != 2 or not all_finite(weight):
                report.keep(site, "not a matrix of finite numbers")
                continue
            total += weight.numel()
            chosen = self._drawn(weight, site.name) if self.choice == "random" else self._choose(weight.float())
            if not chosen.numel():
                report.keep(site, "no outliers")
                continue
            split += chosen.numel()
            site.replace(ops.add_outliers, self._operands(weight, chosen), replace=self.mode == "replace")
            report.rewrite(site, self.mode, outliers=chosen.numel(), share=chosen.numel() / weight.numel())
        report.totals.update(outliers=split, weights=total)
        return report

    def _choose(self, weight: Tensor) -> Tensor:
        """Flat positions of the outliers in ascending order."""
        magnitude = (weight - weight.mean()).abs_().flatten()
        if self.ratio is None:
            assert self.threshold is not None
            # Where all weights are equal, what is left of them is the rounding of their mean.
            limit = math.inf if weight.amin() == weight.amax() else self.threshold * float(weight.std(correction=0))
            return (magnitude > limit).nonzero().flatten()
        count = round(self.ratio * weight.numel())
        if not count:
            return magnitude.new_empty(0, dtype=torch.int64)
        # numpy's selection works in one copy of the magnitudes; torch.topk sorts pairs, four times as large.
        cut = float(np.partition(magnitude.cpu().numpy(), weight.numel() - count)[weight.numel() - count])
        above = (magnitude > cut).nonzero().flatten()
        ties = (magnitude == cut).nonzero().flatten()[: count - above.numel()]
        return torch.cat([above, ties]).sort().values

    def _drawn(self, weight: Tensor, name: str) -> Tensor:
        """As many flat positions of any weights, in ascending order."""
        assert self.ratio is not None
        # A generator on the CPU looks at 32 bits of its seed.
        random = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        drawn = torch.randperm(weight.numel(), generator=random)[: round(self.ratio * weight.numel())]
        return drawn.sort().values.to(weight.device)

    def _operands(self, weight: Tensor, chosen: Tensor) -> dict[str, Tensor | None]:
        rows, columns = weight.shape
        values = weight.flatten()[chosen].float()
        if self.mode == "delta":
            values.zero_()
        stored = values.to(DTYPES[self.dtype])
        if not all_finite(stored):
            raise PassError(f"an outlier of {float(values.abs().max()):.4g} does not fit into {self.dtype}")
        counts = torch.bincount(chosen // columns, minlength=rows)
        return {
            "dense": weight,
            "values": stored,
            "columns": (chosen % columns).to(torch.uint16 if columns <= 1 << 16 else torch.int32),
            "row_offsets": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
        }
