"""AllocateBits: weights become codes, of a width for each weight that is chosen under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tqdm.auto import tqdm

from prequant.runtime import Granularity, sqnr

from .base import PassError, Report, WeightPass
from .example_batches import ExampleBatches
from .knapsack import cheapest, smallest, solver
from .output_noise import decibels, ratio_of
from .program import Program
from .quantize_weights import QuantizeWeights
from .sensitivity import (
    Candidate,
    Candidates,
    Costs,
    Sensitivity,
    fisher_noise,
    output_noise,
    weight_noise,
    whole_noise,
)
from .sites import WeightSite, weight_sites

CLOSER = 0.7
"""By how much the limit of predicted noise is lowered, at least, where what was chosen misses the target."""


@dataclass(frozen=True)
class AllocateBits(WeightPass):
    """linear(x, w, b)  ->  linear(x, dequantize(codes, scale, zero_point), b), each weight of a width of its own: the
    choice with the least noise within a budget of bytes, or with the fewest bytes that give an SQNR.

    Every weight is quantized at every width, as :class:`QuantizeWeights` does it, and its cost at each is the
    noise-to-signal ratio that it adds, taken for additive over the weights (see :mod:`prequant.passes.sensitivity`).
    The choice is then a knapsack, solved to the optimum (:mod:`prequant.passes.knapsack`); that takes scipy, which the
    extra ``allocate`` brings. Weights that share a matrix have one width; what is already codes is left alone.

    The report has the figures behind each choice: ``alone``, the SQNR if this weight alone were quantized, as the
    sensitivity predicts it, and what the next wider codes would gain, and the next narrower cost, of the predicted SQNR
    of the whole.
    """

    name: ClassVar[str] = "allocate-bits"
    ensures: ClassVar[tuple[str, ...]] = ("valid-formats",)

    budget_bytes: int | None = None
    """Bytes that the weights in scope may take as stored: codes, scales, zero points, outliers."""
    mean_bits: float | None = None
    """The same budget as bits per weight, scales and all: 4-bit codes in groups of 64 take 4.5."""
    target_sqnr: float | None = None
    """Instead of a budget: the SQNR of the results in dB, with batches a measured one, else the predicted one."""
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    """Bits to choose among."""
    granularity: Granularity = Granularity.ROW
    """What shares a scale: the matrix, a row (output channel, or token of an embedding), or a group within a row."""
    group_size: int = 0
    """Weights along ``in_features`` in a group; the last one of a row may be shorter."""
    symmetric: bool = True
    """Whether 0 lies in the middle of the levels."""
    strategy: str = "mse"
    """How the scale is chosen: minmax, percentile:99.9, mse, sigma:3, hqq or lsq."""
    sensitivity: Sensitivity | None = None
    """What a width costs: the noise of the weight, or that of the results, by gradients (fisher) or measured (output).
    The last two take batches; none stands for output with batches, and for weight without."""
    batches: ExampleBatches | None = None
    """Batches of inputs to measure with; they have no text form."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` or :class:`FormatError` for options that are out of range or don't go together."""
        super().__post_init__()
        goals = {name: getattr(self, name) for name in ("budget_bytes", "mean_bits", "target_sqnr")}
        given = [f"{name}={value}" for name, value in goals.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise PassError(f"allocate-bits: give one of {', '.join(goals)}; there is {found}")
        for name, value in goals.items():
            if value is not None and not (0 < value < math.inf):
                raise PassError(f"allocate-bits: {name}={value} is not a positive number")
        if not self.widths or len(set(self.widths)) < len(self.widths) or min(self.widths) < 2:
            raise PassError(
                f"allocate-bits: widths={list(self.widths)}: expected different numbers of bits, from 2 to 8"
            )
        object.__setattr__(self, "widths", tuple(sorted(self.widths)))
        for bits in self.widths:
            self._at(bits)

    def _at(self, bits: int) -> QuantizeWeights:
        """The pass that does it at one width."""
        return QuantizeWeights(
            bits=bits,
            granularity=self.granularity,
            group_size=self.group_size,
            symmetric=self.symmetric,
            strategy=self.strategy,
        )

    @property
    def measure(self) -> Sensitivity:
        """The sensitivity that the choice goes by."""
        return self.sensitivity or ("weight" if self.batches is None else "output")

    def run(self, program: Program) -> Report:
        """Choose, and quantize every dense weight in scope.

        Raises :class:`PassError` for a sensitivity that takes batches where there are none, a budget below the least
        possible, and a target that the widest codes miss.
        """
        if self.batches is None and self.measure != "weight":
            raise PassError(f"sensitivity={self.measure} takes example batches, and there are none")
        solver()
        report, sites = self.report(), []
        for site in self.sites(program, report):
            if reason := self._at(self.widths[0]).refuses(site):
                report.keep(site, reason)
            else:
                sites.append(site)
        if not sites:
            return report
        candidates = self._candidates(program, sites)
        costs = self._costs(program, sites, candidates)
        sizes = [[each.bytes for each in of_site] for of_site in candidates]
        weights = sum(site.shape[0] * site.shape[1] for site in sites)
        if self.target_sqnr is not None:
            chosen = self._within_target(program, candidates, costs, sizes)
        else:
            chosen = self._within_budget(costs, sizes, weights)
        picked = [of_site[choice] for of_site, choice in zip(candidates, chosen, strict=True)]
        self._summarize(report, program, picked, costs, sizes, weights)
        total = sum(of_site[choice] for of_site, choice in zip(costs, chosen, strict=True))
        for site, candidate, of_site, of_size, choice in zip(sites, picked, costs, sizes, chosen, strict=True):
            pass_ = self._at(candidate.bits)
            operands, before = pass_.operands(site), site.value()
            site = pass_.rewritten(site, operands)
            report.rewrite(
                site,
                site.format,
                bits=candidate.bits,
                bytes=of_size[choice],
                sqnr=sqnr(before, site.value()),
                **_reasons(of_site, choice, total),
            )
        return report

    # ---- what there is to choose from

    def _candidates(self, program: Program, sites: Sequence[WeightSite]) -> Candidates:
        """Every weight at every width, in a copy of the Program for each width."""
        found: list[list[Candidate]] = [[] for _ in sites]
        with tqdm(total=len(sites) * len(self.widths), desc="quantizing", unit="weight") as bar:
            for bits in self.widths:
                pass_, copied = self._at(bits), {site.name: site for site in weight_sites(program.copy())}
                for site, of_site in zip(sites, found, strict=True):
                    coded = pass_.rewritten(copied[site.name], pass_.operands(site))
                    of_site.append(Candidate(bits, coded))
                    bar.update()
        return found

    def _costs(self, program: Program, sites: Sequence[WeightSite], candidates: Candidates) -> Costs:
        if self.measure == "weight" or self.batches is None:
            costs = weight_noise(sites, candidates)
        elif self.measure == "output":
            costs = output_noise(program, self.batches, candidates)
        else:
            costs = fisher_noise(program, self.batches, sites, candidates)
        for site, of_site in zip(sites, costs, strict=True):
            if not all(map(math.isfinite, of_site)):
                raise PassError("its noise has no finite ratio to the signal: is that 0 everywhere?", node=site)
        return costs

    # ---- choosing

    def _within_budget(self, costs: Costs, sizes: Sequence[Sequence[int]], weights: int) -> list[int]:
        budget, least = self._budget(weights), sum(map(min, sizes))
        if budget < least:
            if self.mean_bits is None:
                what, low = f"budget_bytes={budget:,}", f"{least:,} bytes"
            else:  # rounded up: the least possible, as it is written, is possible
                what, low = f"mean_bits={self.mean_bits:g}", f"{math.ceil(8e4 * least / weights) / 1e4:g} bits a weight"
            raise PassError(f"{what} is below the least possible: {low}, with {self.widths[0]}-bit codes everywhere")
        return cheapest(costs, sizes, budget)

    def _budget(self, weights: int) -> int:
        if self.budget_bytes is not None:
            return self.budget_bytes
        assert self.mean_bits is not None
        return math.floor(self.mean_bits * weights / 8)

    def _within_target(
        self, program: Program, candidates: Candidates, costs: Costs, sizes: Sequence[Sequence[int]]
    ) -> list[int]:
        """The fewest bytes for the target: predicted, or with batches the fewest predicted to be within a limit that is
        drawn closer until the measured SQNR is the target's.
        """
        assert self.target_sqnr is not None
        limit, least = ratio_of(self.target_sqnr), sum(map(min, costs))
        if self.batches is None:
            if least > limit:
                raise PassError(self._missed(least))
            return smallest(costs, sizes, limit)
        aim = max(limit, least)
        while True:
            chosen = smallest(costs, sizes, aim)
            picked = [of_site[choice] for of_site, choice in zip(candidates, chosen, strict=True)]
            found = whole_noise(program, self.batches, picked)
            if found <= limit:
                return chosen
            if aim == least:
                raise PassError(self._missed(found))
            aim = max(aim * min(limit / found, CLOSER), least)

    def _missed(self, ratio: float) -> str:
        return (
            f"target_sqnr={self.target_sqnr:g} can't be reached: the least noise of any choice leaves "
            f"{decibels(ratio):.2f} dB, with codes of up to {self.widths[-1]} bits"
        )

    # ---- reporting

    def _summarize(
        self,
        report: Report,
        program: Program,
        picked: Sequence[Candidate],
        costs: Costs,
        sizes: Sequence[Sequence[int]],
        weights: int,
    ) -> None:
        places = [self.widths.index(candidate.bits) for candidate in picked]
        size = sum(of_site[place] for of_site, place in zip(sizes, places, strict=True))
        predicted = sum(of_site[place] for of_site, place in zip(costs, places, strict=True))
        report.totals.update(sensitivity=self.measure, bytes=size, mean_bits=8 * size / weights)
        room = size if self.target_sqnr is not None else self._budget(weights)
        if self.target_sqnr is None:
            report.totals["budget"] = room
        report.totals["predicted_sqnr"] = decibels(predicted)
        if self.batches is not None:
            report.totals["measured_sqnr"] = decibels(whole_noise(program, self.batches, picked))
        uniform = [n for n in range(len(self.widths)) if sum(of_site[n] for of_site in sizes) <= room]
        if uniform:
            report.totals["uniform_bits"] = self.widths[uniform[-1]]
            report.totals["uniform_predicted_sqnr"] = decibels(sum(of_site[uniform[-1]] for of_site in costs))


def _reasons(costs: Sequence[float], choice: int, total: float) -> dict[str, float]:
    """What speaks for a width, in dB: the SQNR of this weight's share of the noise, and what the widths beside it would
    change of the whole.
    """
    found = {"alone": decibels(costs[choice])}
    for name, other in (("wider", choice + 1), ("narrower", choice - 1)):
        if 0 <= other < len(costs):
            changed = max(total - costs[choice] + costs[other], 0.0)
            found[name] = decibels(changed) - decibels(total) if total > 0 else 0.0
    return found
