"""What the benchmark of a linear layer times: a class for each way to compute it, and prequant's own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from turns import Call  # type: ignore[import-not-found]

from prequant.runtime import ops, reference
from prequant.runtime.bcq import binary_code
from prequant.runtime.formats import Scheme, WeightFormat
from prequant.runtime.quantizer import QuantizedWeight, Quantizer

FEWEST_COPIES = 3
PROBES = 8
"""Rows of the input whose outputs are compared with those of the weight that the contender's codes stand for."""

GROUP = 64
"""Weights that share a scale, wherever there are groups."""


@dataclass(frozen=True)
class Layer:
    """A layer to compute: ``weight [N, K]`` and ``inputs [largest M, K]``, both float32; ``rotated`` is how many bytes
    of weights a contender goes through before it comes back to the first, and ``threads`` what it may use."""

    weight: Tensor
    inputs: Tensor
    rotated: int
    threads: int

    @classmethod
    def random(cls, rows: int, columns: int, tokens: int, rotated: int, threads: int) -> "Layer":
        """Normal weights whose scale differs between rows and between groups, so that mixing scales up shows."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns // GROUP, GROUP, generator=generator)
        weight *= torch.rand(rows, 1, 1, generator=generator) + 0.5
        weight *= torch.rand(rows, columns // GROUP, 1, generator=generator) + 0.5
        inputs = torch.randn(max(tokens, PROBES), columns, generator=generator)
        return cls(weight.view(rows, columns) / columns**0.5, inputs, rotated, threads)

    def copies(self, bytes: int) -> range:
        """One for each copy of a weight of so many bytes."""
        return range(max(FEWEST_COPIES, -(-self.rotated // bytes)))


class Contender(ABC):
    """One way to compute a linear layer without a bias.

    ``prepare`` packs the layer's weight into copies, then ``calls`` gives, for an input ``[M, K]``, a call for each of
    them. A contender that can't run here raises in ``prepare``, whatever its library raises.
    """

    library = "torch"
    bits: int
    """Of a weight's code."""
    arithmetic: str
    """The ceiling that it runs under: ``fp32``, ``bf16`` or ``int8``."""
    input_bytes = 4
    """Of one element of its input and of its output."""
    tolerance = 0.03
    """How far its output may be from that of the weight that its codes stand for, relative to its norm."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bytes = 0  # of one copy of the weight

    @abstractmethod
    def prepare(self, layer: Layer) -> None:
        """Pack ``layer.weight`` into ``layer.copies(...)`` copies, set ``bytes``, call ``expect``."""

    @abstractmethod
    def calls(self, input: Tensor) -> list[Call]:
        """A call for each copy, with all that is needed to compute ``[M, N]`` from ``input [M, K]``, float32."""

    def output(self, result: object) -> Tensor:
        """The output ``[M, N]`` of the first of the last calls, which returned ``result``."""
        assert isinstance(result, Tensor)
        return result

    def expect(self, layer: Layer, meant: Tensor) -> None:
        """Remember what to expect of codes that stand for the weight ``meant``."""
        self._probes = layer.inputs[:PROBES] @ meant.T
        self._loss = float((meant - layer.weight).norm() / layer.weight.norm())

    def check(self, output: Tensor, float_output: Tensor) -> float:
        """The error of an output ``[M, N]`` relative to the float layer's.

        Raises ``ValueError`` if it is larger than what rounding the weight explains, or if the first rows are not what
        the codes stand for.
        """
        if output.shape != float_output.shape:
            raise ValueError(f"its output is {list(output.shape)}, not {list(float_output.shape)}")
        output = output.float()
        error = _distance(output, float_output)
        probes = self._probes[: len(output)]
        off = _distance(output[: len(probes)], probes)
        # A few rows may be further off than the weight as a whole.
        if not off <= self.tolerance or not error <= 1.5 * self._loss + self.tolerance:
            raise ValueError(
                f"its output is {off:.3g} from that of its own weight (at most {self.tolerance} expected) and "
                f"{error:.3g} from the float one (its weight: {self._loss:.3g})"
            )
        return error


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Packed(Contender):
    """prequant's ``packed_linear`` in a weight format; ``activations`` is ``float32``, ``bfloat16``, or the format that
    inputs are quantized to on the fly."""

    library = "prequant"

    def __init__(self, format: str, activations: str) -> None:
        super().__init__(f"prequant {format}, {activations}")
        self.format = WeightFormat.parse(format)
        self.bits = self.format.bits
        self.activations = activations
        self.input_format, self.dtype = activations, torch.float32
        if activations in ("float32", "bfloat16"):
            self.input_format, self.dtype = "", getattr(torch, activations)
            self.tolerance = 0.001 if activations == "float32" else 0.02
        else:
            WeightFormat.parse(activations)
        self.input_bytes = self.dtype.itemsize
        self.arithmetic = "int8" if self.input_format else {"float32": "fp32", "bfloat16": "bf16"}[activations]

    def prepare(self, layer: Layer) -> None:
        """Quantize once, by the fastest rule: speed does not depend on the values."""
        self.columns = layer.weight.shape[1]
        quantized = self._quantize(layer.weight)
        tensors = [tensor for tensor in quantized if tensor is not None]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.expect(layer, reference.dequantize(*quantized, self.format, self.columns))
        # Clones of the codes: each has its own place in memory, and its own packing for the kernels.
        self.copies = [[t if t is None else t.clone() for t in quantized] for _ in layer.copies(self.bytes)]

    def _quantize(self, weight: Tensor) -> QuantizedWeight:
        if self.format.scheme is Scheme.BCQ:
            return binary_code(weight, self.format)
        return Quantizer(self.format, "minmax")(weight)

    def calls(self, input: Tensor) -> list[Call]:
        """Through the operator, as a graph calls it."""
        input = input.to(self.dtype)
        outliers, bias, input_scale = (None, None, None, False), None, (None, None)
        options = {"format": str(self.format), "columns": self.columns, "input_format": self.input_format}
        return [
            partial(ops.packed_linear, input, *copy, *outliers, bias, *input_scale, **options) for copy in self.copies
        ]
