"""BinaryCode: float weights become sums of binary planes, each with its own alphas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prequant.runtime import QuantizedWeight, Scheme, WeightFormat, binary_code, ops, sqnr
from prequant.runtime.bcq import from_affine, refuses

from .base import PassError, Report, WeightPass
from .program import Program
from .sites import WeightSite


@dataclass(frozen=True)
class BinaryCode(WeightPass):
    """linear(x, w, b)  ->  linear(x, dequantize_bcq(planes, alphas), b): binary coding quantization, as in AlphaTuning.

    The planes are packed and frozen, one bit a weight each; the alphas ([planes, out, groups], float32) are a
    parameter. Embeddings stay in float unless asked for, and with them a head that is tied to one: they grow with the
    width where linears grow with its square.
    """

    name: ClassVar[str] = "binary-code"
    ensures: ClassVar[tuple[str, ...]] = ("valid-formats",)

    bits: int = 3
    """Number of planes, 1 to 8."""
    group_size: int = 0
    """Weights along ``in_features`` that share an alpha; 0 for a whole row."""
    refine: int = 0
    """Rounds of alternating refinement after the greedy solution."""
    embeddings: bool = False
    """Code embeddings too."""
    from_affine: bool = False
    """Turn affine codes into planes of the same values, one more than their bits; float weights are then left alone."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` or :class:`FormatError` for options that are out of range."""
        super().__post_init__()
        if self.refine < 0 or self.group_size < 0:
            raise PassError(f"refine={self.refine} and group_size={self.group_size} must not be negative")
        self.format()

    def format(self) -> WeightFormat:
        """The format of weights that were float."""
        return WeightFormat.bcq(self.bits, self.group_size)

    def run(self, program: Program) -> Report:
        """Code every weight in scope."""
        report = self.report()
        for site in self.sites(program, report):
            if reason := self._refuses(site):
                report.keep(site, reason)
                continue
            before, columns = site.value(), site.shape[1]
            coded, format = self._code(site)
            options = {"format": str(format), "columns": columns, "dtype": before.dtype}
            site = site.replace(ops.dequantize_bcq, {"planes": coded.codes, "alphas": coded.scale}, **options)
            report.rewrite(site, str(format), sqnr=sqnr(before, site.value()))
        return report

    def _refuses(self, site: WeightSite) -> str:
        if "embedding" in site.kind and not self.embeddings:
            return f"{site.kind}: stays as it is (embeddings=True codes it)"
        if not self.from_affine:
            return refuses(site.dense) if site.is_dense else f"already {site.format}"
        if site.leaf.target is not ops.dequantize:
            return f"{site.format}: from_affine rewrites affine codes alone"
        format = WeightFormat.parse(site.format)
        if format.scheme is not Scheme.AFFINE:
            return f"{site.format}: from_affine rewrites affine codes alone"
        return "8 bits would take 9 planes; there are at most 8" if format.bits == 8 else ""

    def _code(self, site: WeightSite) -> tuple[QuantizedWeight, WeightFormat]:
        if not self.from_affine:
            return binary_code(site.bulk, self.format(), self.refine), self.format()
        parts = {part: site.program.tensor(name).detach() for part, name in site.tensors.items()}
        quantized = QuantizedWeight(parts["codes"], parts["scale"], parts.get("zero_point"))
        return from_affine(quantized, WeightFormat.parse(site.format), site.shape[1])
