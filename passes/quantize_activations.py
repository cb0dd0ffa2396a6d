"""QuantizeActivations: the inputs of matrix products pass through quantize and dequantize."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import fx

from prequant.runtime import Granularity, WeightFormat, calibrator, ops

from .base import Pass, PassError, Report
from .program import Program, attribute_node
from .scope import Pattern, Scope
from .sites import WeightSite, weight_sites
from .straight import Origin, straight_from

aten = torch.ops.aten

LINEAR = aten.linear.default
ATTENTION = aten.scaled_dot_product_attention.default
PAIR = (("left", False), ("right", True))
ROLES: dict[Any, dict[int, tuple[str, bool]]] = {
    LINEAR: {0: ("input", False)},
    ATTENTION: {0: ("query", False), 1: ("key", False), 2: ("value", True)},
    aten.matmul.default: dict(enumerate(PAIR)),
    aten.bmm.default: dict(enumerate(PAIR)),
    aten.mm.default: dict(enumerate(PAIR)),
    aten.baddbmm.default: dict(enumerate(PAIR, 1)),
}
"""The activations that a product reads: position, name, and whether the sum runs over the second last axis."""

NOTHING_AFTER: dict[Origin, str] = {
    "softmax": "no input comes straight from a softmax: attention probabilities exist in graphs with eager attention, "
    "and operands='matmul' quantizes them",
    "activation": "no input comes straight from an activation function; that of a gated one is a product",
}
"""What to say where ``asymmetric_after`` finds none."""


class Operand(NamedTuple):
    """One input of a product. ``transposed``: the sum runs over its second last axis, so a scale's row must too."""

    consumer: fx.Node
    position: int
    role: str
    transposed: bool
    label: str


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """linear(x, w, b)  ->  linear(fake_quantize(x, scale), w, b), with one fake_quantize for all linears that read x.

    It is one node and not a pair, as integer codes would carry no gradient. A dynamic scale is computed from ``x`` by
    ``dynamic_scale``. A static one is a parameter ``<module>.input.scale`` (and ``.zero_point``) that ``calibrate``
    finds; until then ``uncalibrated(x)`` stands in its place, and a Program that holds one refuses to run.
    """

    name: ClassVar[str] = "quantize-activations"
    ensures: ClassVar[tuple[str, ...]] = ("valid-formats",)

    bits: int = 8
    """Width of a code, 2 to 8."""
    granularity: Granularity = Granularity.ROW
    """One scale per token (``row``), which is always dynamic, or per tensor."""
    dynamic: bool = True
    """Scales that just cover each input, found as the Program runs; else static ones that ``calibrate`` finds."""
    observer: str = "minmax"
    """What a static scale is found with: minmax, moving-average:0.95, percentile:99.99, entropy, or lsq to train it."""
    symmetric: bool = True
    """Whether 0 lies in the middle of the levels; asymmetric formats are for static scales."""
    asymmetric_after: tuple[Origin, ...] = ()
    """Asymmetric formats for the inputs alone that come straight from a softmax (attention probabilities, which only
    graphs with eager attention have, and ``operands='matmul'`` quantizes) or an activation function (GELU, ReLU, SiLU):
    few of their values lie below 0. All others are symmetric."""
    operands: Literal["linear", "matmul"] = "linear"
    """The inputs of linears with a stored weight, or also both sides of products of two activations (attention)."""
    include: tuple[Pattern, ...] = field(default=(), kw_only=True)
    """Only the products that one of these patterns matches (by weight, module, or ``type:Class``); all if empty."""
    exclude: tuple[Pattern, ...] = field(default=(), kw_only=True)
    """Not the products that one of these patterns matches."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` for options that do not go together."""
        super().__post_init__()
        if self.granularity is Granularity.GROUP:
            raise PassError("activations have one scale per token (granularity 'row') or per tensor, not per group")
        if not self.dynamic and self.granularity is not Granularity.TENSOR:
            raise PassError("static activation scales are per tensor: give granularity='tensor' with dynamic=False")
        if self.dynamic and not self.symmetric:
            raise PassError("dynamic activation scales are symmetric: give dynamic=False with symmetric=False")
        if self.asymmetric_after and (self.dynamic or not self.symmetric):
            raise PassError(
                "asymmetric_after makes some static scales asymmetric among symmetric ones: "
                "it goes with dynamic=False and symmetric=True"
            )
        calibrator(self.observer)
        self.format()

    def format(self, origin: Origin | None = None) -> WeightFormat:
        """The format of the quantized inputs that come straight from ``origin``, where a row is a token."""
        symmetric = self.symmetric and origin not in self.asymmetric_after
        return WeightFormat.affine(self.bits, self.granularity, symmetric=symmetric)

    def run(self, program: Program) -> Report:
        """Quantize the inputs of every product in scope."""
        report = self.report()
        for operand in self._operands(program, report):
            self._quantize(program, operand, report)
        for origin in self.asymmetric_after:
            if not any(change.figures.get("after") == origin for change in report.changes):
                report.keep(f"asymmetric_after={origin}", NOTHING_AFTER[origin])
        report.totals.update(quantized=len(report.changes), kept=len(report.kept))
        return report

    # ---- finding

    def _operands(self, program: Program, report: Report) -> Iterator[Operand]:
        """The operands to quantize, in the order of the graph; the others go into the report."""
        sites = {node: site for site in weight_sites(program) for node in site.consumers}
        candidates: list[Any] = []
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is LINEAR and node in sites:
                # A weight may be shared: what is in scope here is this one use of it.
                candidates.append(replace(sites[node], consumers=(node,)))
            elif node.target is LINEAR:
                report.keep(node, "its weight is computed, not stored")
            elif node.target is aten.addmm.default:
                report.keep(node, "a linear in another form: canonicalize comes first")
            elif node.target in ROLES:
                if self.operands == "matmul":
                    candidates.append(node)
                else:
                    report.keep(node, "a product of two activations: operands='matmul' quantizes these")
        inside, outside = Scope(self.include, self.exclude).split(candidates)
        for item in outside:
            report.keep(item, "out of scope")
        for item in inside:
            node = item.consumers[0] if isinstance(item, WeightSite) else item
            if node.target is ATTENTION:
                report.keep(
                    node, "attention probabilities exist inside it only: trace with eager attention to quantize them"
                )
            for position, (role, transposed) in ROLES[node.target].items():
                label = item.name if isinstance(item, WeightSite) else f"{node.name}, {role}"
                yield Operand(node, position, role, transposed, label)

    # ---- rewriting

    def _quantize(self, program: Program, operand: Operand, report: Report) -> None:
        consumer, position, role, transposed, label = operand
        input = consumer.args[position]
        assert isinstance(input, fx.Node)
        if (present := _quantized_format(input)) is not None:
            report.keep(label, f"already {present}")
            return
        if not self.dynamic and _rank(input) < 2:
            report.keep(label, "its input is a vector; static scales are [1, 1]")
            return
        flip = transposed and self.granularity is Granularity.ROW
        seen = _before(consumer, aten.transpose.int, (input, -1, -2)) if flip else input
        origin = straight_from(input, consumer) if self.asymmetric_after else None
        format = self.format(origin)
        result = self._fake_quantize(program, seen, consumer, role, str(format))
        if flip:
            result = _before(consumer, aten.transpose.int, (result, -1, -2))
        consumer.update_arg(position, result)
        scale = "dynamic" if self.dynamic else f"static, {self.observer}"
        after = {} if format.symmetric or origin is None else {"after": origin}
        report.rewrite(label, str(format), scale=scale, input=input.name, **after)

    def _fake_quantize(self, program: Program, input: fx.Node, consumer: fx.Node, role: str, text: str) -> fx.Node:
        """The one node that quantizes ``input`` to a format, made before ``consumer`` or moved up to it."""
        if self.dynamic:
            scale = _before(consumer, ops.dynamic_scale, (input,), format=text)
            return _before(consumer, ops.fake_quantize, (input, scale, None), format=text)
        for user in input.users:
            same = user.target is ops.uncalibrated and user.kwargs["format"] == text
            if same and user.kwargs["observer"] == self.observer:
                return _moved(user, consumer)
        name = _free_name(program, consumer, role)
        return _before(consumer, ops.uncalibrated, (input,), format=text, observer=self.observer, name=name)


def set_static(program: Program, node: fx.Node, scale: torch.Tensor, zero_point: torch.Tensor | None) -> fx.Node:
    """Replace an ``uncalibrated`` node by ``fake_quantize`` with these ``[1, 1]`` parameters; returns the new node."""
    graph, prefix = program.graph, str(node.kwargs["name"])
    with graph.inserting_before(node):
        new = graph.create_node("call_function", ops.fake_quantize, (), {"format": node.kwargs["format"]})
    new.meta = dict(node.meta)
    operands: list[Any] = [node.args[0]]
    for part, value in (("scale", scale), ("zero_point", zero_point)):
        if value is not None:
            program.set_tensor(f"{prefix}.{part}", value)
        operands.append(None if value is None else attribute_node(program, f"{prefix}.{part}", new))
    new.args = tuple(operands)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _quantized_format(node: fx.Node) -> str | None:
    """The format of a node that quantizes an activation, seen through a transpose of it."""
    if node.target is aten.transpose.int and node.args[1:] == (-1, -2):
        node = node.args[0]  # type: ignore[assignment]
    if node.target is ops.fake_quantize or node.target is ops.uncalibrated:
        return str(node.kwargs["format"])
    return None


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 2


def _before(consumer: fx.Node, op: Any, args: tuple[Any, ...], **options: Any) -> fx.Node:
    """The node ``op(*args, **options)`` before ``consumer``: one that is there, moved up if need be, or a new one."""
    first: fx.Node = args[0]
    for user in first.users:
        if user.target is op and user.args == args and dict(user.kwargs) == options:
            return _moved(user, consumer)
    with consumer.graph.inserting_before(consumer):
        node = consumer.graph.create_node("call_function", op, args, options)
    node.meta["module_stack"] = consumer.meta.get("module_stack", ())
    values = [arg.meta.get("val") if isinstance(arg, fx.Node) else arg for arg in args]
    if isinstance(values[0], torch.Tensor):
        with torch.no_grad():
            node.meta["val"] = op(*values, **options)
    return node


def _moved(node: fx.Node, consumer: fx.Node) -> fx.Node:
    if consumer < node:
        consumer.prepend(node)
    return node


def _free_name(program: Program, consumer: fx.Node, role: str) -> str:
    """``<module path>.<role>``, with a number behind it where a module is used more than once (shared layers)."""
    stack = consumer.meta.get("module_stack", ())
    path = stack[-1][0] if stack and stack[-1][0] else consumer.name
    taken = {str(node.kwargs["name"]) for node in program.graph.find_nodes(op="call_function", target=ops.uncalibrated)}
    taken |= {str(node.target).rpartition(".")[0] for node in program.graph.find_nodes(op="get_attr")}
    base = name = f"{path}.{role}"
    count = 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name
