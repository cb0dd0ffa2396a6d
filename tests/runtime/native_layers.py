"""Random weights for the tests of kernels, and the instruction sets that this processor has."""

import copy

import torch
from torch import Tensor

from prequant.runtime import Outliers, Scheme, WeightFormat, native, ops, reference
from prequant.runtime.packing import pack

ISAS = native.ISAS[: native.ISAS.index(native.detected_isa()) + 1] if native.available() else ()
FORMATS = [
    *(f"affine{bits}:{rest}" for bits in range(2, 9) for rest in ("row", "group64:asym")),
    *("affine4:tensor", "affine4:row:asym", "affine4:group32", "affine4:group128", "affine8:group96"),
    *("ternary:row", "ternary:tensor:base3", "ternary:group32:base3", "binary:row", "binary:group64"),
    *(f"bcq{planes}:{rest}" for planes in (1, 2, 3, 4) for rest in ("row", "group64")),
]


class Layer:
    """A random weight with everything that goes with it."""

    def __init__(self, text: str, rows: int, columns: int, outliers: str = "", seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.format, self.columns = WeightFormat.parse(text), columns
        planes = (self.format.bits,) if self.format.scheme is Scheme.BCQ else ()
        levels = self.format.levels
        self.codes = pack(torch.randint(0, levels, (*planes, rows, columns), generator=random), self.format)
        self.scale = torch.rand(self.format.scale_shape(rows, columns), generator=random) * 0.02 + 0.001
        self.zero_point = None
        if not self.format.symmetric:
            self.zero_point = torch.rand(self.scale.shape, generator=random) * (levels - 1)
        self.bias = torch.randn(rows, generator=random)
        self.outliers = None
        if outliers:
            counts = torch.randint(0, 4, (rows,), generator=random).clamp(max=columns)
            places = [torch.randperm(columns, generator=random)[:count].sort().values for count in counts.tolist()]
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
            values = torch.randn(int(counts.sum()), generator=random)
            self.outliers = Outliers(values, torch.cat(places).to(torch.uint16), offsets, outliers == "replace")

    def to(self, device: torch.device) -> "Layer":
        """The same with its tensors on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        if self.outliers is not None:
            values, columns, offsets = (part.to(device) for part in self.outliers[:3])
            moved.outliers = Outliers(values, columns, offsets, self.outliers.replace)
        return moved

    def weight(self) -> Tensor:
        parts = (self.codes, self.scale, self.zero_point, self.outliers)
        return reference.packed_weight(*parts, self.format, self.columns).double()

    def magnitude(self) -> Tensor:
        """What is added up for each element of the weight: planes, and a zero point, may take away what codes bring."""
        if self.format.scheme is Scheme.BCQ:
            ones = torch.full_like(self.codes, 255)
            return (
                self.weight().abs() + reference.dequantize(ones, self.scale, None, self.format, self.columns).double()
            )
        if self.zero_point is None:
            return self.weight().abs()
        middle = torch.full_like(self.zero_point, self.format.levels / 2)
        lowest = reference.dequantize(torch.zeros_like(self.codes), self.scale, middle, self.format, self.columns)
        return self.weight().abs() + lowest.double().abs()

    def __call__(
        self,
        input: Tensor,
        input_format: str = "",
        *input_parts: Tensor,
        bias: bool = True,
        activation: str = "",
        residual: Tensor | None = None,
    ) -> Tensor:
        sparse = (None, None, None, False) if self.outliers is None else tuple(self.outliers)
        return ops.packed_linear(
            *(input, self.codes, self.scale, self.zero_point, *sparse, self.bias if bias else None),
            *(input_parts or (None, None)),
            residual,
            format=str(self.format),
            columns=self.columns,
            input_format=input_format,
            activation=activation,
        )
