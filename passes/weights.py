"""One view of every weight of a Program, whatever form it has, lowered or not: for tables, checkpoints and pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from prequant.runtime import Outliers, Scheme, WeightFormat, ops, reference

from .packed import PackedUse, packed_uses, packed_weight_name
from .program import Program
from .sites import OUTLIER_PREFIX, WeightSite, weight_sites

PACKED_PARTS = ("codes", "scale", "zero_point", "outliers.values", "outliers.columns", "outliers.row_offsets")
PACKED_OPERANDS = ("codes", "scale", "zero_point", "outlier_values", "outlier_columns", "outlier_row_offsets")
"""What a packed op calls these."""
BCQ_PARTS = ("planes", "alphas")


@dataclass(frozen=True)
class WeightView:
    """A weight: its ``name``, what it is used for (``linear``, ``embedding``, ``linear+embedding``), its format, and
    the names of its tensors by part.

    ``format`` is a :class:`WeightFormat` text, or a dtype's name for a dense weight. ``input_format`` is the activation
    quantization of the linears that read it, empty if none, joined with ``+`` if they differ. ``lowered``: every one of
    its ``consumers`` computes on the packed tensors.
    """

    program: Program
    name: str
    kind: str
    format: str
    shape: tuple[int, int]
    tensors: dict[str, str]
    outliers_replace: bool
    input_format: str
    lowered: bool
    consumers: tuple[fx.Node, ...]

    @property
    def bytes(self) -> int:
        """Bytes that its tensors take in memory and, headers aside, on disk."""
        return sum(t.numel() * t.element_size() for t in map(self.program.tensor, self.tensors.values()))

    def value(self) -> Tensor:
        """The float weight ``[rows, columns]`` that it stands for, in the dtype of its scale or of the float weight."""
        parts = {part: self.program.tensor(name).detach() for part, name in self.tensors.items()}
        if "codes" in parts or "planes" in parts:
            codes, scale = (parts[part] for part in (BCQ_PARTS if "planes" in parts else PACKED_PARTS[:2]))
            parsed = WeightFormat.parse(self.format)
            dense = reference.dequantize(codes, scale, parts.get("zero_point"), parsed, self.shape[1])
        elif "latent" in parts:
            dense = reference.fake_quantize(
                parts["latent"], parts["scale"], parts.get("zero_point"), WeightFormat.parse(self.format)
            )
        else:
            dense = parts["dense"]
        add = reference.add_outliers if "dense" in parts else reference.add_outliers_
        if OUTLIER_PREFIX + "values" not in parts:
            return dense
        values, columns, offsets = (parts[OUTLIER_PREFIX + part] for part in ("values", "columns", "row_offsets"))
        return add(dense, Outliers(values, columns, offsets, self.outliers_replace))


def weights(program: Program) -> list[WeightView]:
    """Every weight that a linear or an embedding reads, simulated or lowered, in the order of first use."""
    packed: dict[fx.Node, list[PackedUse]] = {}
    for use in packed_uses(program.graph):
        packed.setdefault(use.operands["codes"], []).append(use)
    views = [_packed(program, uses) for uses in packed.values()]
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    merged = _merged([_simulated(site) for site in weight_sites(program)] + views, order)
    return sorted(merged, key=lambda view: order[view.consumers[0]])


def _simulated(site: WeightSite) -> WeightView:
    inputs = (node.args[0] for node in site.consumers if node.target is torch.ops.aten.linear.default)
    formats = {
        str(input.kwargs["format"])
        for input in inputs
        if isinstance(input, fx.Node) and input.target in (ops.fake_quantize, ops.uncalibrated)
    }
    return WeightView(
        program=site.program,
        name=site.name,
        kind=site.kind,
        format=site.format,
        shape=site.shape,
        tensors=site.tensors,
        outliers_replace=site.outliers is not None and bool(site.outliers.kwargs["replace"]),
        input_format="+".join(sorted(formats)),
        lowered=False,
        consumers=site.consumers,
    )


def _packed(program: Program, uses: list[PackedUse]) -> WeightView:
    first = uses[0].operands
    text, columns = str(first["format"]), int(first["columns"])
    bcq = WeightFormat.parse(text).scheme is Scheme.BCQ
    parts = (BCQ_PARTS if bcq else PACKED_PARTS[:2]) + PACKED_PARTS[2:]
    tensors = {
        part: str(first[operand].target)
        for part, operand in zip(parts, PACKED_OPERANDS, strict=True)
        if isinstance(first[operand], fx.Node)
    }
    stored = next(iter(tensors.values()))
    kinds = sorted({use.kind for use in uses}, reverse=True)
    return WeightView(
        program=program,
        name=packed_weight_name(uses[0]),
        kind="+".join(kinds),
        format=text,
        shape=(int(program.tensor(stored).shape[-2]), columns),
        tensors=tensors,
        outliers_replace=bool(first["outliers_replace"]),
        input_format="+".join(sorted({str(use.operands.get("input_format", "")) for use in uses} - {""})),
        lowered=True,
        consumers=tuple(use.consumer for use in uses),
    )


def _merged(views: list[WeightView], order: dict[fx.Node, int]) -> list[WeightView]:
    """One view per weight: a tied weight may be lowered at one consumer and kept at another."""
    by_name: dict[str, WeightView] = {}
    for view in views:
        other = by_name.get(view.name)
        if other is None:
            by_name[view.name] = view
            continue
        formats = {*other.input_format.split("+"), *view.input_format.split("+")} - {""}
        by_name[view.name] = replace(
            other,
            kind="+".join(sorted({*other.kind.split("+"), *view.kind.split("+")}, reverse=True)),
            input_format="+".join(sorted(formats)),
            lowered=other.lowered and view.lowered,
            consumers=tuple(sorted((*other.consumers, *view.consumers), key=order.__getitem__)),
        )
    return list(by_name.values())


def float_bytes(view: WeightView) -> int:
    """Bytes of the weight as float32."""
    return view.shape[0] * view.shape[1] * torch.float32.itemsize
