"""How far the results of a Program move: noise, relative to the results themselves, over any number of batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prequant.runtime import PrequantError

from .nesting import named_results
from .program import Program


class OutputNoise:
    """Energy of what is added to the results of a Program, over that of the results.

    Of several results each counts alike, however large it is: the ratio is the mean of theirs. Everything in a result
    counts, positions that are padding, too.
    """

    def __init__(self) -> None:
        self._signal: dict[str, float] = {}
        self._noise: dict[str, float] = {}

    def add(self, exact: dict[str, Tensor], close: dict[str, Tensor]) -> None:
        """Take a batch in: its results as they should be, and as they are (see :func:`float_results`).

        Raises :class:`PrequantError` where these are not the same results.
        """
        if {name: value.shape for name, value in exact.items()} != {name: value.shape for name, value in close.items()}:
            one, other = ({name: list(value.shape) for name, value in part.items()} for part in (exact, close))
            raise PrequantError(f"results can't be compared: they were {one} and are {other}")
        for name, value in exact.items():
            wide = value.double()
            self._signal[name] = self._signal.get(name, 0.0) + float(wide.square().sum())
            self._noise[name] = self._noise.get(name, 0.0) + float((wide - close[name].double()).square().sum())

    @property
    def ratio(self) -> float:
        """Noise over signal; infinite where a result that was 0 everywhere is not, or one is not finite."""
        ratios = [noise_ratio(self._signal[name], noise) for name, noise in self._noise.items()]
        return sum(ratios) / len(ratios)

    @property
    def sqnr(self) -> float:
        """The same in dB."""
        return decibels(self.ratio)


def noise_ratio(signal: float, noise: float) -> float:
    """``noise / signal``; 0 for no noise, infinite for noise without a signal, or noise that is no number."""
    if noise == 0:
        return 0.0
    return noise / signal if signal > 0 and math.isfinite(noise) else math.inf


def decibels(ratio: float) -> float:
    """A noise-to-signal ratio as SQNR: ``-10 log10(ratio)``."""
    if ratio == 0:
        return math.inf
    return -10 * math.log10(ratio) if ratio < math.inf else -math.inf


def ratio_of(decibel: float) -> float:
    """The inverse of :func:`decibels`."""
    return float(10 ** (-decibel / 10))


def float_results(program: Program, flat: Sequence[Any]) -> dict[str, Tensor]:
    """The results of floats by name, ``logits`` or ``hidden_states.3``. Raises :class:`PrequantError` for none."""
    named = ((name, flat[index]) for name, index in named_results(program.signature.outputs))
    found = {name: value for name, value in named if isinstance(value, Tensor) and torch.is_floating_point(value)}
    if not found:
        raise PrequantError("the Program returns no float tensor that noise could be measured on")
    return found
