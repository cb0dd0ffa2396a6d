"""How a scale is chosen: one function per strategy, all on the same view of a weight.

A strategy sees ``weights`` ``[scales, n]`` float32 (each row shares one scale) and an affine :class:`WeightFormat`,
and returns ``(scale, zero_point)``, both ``[scales, 1]``, ``zero_point`` None for a symmetric format. The quantizer
brings the weights to a magnitude near 1 first and hands them over in pieces, so that squares neither overflow nor
vanish and temporaries stay in the cache. The text form of a strategy may carry one number: ``"sigma:2.5"``,
``"percentile:99.9"``.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import PrequantError
from .formats import WeightFormat

TILE = 30_000
"""Weights handled at once: few enough for a core's cache, and for torch (under 32768) not to wake other threads."""

ROUNDING = 1.5 * 2**23
"""Added to a float32 of small magnitude, it leaves no bits for a fraction: the sum is rounded, ties to even."""

ScaleAndZeroPoint = tuple[Tensor, Tensor | None]
Strategy = Callable[[Tensor, WeightFormat], ScaleAndZeroPoint]

_strategies: dict[str, Callable[..., ScaleAndZeroPoint]] = {}


def register_strategy(name: str) -> Callable[[Callable[..., ScaleAndZeroPoint]], Callable[..., ScaleAndZeroPoint]]:
    """Decorator: make a strategy known by name. Its one optional extra parameter is what ``"name:number"`` sets."""

    def register(function: Callable[..., ScaleAndZeroPoint]) -> Callable[..., ScaleAndZeroPoint]:
        if name in _strategies:
            raise PrequantError(f"strategy {name!r} is already registered")
        _strategies[name] = function
        return function

    return register


def strategy(text: str) -> Strategy:
    """The strategy that ``"name"`` or ``"name:number"`` stands for. Raises :class:`PrequantError` if there is none."""
    name, colon, number = text.partition(":")
    if name not in _strategies:
        near = difflib.get_close_matches(name, _strategies, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PrequantError(f"strategy {name!r} is unknown; {hint}known are {sorted(_strategies)}")
    function = _strategies[name]
    if not colon:
        return function
    options = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is not inspect.Parameter.empty
    ]
    if not options:
        raise PrequantError(f"strategy {name!r} takes no number, got {text!r}")
    try:
        return partial(function, **{options[0]: float(number)})
    except ValueError:
        raise PrequantError(f"strategy {text!r}: {number!r} is not a number") from None


def strategy_names() -> tuple[str, ...]:
    """Every registered strategy."""
    return tuple(sorted(_strategies))


# ---- building blocks -------------------------------------------------------------------------------------------------


def _positive_levels(format: WeightFormat) -> int:
    return 2 ** (format.bits - 1) - 1


def _covering(low: Tensor, high: Tensor, format: WeightFormat) -> ScaleAndZeroPoint:
    """Scale (1 where there is no range) and integer zero point of the levels that reach from ``low`` to ``high``."""
    if format.symmetric:
        return usable_scale(torch.maximum(low.abs(), high.abs()) / _positive_levels(format)), None
    low, high = low.clamp(max=0), high.clamp(min=0)  # 0 stays representable: padding and pruned weights are exact
    scale = usable_scale((high - low) / (format.levels - 1))
    return scale, torch.round(-low / scale).clamp(0, format.levels - 1)


def usable_scale(scale: Tensor) -> Tensor:
    """``scale`` with 1 in the place of what nothing can be divided by."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, 1.0, scale)


def _centred_codes(ratio: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    """Nearest level to ``ratio = weights / scale``, in units of the scale, 0 being the zero point."""
    offset = format.implied_zero_point if zero_point is None else zero_point
    codes = (ratio + offset).clamp_(0, format.levels - 1)
    return codes.add_(ROUNDING).sub_(ROUNDING).sub_(offset)  # torch.round wakes all threads from 2048 elements on


def _squared_error(weights: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    """What rounding costs each row, ``[scales, 1]``."""
    tiles = weights.split(max(1, TILE // weights.shape[0]), 1)
    offset = format.implied_zero_point if zero_point is None else zero_point
    low: Any = -offset
    high: Any = format.levels - 1 - offset

    error = torch.zeros_like(scale)
    for tile in tiles:
        ratio = tile / scale
        nearest = ratio.clamp(low, high).add_(ROUNDING).sub_(ROUNDING)
        error += torch.linalg.vector_norm(nearest.sub_(ratio), dim=1, keepdim=True).square_()
    return error * scale.square()


# ---- strategies ------------------------------------------------------------------------------------------------------


@register_strategy("minmax")
def minmax(weights: Tensor, format: WeightFormat) -> ScaleAndZeroPoint:
    """The range of the weights: nothing is clipped."""
    return _covering(weights.amin(1, keepdim=True), weights.amax(1, keepdim=True), format)


@register_strategy("percentile")
def percentile(weights: Tensor, format: WeightFormat, percent: float = 99.9) -> ScaleAndZeroPoint:
    """From the ``100 - percent``-th to the ``percent``-th percentile; symmetric: to the latter of the magnitudes."""
    if not 50 < percent <= 100:
        raise PrequantError(f"percentile {percent} is outside (50, 100]")
    count = weights.shape[1]
    rank = max(1, round(percent / 100 * count))
    if format.symmetric:
        extent = weights.abs().kthvalue(rank, dim=1, keepdim=True).values
        return _covering(-extent, extent, format)
    return _covering(
        weights.kthvalue(count - rank + 1, dim=1, keepdim=True).values,
        weights.kthvalue(rank, dim=1, keepdim=True).values,
        format,
    )


@register_strategy("sigma")
def sigma(weights: Tensor, format: WeightFormat, multiple: float = 3.0) -> ScaleAndZeroPoint:
    """PreQuant's data-free rule: clip at ``multiple`` standard deviations.

    The paper's "6 sigma" is read as the *width* of the range, so the half-width defaults to 3: on Gaussian weights at
    4 bits that costs a quarter of the squared error of a half-width of 6. Pass ``"sigma:6"`` for the other reading.
    """
    if not 0 < multiple < math.inf:
        raise PrequantError(f"sigma multiple {multiple} must be positive and finite")
    deviation, mean = torch.std_mean(weights, 1, correction=0, keepdim=True)
    reach = deviation * multiple
    if format.symmetric:
        # The rule is for weights around 0. Where not even their mean is in range (a constant row, say), go beyond it.
        reach = torch.where(mean.abs() > reach, mean.abs() + reach, reach)
        return _covering(-reach, reach, format)
    return _covering(mean - reach, mean + reach, format)


@register_strategy("mse")
def mse(weights: Tensor, format: WeightFormat) -> ScaleAndZeroPoint:
    """The range with the least squared error, by search: a geometric grid, then finer ones around the best."""
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    extent = torch.maximum(low.abs(), high.abs())
    least, best_low, best_high = torch.full_like(low, torch.inf), low, high

    def consider(low: Tensor, high: Tensor) -> None:
        nonlocal least, best_low, best_high
        error = _squared_error(weights, *_covering(low, high, format), format)
        better = error < least
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
        least = torch.where(better, error, least)

    # The widest useful range is a little over the data's: at 2 bits the outer level may lie beyond every weight.
    for factor in torch.logspace(-1.5, 0.1, 40).tolist():
        reach = extent * factor
        if format.symmetric:
            consider(-reach, reach)
        else:
            consider(low.clamp(min=-reach), high.clamp(max=reach))
    # Neighbours on that grid are 10 % apart. Asymmetric ends move one at a time, and one of them may belong at 0.
    for around, steps in ((0.1, 16), (0.01, 8)) if format.symmetric else ((1.0, 20), (0.1, 16), (0.01, 8)):
        factors = torch.linspace(1 - around, 1 + around, steps + 1).tolist()
        if format.symmetric:
            middle = best_high
            for factor in factors:
                consider(-middle * factor, middle * factor)
            continue
        middle = best_low
        for factor in factors:
            consider(middle * factor, best_high)
        middle = best_high
        for factor in factors:
            consider(best_low, middle * factor)
    return _covering(best_low, best_high, format)


@register_strategy("lsq")
def lsq(weights: Tensor, format: WeightFormat) -> ScaleAndZeroPoint:
    """Where learned step size quantization (LSQ, arXiv 1902.08153) starts: for weights and scales that will train.

    The scale is ``2 * mean(|w|) / sqrt(Q)`` with ``Q = 2 ** (bits - 1) - 1``. Asymmetric formats have levels that start
    at the minimum, and ``4 * mean(w - minimum) / sqrt(Q)`` with ``Q = 2 ** bits - 1`` (BinaryBERT, arXiv 2012.15701);
    the minimum counts as 0 if it lies above, and the scale is no smaller than it takes to reach 0. At 8 bits the levels
    end far beyond most weights, at 2 bits among them: training is to move them.
    """
    if format.symmetric:
        reach = 2 * math.sqrt(_positive_levels(format)) * weights.abs().mean(1, keepdim=True)
        return _covering(-reach, reach, format)
    low = weights.amin(1, keepdim=True).clamp(max=0)
    width = 4 * math.sqrt(format.levels - 1) * (weights.mean(1, keepdim=True) - low)
    return _covering(low, low + width, format)


@register_strategy("hqq")
def hqq(weights: Tensor, format: WeightFormat, norm: float = 0.7) -> ScaleAndZeroPoint:
    """Half-quadratic quantization (Badri and Shaji 2023): least ``|w - q(w)|^norm``, norm < 1: outliers weigh less.

    Alternates a shrinkage of the residual with a closed-form update: of the (real-valued) zero point for asymmetric
    formats, as published, and of the scale for symmetric ones, which have no zero point to move.
    """
    if not 0 < norm < 1:
        raise PrequantError(f"hqq norm {norm} is outside (0, 1)")
    scale, zero_point = minmax(weights, format)
    best_scale, best_zero_point = scale, zero_point
    beta, least, better = 10.0, torch.full_like(scale, torch.inf), torch.ones_like(scale, dtype=torch.bool)
    for _ in range(20):
        centred = _centred_codes(weights / scale, zero_point, format)
        residual = weights - centred * scale
        magnitude = residual.abs()
        error = magnitude.pow(norm).mean(1, keepdim=True)
        better &= error < least  # a row is done when a round does not improve it
        if not bool(better.any()):
            break
        least, best_scale = torch.where(better, error, least), torch.where(better, scale, best_scale)
        # Shrink the residual: what |.|^p calls an outlier is left out of the fit.
        shrunk = (magnitude - magnitude.clamp(min=1e-8).pow(norm - 1) / beta).clamp_(min=0).copysign_(residual)
        target = weights - shrunk
        if zero_point is None or best_zero_point is None:
            energy = centred.square().sum(1, keepdim=True)
            fitted = (target * centred).sum(1, keepdim=True) / energy
            scale = torch.where((energy > 0) & (fitted > 0), fitted, scale)
        else:
            best_zero_point = torch.where(better, zero_point, best_zero_point)
            zero_point = (centred + zero_point - target / scale).mean(1, keepdim=True)
        beta *= 1.01
    return best_scale, best_zero_point
