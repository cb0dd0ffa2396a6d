"""ComposeOps: what a model spelled out in elementary ops, and is one op of ATen, becomes that op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from .base import Pass, Report
from .noops import same_sizes
from .program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class ComposeOps(Pass):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))  ->  gelu(x, approximate="tanh")
    w * (x * rsqrt(mean(x^2) + eps))                      ->  rms_norm(x, w, eps)

    Models of transformers spell these out. As one op they are one node to fuse and to run; results differ by rounding.
    """

    name: ClassVar[str] = "compose-ops"

    def run(self, program: Program) -> Report:
        """Compose every match, whose nodes in between nothing else reads."""
        report = self.report()
        for composition in COMPOSITIONS:
            composed: dict[fx.Node, fx.Node] = {}  # the result of one may be an operand of the next
            for result, found in _matches(program.graph, composition):
                operands = {name: composed.get(value, value) for name, value in found.items()}
                call = composition.call(operands)
                if call is None:
                    continue
                target, args, kwargs = call
                with program.graph.inserting_before(result):
                    node = program.graph.create_node("call_function", target, args, kwargs)
                node.meta = dict(result.meta)
                result.replace_all_uses_with(node)
                composed[result] = node
                report.rewrite(node, f"one {target.name().removeprefix('aten::')}")
        program.graph.eliminate_dead_code()
        report.totals.update(composed=len(report.changes))
        return report


@dataclass(frozen=True)
class Composition:
    """The graph of a function over elementary ops, and the one call that computes the same: from the operands by the
    names of the function's parameters to a target, its args and kwargs; None where it does not after all.
    """

    pattern: fx.Graph
    call: Callable[[dict[str, Any]], tuple[Any, tuple[Any, ...], dict[str, Any]] | None]


def _gelu(x: Any) -> Any:
    inner = aten.add.Tensor(x, aten.mul.Tensor(aten.pow.Tensor_Scalar(x, 3.0), 0.044715))
    tanh = aten.tanh.default(aten.mul.Tensor(inner, math.sqrt(2.0 / math.pi)))
    return aten.mul.Tensor(aten.mul.Tensor(x, 0.5), aten.add.Tensor(tanh, 1.0))


def _call_gelu(operands: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return aten.gelu.default, (operands["x"],), {"approximate": "tanh"}


def _rms_norm(x: Any, weight: Any, epsilon: Any) -> Any:
    mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
    return aten.mul.Tensor(weight, aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, epsilon))))


def _call_rms_norm(operands: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    weight, epsilon = operands["weight"], operands["epsilon"]
    value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
    if not (isinstance(value, Tensor) and value.dim() == 1 and isinstance(epsilon, float)):
        return None
    x = operands["x"].meta["val"]
    if value.dtype != x.dtype or not x.dtype.is_floating_point or not same_sizes(value.shape, x.shape[-1:]):
        return None
    return aten.rms_norm.default, (operands["x"], [int(value.shape[0])], weight, epsilon), {}


COMPOSITIONS = tuple(
    Composition(fx.Tracer().trace(pattern), call)  # once: while it traces, other threads find torch's modules patched
    for pattern, call in ((_gelu, _call_gelu), (_rms_norm, _call_rms_norm))
)


def _matches(graph: fx.Graph, composition: Composition) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
    """The node that has the result of each match, and the operands by the names of the function's parameters."""
    parameters = composition.pattern.find_nodes(op="placeholder")
    for match in SubgraphMatcher(composition.pattern).match(graph):
        (result,) = match.returning_nodes
        yield result, {str(node.target): match.nodes_map[node] for node in parameters}
