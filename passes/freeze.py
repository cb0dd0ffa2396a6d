"""Freeze: training is over; latent weights become packed codes, and nothing trains any more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from prequant.runtime import Scheme, WeightFormat, ops
from prequant.runtime.metrics import all_finite
from prequant.runtime.reference import positive_scale

from .base import PassError, Report, WeightPass
from .options import DTYPES
from .packed import packed_uses, scoped
from .program import Program
from .scope import Scope
from .sites import OUTLIER_PREFIX, WeightSite, weight_sites
from .train import quantizes_activation
from .trained_alphas import join_alphas
from .weights import WeightView, weights


@dataclass(frozen=True)
class Freeze(WeightPass):
    """linear(x, fake_quantize(latent, scale), b)  ->  linear(x, dequantize(codes, scale), b): the same values, packed.

    No parameter trains afterwards; with ``include`` or ``exclude``, no parameter of the weights in scope. Trained
    outlier values are stored in ``outlier_dtype`` if one is given, the one step here that may change a value. Learned
    scales are stored as the magnitude that the quantizer has worked with. A trained value that is not finite raises.
    """

    name: ClassVar[str] = "freeze"
    ensures: ClassVar[tuple[str, ...]] = ("valid-formats",)

    outlier_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """How outlier values are stored; ``none`` leaves them as they are."""

    def run(self, program: Program) -> Report:
        """Freeze every weight in scope."""
        report = self.report()
        trained = _trainable(program)
        names = {view.name for view in self._views(program, report)}
        join_alphas(program, names)
        views = [view for view in weights(program) if view.name in names]
        sites = {site.name: site for site in weight_sites(program)}
        parts = {name for view in views for name in view.tensors.values()}
        _check_finite(program, parts)
        for view in views:
            latent = "latent" in view.tensors
            if latent:
                site = _packed(sites[view.name])
                report.rewrite(site, site.format, bytes=program.tensor(site.tensors["codes"]).numel())
            if not self._cast_outliers(view, report) and not latent:
                report.keep(view.name, f"{view.format}: not latent")
        if not (self.include or self.exclude):
            _store_positive_input_scales(program)
        parts = {name for view in weights(program) if view.name in names for name in view.tensors.values()}
        for name in self._trained(program, parts):
            program.set_tensor(name, program.tensor(name), trainable=False)
        report.totals.update(frozen=trained - _trainable(program))
        return report

    def _views(self, program: Program, report: Report) -> list[WeightView]:
        """The weights in scope, latent or not, lowered or not; the others go into the report."""
        items = {view.name: (scoped(program, view.name, view.consumers), view) for view in weights(program)}
        inside, outside = Scope(self.include, self.exclude).split([item for item, _ in items.values()])
        for item in outside:
            report.keep(item, "out of scope")
        return [items[item.name][1] for item in inside]

    def _cast_outliers(self, view: WeightView, report: Report) -> bool:
        name = view.tensors.get(OUTLIER_PREFIX + "values")
        if self.outlier_dtype is None or name is None:
            return False
        values = view.program.tensor(name).detach()
        cast = values.to(DTYPES[self.outlier_dtype])
        if cast.dtype is values.dtype:
            return False
        if not all_finite(cast):
            largest = float(values.abs().max())
            raise PassError(f"{name}: a value of {largest:.4g} does not fit into {self.outlier_dtype}", node=view.name)
        view.program.set_tensor(name, cast)
        change = (cast.float() - values.float()).abs().max() if values.numel() else torch.zeros(())
        how = f"outliers as {self.outlier_dtype}"
        report.rewrite(view.name, how, outliers=values.numel(), largest_change=float(change))
        return True

    def _trained(self, program: Program, parts: set[str]) -> list[str]:
        """Names of the parameters in scope that train."""
        everything = not (self.include or self.exclude)
        named = program.named_parameters(remove_duplicate=False)
        return [name for name, value in named if value.requires_grad and (everything or name in parts)]


def _trainable(program: Program) -> int:
    """How many numbers train."""
    return sum(value.numel() for value in program.parameters() if value.requires_grad)


def _packed(site: WeightSite) -> WeightSite:
    """The site with codes in the place of its latent weight."""
    format = WeightFormat.parse(site.format)
    parts = {part: site.program.tensor(name).detach() for part, name in site.tensors.items()}
    latent, scale, offset = parts["latent"], positive_scale(parts["scale"], format), parts.get("zero_point")
    codes = ops.quantize(latent, scale, offset, format=str(format))
    # What a ternary latent weight has as its zero point is a threshold, which codes no longer need.
    zero_point = None if format.scheme is Scheme.TERNARY else offset
    operands = {"codes": codes, "scale": scale, "zero_point": zero_point}
    return site.replace(ops.dequantize, operands, format=str(format), columns=int(latent.shape[1]), dtype=latent.dtype)


def _store_positive_input_scales(program: Program) -> None:
    for scale, format in _input_scales(program):
        if isinstance(scale, fx.Node) and scale.op == "get_attr":
            value = program.tensor(str(scale.target)).detach()
            program.set_tensor(str(scale.target), positive_scale(value, WeightFormat.parse(format)))


def _input_scales(program: Program) -> Iterator[tuple[Any, str]]:
    """Scale and format of every quantized activation, lowered or not."""
    for node in program.graph.find_nodes(op="call_function", target=ops.fake_quantize):
        if quantizes_activation(node):
            yield node.args[1], str(node.kwargs["format"])
    for use in packed_uses(program.graph):
        if use.operands.get("input_format"):
            yield use.operands["input_scale"], str(use.operands["input_format"])


def _check_finite(program: Program, parts: set[str]) -> None:
    """Raise for a trained parameter, or a part of a weight in scope, that holds NaN or infinity."""
    bad = []
    for name, value in program.named_parameters(remove_duplicate=False):
        if (value.requires_grad or name in parts) and not all_finite(value):
            bad.append(f"{name} ({int((~torch.isfinite(value)).sum())} of {value.numel()})")
    if bad:
        more = f" and {len(bad) - 5} more" if bad[5:] else ""
        raise PassError(f"training left NaN or infinity in {', '.join(bad[:5])}{more}: restore an earlier checkpoint")
