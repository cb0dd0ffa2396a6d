"""QuantizeWeights: float weights become frozen packed codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prequant.runtime import Granularity, Quantizer, WeightFormat, ops, sqnr

from .base import PassError, Report, WeightPass
from .program import Program
from .sites import WeightSite


@dataclass(frozen=True)
class QuantizeWeights(WeightPass):
    """linear(x, w, b)  ->  linear(x, dequantize(codes, scale, zero_point), b), and likewise for embeddings.

    Codes are packed and frozen; the scale is a float32 parameter, and so is the zero point of asymmetric formats.
    Outliers that are split already do not count when the scale is chosen, and keep their values. What is already codes,
    or a latent weight, is left alone.

    With ``latent``, linear(x, w, b)  ->  linear(x, fake_quantize(latent, scale, zero_point), b): the float weight stays
    and trains under quantization, with the same value as the codes until it does; ``freeze`` makes codes of it. The
    zero point of a ternary latent weight is the threshold under which a weight becomes 0.
    """

    name: ClassVar[str] = "quantize-weights"
    ensures: ClassVar[tuple[str, ...]] = ("valid-formats",)

    bits: int = 4
    """2 to 8 for uniform levels; 1 for binary weights, the mean magnitude times the sign."""
    granularity: Granularity = Granularity.ROW
    """What shares a scale: the matrix, a row (output channel, or token of an embedding), or a group within a row."""
    group_size: int = 0
    """Weights along ``in_features`` in a group; the last one of a row may be shorter."""
    symmetric: bool = True
    """Whether 0 lies in the middle of the levels; asymmetric formats are for 2 bits and more."""
    strategy: str = "mse"
    """How the scale of uniform levels is chosen: minmax, percentile:99.9, mse, sigma:3, hqq or lsq; others have one."""
    ternary: bool = False
    """Three levels instead of uniform ones, with ``bits=2``."""
    base3: bool = False
    """Store ternary codes five to a byte, 1.6 bits each."""
    latent: bool = False
    """Keep the float weight, to train it under quantization."""
    clipped: bool = True
    """No gradient to latent weights beyond the outer levels (affine formats; ternary and binary ones always get it)."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` or :class:`FormatError` for options that are out of range or don't go together."""
        super().__post_init__()
        if self.ternary and self.bits != 2:
            raise PassError(f"ternary weights go with bits=2, not bits={self.bits}")
        if not self.symmetric and (self.ternary or self.bits == 1):
            raise PassError(f"{'ternary' if self.ternary else 'binary'} weights are symmetric: leave symmetric=True")
        if self.base3 and not self.ternary:
            raise PassError("base3 is a storage of ternary codes: it goes with ternary=True")
        if not self.clipped and not self.latent:
            raise PassError("clipped=False is about the gradient of latent weights: it goes with latent=True")
        Quantizer(self.format(), self.strategy)

    def format(self) -> WeightFormat:
        """The format that the options describe."""
        if self.ternary:
            return WeightFormat.ternary(self.granularity, self.group_size, self.base3)
        if self.bits == 1:
            return WeightFormat.binary(self.granularity, self.group_size)
        return WeightFormat.affine(self.bits, self.granularity, self.group_size, self.symmetric)

    def run(self, program: Program) -> Report:
        """Quantize every dense weight in scope."""
        report = self.report()
        for site in self.sites(program, report):
            if reason := self.refuses(site):
                report.keep(site, reason)
                continue
            # The scales are found before a second copy of the weight is made.
            operands, before = self.operands(site), site.value()
            site = self.rewritten(site, operands)
            how = f"{site.format}, latent" if self.latent else site.format
            report.rewrite(site, how, sqnr=sqnr(before, site.value()))
        return report

    def refuses(self, site: WeightSite) -> str:
        """Why a weight is left alone; empty if it is not."""
        if not site.is_dense:
            return f"already {site.format}"
        return Quantizer(self.format(), self.strategy).refuses(site.dense)

    def operands(self, site: WeightSite) -> dict[str, Tensor | None]:
        """The tensors of the new expression of a weight that :meth:`refuses` says nothing of."""
        quantizer, weight = Quantizer(self.format(), self.strategy), site.bulk
        if not self.latent:
            return quantizer(weight)._asdict()
        scale, zero_point = quantizer.scales(weight)
        return {"latent": weight, "scale": scale, "zero_point": zero_point}

    def rewritten(self, site: WeightSite, operands: dict[str, Tensor | None]) -> WeightSite:
        """Put the expression over ``operands`` in the place of the weight; returns the site in its new form."""
        format = str(self.format())
        if self.latent:
            return site.replace(
                ops.fake_quantize, operands, format=format, **({} if self.clipped else {"clipped": False})
            )
        return site.replace(ops.dequantize, operands, format=format, columns=site.shape[1], dtype=site.dense.dtype)
