"""Scales that follow their latent weights: chosen anew from the weights as these train, instead of trained themselves.

XTC (arXiv 2206.01859) does so: a binary weight's scale is the mean magnitude that its latent weight has now, a ternary
one's scale and threshold are those of ternary weight networks. Weights only change in an optimizer's step, so it is
enough to choose scales after each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prequant.runtime import Quantizer, WeightFormat

from .base import PassError
from .program import Program
from .weights import WeightView, weights

SCALES = ("scale", "zero_point")
"""Parts of a latent weight; a ternary one's second is its threshold."""


@dataclass(frozen=True)
class LatentScales:
    """The latent weights of a Program; :meth:`renew` has their scales follow. ``strategy`` chooses the scales of
    uniform levels, as in ``quantize-weights``.
    """

    program: Program
    views: tuple[WeightView, ...]
    strategy: str = "minmax"

    @torch.no_grad()
    def renew(self) -> None:
        """Choose every scale (and threshold) for its latent weight as that is now, in place."""
        for view in self.views:
            quantizer = Quantizer(WeightFormat.parse(view.format), self.strategy)
            scales = quantizer.scales(self.program.tensor(view.tensors["latent"]))
            for part, value in zip(SCALES, scales, strict=True):
                if value is not None:
                    self.program.tensor(view.tensors[part]).copy_(value)


def following(program: Program, strategy: str = "minmax") -> LatentScales:
    """All latent weights of a Program. Raises :class:`PassError` if there is none, or a scale trains."""
    views = tuple(view for view in weights(program) if "latent" in view.tensors)
    if not views:
        raise PassError("no weight is latent: quantize-weights{latent=true} comes first")
    for view in views:
        if any(program.tensor(view.tensors[part]).requires_grad for part in SCALES if part in view.tensors):
            raise PassError(f"the scale of {view.name} trains: it can't follow its weight as well; freeze it")
    return LatentScales(program, views, strategy)
