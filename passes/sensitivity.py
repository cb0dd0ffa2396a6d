"""What each weight costs at each width: noise that quantizing it alone adds, relative to the signal.

All of them are added up over the weights, as if each one's noise were independent of the others' and the model linear
in it: true to first order, and the better the wider the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .example_batches import ExampleBatches
from .output_noise import OutputNoise, float_results, noise_ratio
from .program import Program
from .sites import WeightSite
from .substitution import Change, Substitution

Sensitivity: TypeAlias = Literal["weight", "fisher", "output"]
Costs: TypeAlias = "list[list[float]]"
"""Noise-to-signal ratios, by weight and width."""

PROBES = 8
"""Random directions in the space of results, for each batch, that gradients are taken along."""


@dataclass(frozen=True)
class Candidate:
    """One weight at one width: the site in a Program in which it is quantized."""

    bits: int
    site: WeightSite

    @property
    def bytes(self) -> int:
        """What its tensors take on disk: codes, scales, zero points, and outliers if it has them."""
        tensors = map(self.site.program.tensor, self.site.tensors.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Candidates: TypeAlias = "Sequence[Sequence[Candidate]]"
"""By weight and width."""


def weight_noise(sites: Sequence[WeightSite], candidates: Candidates) -> Costs:
    """Of the weight itself, ``|W - Q(W)|^2 / |W|^2``: no data needed.

    For an input without a preferred direction that is the noise-to-signal ratio of what the linear gives. It takes
    every linear and embedding for equally important.
    """

    def ratio(exact: Tensor, close: Tensor) -> float:
        exact = exact.detach().double()
        return noise_ratio(float(exact.square().sum()), float((exact - close.double()).square_().sum()))

    return [
        [ratio(site.value(), candidate.site.value()) for candidate in of_site]
        for site, of_site in zip(sites, candidates, strict=True)
    ]


def output_noise(program: Program, batches: ExampleBatches, candidates: Candidates, progress: bool = True) -> Costs:
    """Of the Program's results, measured with this one weight quantized: half a run or so of every batch for each
    candidate.
    """
    run, flat = Substitution(program), [candidate for of_site in candidates for candidate in of_site]
    noise = [OutputNoise() for _ in flat]
    changes = [_change([candidate]) for candidate in flat]
    total = len(flat) * len(batches)
    with torch.no_grad(), tqdm(total=total, desc="measuring", unit="run", disable=not progress) as bar:
        for inputs in batches.bound(program):
            exact = float_results(program, run.results(inputs))
            for number, results in run.each(inputs, changes):
                noise[number].add(exact, float_results(program, results))
                bar.update()
    found = iter(noise)
    return [[next(found).ratio for _ in of_site] for of_site in candidates]


def whole_noise(program: Program, batches: ExampleBatches, chosen: Sequence[Candidate]) -> float:
    """Of the Program's results, with all ``chosen`` together in the place of their weights."""
    run, noise = Substitution(program), OutputNoise()
    with torch.no_grad():
        for inputs in batches.bound(program):
            exact = float_results(program, run.results(inputs))
            noise.add(exact, float_results(program, run.results(inputs, _change(chosen))))
    return noise.ratio


def fisher_noise(
    program: Program,
    batches: ExampleBatches,
    sites: Sequence[WeightSite],
    candidates: Candidates,
    progress: bool = True,
) -> Costs:
    """Of the Program's results to second order in the weight: ``sum_w F_w (w - q(w))^2``.

    ``F`` is the diagonal of the Fisher information of a Gaussian around the results, of the variance of the results'
    mean square: ``F_w = E[(d (v . y) / d w)^2]`` with a standard normal ``v`` for every result. The expectation is over
    :data:`PROBES` draws for each batch, always the same ones. It takes a backward pass for each of them, however many
    weights and widths there are.
    """
    run = Substitution(program)
    signal: dict[str, float] = {}
    with torch.no_grad():
        for inputs in batches.bound(program):
            for name, value in float_results(program, run.results(inputs)).items():
                signal[name] = signal.get(name, 0.0) + float(value.double().square().sum())
    weights = {site.name: site.value().detach().float().clone().requires_grad_() for site in sites}
    dtypes = {site.name: site.value().dtype for site in sites}
    information = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(0)
    bar = tqdm(batches.bound(program), "gradients", len(batches), unit="batch", disable=not progress)
    for inputs in bar:
        with torch.enable_grad():
            cast = {name: partial(weight.to, dtypes[name]) for name, weight in weights.items()}
            results = float_results(program, run.results(inputs, Change(weights=cast)))
        moved = {name: value for name, value in results.items() if value.requires_grad and signal[name] > 0}
        for probe in range(PROBES if moved else 0):
            directions = [
                torch.randn(value.shape, generator=generator).to(value) / (signal[name] * len(signal)) ** 0.5
                for name, value in moved.items()
            ]
            gradients = torch.autograd.grad(
                *(list(moved.values()), list(weights.values()), directions),
                retain_graph=probe < PROBES - 1,
                allow_unused=True,
            )
            for total, gradient in zip(information.values(), gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient, gradient, value=1 / PROBES)

    def noise(site: WeightSite, candidate: Candidate) -> float:
        change = site.value().detach().float() - candidate.site.value().float()
        return float((change.square_() * information[site.name]).sum(dtype=torch.float64))

    return [[noise(site, candidate) for candidate in of_site] for site, of_site in zip(sites, candidates, strict=True)]


def _change(candidates: Sequence[Candidate]) -> Change:
    return Change(weights={each.site.name: each.site.value for each in candidates})
