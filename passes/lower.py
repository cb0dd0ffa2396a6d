"""Lower: whole weight expressions become packed ops that compute on the same buffers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from prequant.runtime import ops

from .aliasing import is_view
from .base import PassError, Report, WeightPass
from .compose_ops import ComposeOps
from .fuse_epilogue import FuseEpilogue
from .fuse_parallel_linears import FuseParallelLinears
from .packed import PRODUCTS, operands_of
from .pipeline import Pipeline
from .plan import Plan
from .program import Program
from .scope import Scope
from .sites import PARTS, WEIGHT_OPERAND, WeightSite, expression_leaf, weight_name, weight_sites

aten = torch.ops.aten

SHOWN = 5
"""How many kept weights the error of a strict run names."""

EXPRESSION_OPS = (*PARTS, ops.dynamic_scale)
"""What a packed op takes the place of, beside the linear or embedding."""


@dataclass(frozen=True)
class Lower(WeightPass):
    """linear([q_dq](x), expression, b)  ->  packed_linear(x, codes, scale, ..., b), and likewise for embeddings.

    The packed op reads the very tensors of the expression: nothing is converted, and the saved file does not change.
    Every matrix product and embedding stands in the report: lowered, or kept and why. Products of two activations
    (attention) have no weight and are only reported.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[tuple[str, ...]] = ("calibrated",)

    strict: bool = False
    """Fail where a product or embedding in scope that has a weight is kept."""

    def run(self, program: Program) -> Report:
        """Lower every expression in scope. Raises :class:`PassError` if strict, and not all of it can be."""
        report = self.report()
        kept_weights = []
        for site in self.sites(program, report):
            if reason := _obstacle(site):
                kept_weights.append(f"{site.name} ({reason})")
                report.keep(site, reason)
                continue
            for consumer in site.consumers:
                if reason := _lower(program.graph, site, consumer):
                    kept_weights.append(f"{site.name} at {consumer.name} ({reason})")
                    report.keep(consumer, f"{site.name}: {reason}")
                else:
                    report.rewrite(site, site.format, op="embedding" if _is_embedding(consumer) else "linear")
        for node, reason, has_weight in _remaining(program):
            report.keep(node, reason)
            if has_weight and Scope(self.include, self.exclude).holds(node):
                kept_weights.append(f"{node.name} ({reason})")
        report.totals.update(lowered=len(report.changes), kept=len(report.kept))
        if self.strict and kept_weights:
            more = f" and {len(kept_weights) - SHOWN} more" if kept_weights[SHOWN:] else ""
            raise PassError("not everything can be lowered: " + "; ".join(kept_weights[:SHOWN]) + more)
        return report


def _is_embedding(node: fx.Node) -> bool:
    return node.target is aten.embedding.default


def _obstacle(site: WeightSite) -> str:
    """Why an expression has no packed form; empty if it has one."""
    if site.is_dense:
        return f"{site.format}: not quantized"
    if site.leaf.target is ops.fake_quantize:
        return "a latent weight: freeze it first"
    if site.root is not site.leaf and site.root is not site.outliers:
        return "more than one set of outliers"
    return ""


def _lower(graph: fx.Graph, site: WeightSite, consumer: fx.Node) -> str:
    """Replace one consumer. Returns why not; empty if done."""
    leaf, operands = site.leaf, operands_of(consumer)
    outliers: tuple[Any, ...] = (None, None, None, False)
    if site.outliers is not None:
        outliers = (*site.outliers.args[1:], site.outliers.kwargs["replace"])
    bcq = leaf.target is ops.dequantize_bcq
    weight = (*leaf.args, *((None,) if bcq else ()), *outliers)
    options = {"format": leaf.kwargs["format"], "columns": leaf.kwargs["columns"]}
    if _is_embedding(consumer):
        if operands.get("scale_grad_by_freq") or operands.get("sparse"):
            return "an embedding with scale_grad_by_freq or sparse gradients"
        args: tuple[Any, ...] = (operands["indices"], *weight)
        options |= {"dtype": leaf.kwargs.get("dtype"), "padding_idx": operands.get("padding_idx", -1)}
        op = ops.packed_embedding
    else:
        input, input_scale, input_zero_point, input_format = _input(operands["input"])
        args = (input, *weight, operands.get("bias"), input_scale, input_zero_point)
        options["input_format"] = input_format
        op = ops.packed_linear
    with graph.inserting_before(consumer):
        packed = graph.create_node("call_function", op, args, options)
    packed.meta = dict(consumer.meta)
    consumer.replace_all_uses_with(packed)
    replaced = consumer.all_input_nodes
    graph.erase_node(consumer)
    for node in replaced:
        _erase_unused(graph, node)
    return ""


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Remove a node of an expression that the packed op has taken the place of, once nothing else reads it."""
    if node.target in EXPRESSION_OPS and not node.users:
        operands = node.all_input_nodes
        graph.erase_node(node)
        for operand in operands:
            _erase_unused(graph, operand)


def _input(node: Any) -> tuple[Any, Any, Any, str]:
    """The float input of a linear, with the scale, zero point and format of its quantization (no scale: dynamic).

    The gradients of a quantization inside the packed op are the usual ones; one with other options stays outside.
    """
    usual = isinstance(node, fx.Node) and node.kwargs.get("clipped", True) and node.kwargs.get("scale_gradient", True)
    if not (usual and node.target is ops.fake_quantize):
        return node, None, None, ""
    input, scale, zero_point = node.args
    text = str(node.kwargs["format"])
    dynamic = (
        isinstance(scale, fx.Node)
        and scale.target is ops.dynamic_scale
        and scale.args[0] is input
        and scale.kwargs["format"] == text
    )
    return input, None if dynamic else scale, zero_point, text


def _remaining(program: Program) -> Iterator[tuple[fx.Node, str, bool]]:
    """Products that no weight site covers, with the reason, and whether they have a weight."""
    covered = {consumer for site in weight_sites(program) for consumer in site.consumers}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in PRODUCTS or node in covered:
            continue
        if weight := _weight_in(program, node):
            yield node, f"it reads the weight {weight} in another form: canonicalize comes first", True
        elif node.target in WEIGHT_OPERAND:
            yield node, "its weight is computed, not stored", True
        else:
            yield node, "a product of two activations: it has no weight", False


def _weight_in(program: Program, product: fx.Node) -> str:
    """Name of a stored matrix that a product reads as it is, or through a view of it; empty if there is none."""
    if product.target is aten.scaled_dot_product_attention.default:
        return ""
    for node in product.all_input_nodes:
        while is_view(node):
            node = node.all_input_nodes[0]
        leaf = expression_leaf(node)
        if leaf is None or (leaf.op == "get_attr" and not _is_matrix(program.tensor(str(leaf.target)))):
            continue
        return weight_name(node, leaf)
    return ""


def _is_matrix(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.dim() > 1


def lower(program: Program, strict: bool = False) -> Program:
    """The program with every weight expression lowered, what belongs together fused, and run by a plan where it can be.

    What each step did is in its last reports: of ``lower``, ``compose-ops``, ``fuse-epilogue``,
    ``fuse-parallel-linears`` and ``plan``.
    """
    fusions = (ComposeOps(), FuseEpilogue(), FuseParallelLinears())
    return Pipeline([Lower(strict=strict), *fusions, Plan()])(program)
