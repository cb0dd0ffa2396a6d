"""What a module's teacher gives for every batch: the aim of its student."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .calibration import CalibrationSet
from .modules import Module, Results, Values

LARGE = 8
"""Times the bytes that they are computed of: results of such a size are not kept."""


class Targets:
    """The teacher's results by batch, each made once, from the values that the teacher before gave.

    They are kept, but for those of the ``last`` module where they are much larger than its inputs, as logits over a
    vocabulary are: only the inputs stay, and the teacher runs again whenever the results are asked for.
    """

    def __init__(self, module: Module, calibration: CalibrationSet, last: bool) -> None:
        self._module, self._calibration, self._last = module, calibration, last
        self._kept: dict[int, Results] = {}
        self._given: dict[int, Values] = {}

    def add(self, batch: int, values: Values) -> Values:
        """Make the results for a batch, for which the teacher before gave ``values``; what they hand on is returned:
        nothing from the ``last`` one.
        """
        inputs = {**self._calibration[batch], **values}
        results = self._module.targets(inputs)
        read = [inputs[name] for name in self._module.inputs if name in inputs]
        if self._last and _bytes(results.compared) > LARGE * _bytes(read):
            self._given[batch] = values
        else:
            self._kept[batch] = results
        return {} if self._last else results.handed_on

    def __getitem__(self, batch: int) -> Results:
        """The results for a batch that was added."""
        if batch in self._kept:
            return self._kept[batch]
        return self._module.targets({**self._calibration[batch], **self._given[batch]})


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
