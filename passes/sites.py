"""Weight sites: where a linear or an embedding reads a weight, and the expression that stands for it.

The weight operand is an expression over tensors of the Program::

    value := leaf | add_outliers(leaf, values, columns, row_offsets)
    leaf  := dense                                    a float parameter
           | fake_quantize(latent, scale, zero_point) a float parameter that trains under quantization
           | dequantize(codes, scale, zero_point)     frozen packed codes
           | dequantize_bcq(planes, alphas)           frozen packed planes

Passes rewrite the *dense* leaf they find, or read the parts; none needs to know what the others did. A weight shared by
several nodes (tied, or a shared layer) is one site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from prequant.runtime import Outliers, PrequantError, ops, reference
from prequant.runtime.metrics import all_finite

from .program import Program, attribute_node

aten = torch.ops.aten

WEIGHT_OPERAND = {aten.linear.default: 1, aten.embedding.default: 0}
"""Ops with a ``[rows, columns]`` weight, and the position of that operand."""

PARTS: dict[Any, tuple[str, ...]] = {
    ops.add_outliers: ("dense", "values", "columns", "row_offsets"),
    ops.fake_quantize: ("latent", "scale", "zero_point"),
    ops.dequantize: ("codes", "scale", "zero_point"),
    ops.dequantize_bcq: ("planes", "alphas"),
}
"""Names of the tensor operands of every expression op; a weight ``W`` keeps them under ``W.codes``, ``W.scale``, ..."""

FLOAT_WEIGHTS = ("dense", "latent")
"""Parts that are the float weight itself."""

OUTLIER_PREFIX = "outliers."


@dataclass(frozen=True)
class WeightSite:
    """One weight of a Program, whatever form it has, and the nodes that use it."""

    program: Program
    name: str
    root: fx.Node
    """The node that consumers read: the whole expression's value."""
    leaf: fx.Node
    """The innermost node: ``get_attr`` of a dense weight, or the op that makes values of codes or a latent weight."""
    consumers: tuple[fx.Node, ...]

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The weight's name and its aliases."""
        return self.program.names_of(self.name)

    @property
    def kind(self) -> str:
        """``linear``, ``embedding``, or ``linear+embedding`` for a tied matrix."""
        kinds = {"linear" if node.target is aten.linear.default else "embedding" for node in self.consumers}
        return "+".join(sorted(kinds, reverse=True))

    @property
    def is_dense(self) -> bool:
        """Whether the leaf is still a float weight."""
        return self.leaf.op == "get_attr"

    @property
    def format(self) -> str:
        """Text of the weight format, or ``float32`` and the like for a dense leaf."""
        return str(self.dense.dtype).removeprefix("torch.") if self.is_dense else str(self.leaf.kwargs["format"])

    @property
    def dense(self) -> Tensor:
        """The float weight of a dense leaf. Raises :class:`PrequantError` for another."""
        if not self.is_dense:
            raise PrequantError(f"{self.name} is already {self.format}: it has no dense weight")
        return self.program.tensor(str(self.leaf.target))

    @property
    def bulk(self) -> Tensor:
        """The dense weight as a quantizer should see it: outliers clipped to the range of all that are none.

        Raises :class:`PrequantError` if the leaf is not dense.
        """
        dense = self.dense.detach()
        if self.outliers is None:
            return dense
        positions = outlier_positions(self)
        if positions[0].numel() == dense.numel():
            return dense
        # What is no outlier is found without a copy of it: outliers stand aside at either end of the range in turn.
        bulk = dense.clone()
        bulk[positions] = torch.inf
        low = bulk.amin()
        bulk[positions] = -torch.inf
        bulk[positions] = dense[positions].clamp(low, bulk.amax())
        return bulk

    @property
    def outliers(self) -> fx.Node | None:
        """The ``add_outliers`` node directly above the leaf, if there is one."""
        for user in self.leaf.users:
            if user.target is ops.add_outliers and user.args[0] is self.leaf:
                return user
        return None

    @property
    def tensors(self) -> dict[str, str]:
        """Names of the expression's tensors in the Program by part (``codes``, ``scale``, ``outliers.values``, ...)."""
        found: dict[str, str] = {}
        node = self.root
        while node.op == "call_function":
            prefix = OUTLIER_PREFIX if node.target is ops.add_outliers else ""
            for part, operand in zip(PARTS[node.target], node.args, strict=False):
                if isinstance(operand, fx.Node) and operand.op == "get_attr":
                    found[(prefix if part != "dense" else "") + part] = str(operand.target)
            node = node.args[0]  # type: ignore[assignment]
        return found or {"dense": self.name}

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the weight; a linear's weight without rows, a vector, has one."""
        stored = self.dense if self.is_dense else self.program.tensor(str(self.leaf.args[0].target))  # type: ignore[union-attr]
        rows = stored.shape[-2] if stored.dim() > 1 else 1
        columns: Any = self.leaf.kwargs.get("columns", stored.shape[-1])
        return int(rows), int(columns)

    @property
    def module_types(self) -> tuple[str, ...]:
        """Class names of the modules whose code uses the weight, outermost first."""
        return tuple({kind: None for node in self.consumers for _, kind in node.meta.get("module_stack", ())})

    def value(self) -> Tensor:
        """The float weight ``[rows, columns]`` that the expression stands for now."""
        with torch.no_grad():
            return _evaluate(self.program, self.root)

    # ---- rewriting --------------------------------------------------------------------------------------------------

    def replace(self, op: Any, operands: Mapping[str, Tensor | None], **options: Any) -> WeightSite:
        """Put ``op(*operands, **options)`` in the place of the leaf, its operands stored as ``<name>.<part>``.

        Float operands become parameters, which train; one that goes on as the float weight (dense or latent) trains if
        the weight did. All others become buffers. The old leaf's tensors go. Outliers that add to the leaf take up its
        change, so that the sums at their positions stay what they are. Returns the site in its new form.

        Raises :class:`PrequantError` for a second set of outliers, and for sums that the outliers' dtype can't keep.
        """
        if op is ops.add_outliers and self.outliers is not None:
            raise PrequantError(f"{self.name} has outliers already")
        kept, trained = _kept_values(self), not self.is_dense or self.dense.requires_grad
        graph, old = self.program.graph, self.leaf
        new = graph.create_node("call_function", op, (), dict(options))
        old.append(new)
        old.replace_all_uses_with(new)
        new.meta["module_stack"] = self.consumers[0].meta.get("module_stack", ())
        new.meta["val"] = old.meta.get("val")
        _erase_leaf(self.program, old)
        nodes: list[fx.Node | None] = []
        for part, value in operands.items():
            if value is None:
                nodes.append(None)
                continue
            name = f"{self.name}.{_stored_part(op, part)}"
            self.program.set_tensor(name, value, trainable=trained or part not in FLOAT_WEIGHTS)
            nodes.append(attribute_node(self.program, name, new))
        new.args = tuple(nodes)
        leaf = nodes[0] if op is ops.add_outliers else new
        assert leaf is not None
        site = WeightSite(self.program, self.name, new if self.root is old else self.root, leaf, self.consumers)
        _restore(site, kept)
        return site


def _erase_leaf(program: Program, leaf: fx.Node) -> None:
    """Remove a leaf that nothing uses any more, with its tensors."""
    operands = leaf.all_input_nodes
    program.graph.erase_node(leaf)
    for node in (leaf, *operands):
        if node.op == "get_attr" and not node.users:
            if node is not leaf:
                program.graph.erase_node(node)
            program.delete_tensor(str(node.target))


def _stored_part(op: Any, part: str) -> str:
    return OUTLIER_PREFIX + part if op is ops.add_outliers and part != "dense" else part


def _kept_values(site: WeightSite) -> Tensor | None:
    """Values of the weight at the positions of outliers that add to the leaf, before the leaf changes."""
    if site.outliers is None or site.outliers.kwargs["replace"]:
        return None
    return site.value()[outlier_positions(site)]


def _restore(site: WeightSite, kept: Tensor | None) -> None:
    if kept is None or site.outliers is None:
        return
    name = str(site.outliers.args[1].target)  # type: ignore[union-attr]
    values = site.program.tensor(name).detach()
    change = kept.float() - site.value()[outlier_positions(site)].float()
    updated = (values.float() + change).to(values.dtype)
    if not all_finite(updated):
        raise PrequantError(f"{site.name}: its outliers are too large for {str(values.dtype).removeprefix('torch.')}")
    site.program.set_tensor(name, updated)


def outlier_positions(site: WeightSite) -> tuple[Tensor, Tensor]:
    """Rows and columns (int64, ``[nnz]``) of a site's outliers. Raises :class:`PrequantError` if it has none."""
    if site.outliers is None:
        raise PrequantError(f"{site.name} has no outliers")
    values, columns, offsets = (site.program.tensor(str(node.target)) for node in site.outliers.all_input_nodes[1:])
    return Outliers(values, columns, offsets, replace=False).positions()


def _evaluate(program: Program, value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return value
    if value.op == "get_attr":
        return program.tensor(str(value.target))
    arguments = [_evaluate(program, arg) for arg in value.args]
    if value.target is ops.add_outliers and value.all_input_nodes[0].op != "get_attr":
        # Into the dense weight itself: it was made a moment ago, and nobody else has it.
        dense, values, columns, offsets = arguments
        return reference.add_outliers_(dense, Outliers(values, columns, offsets, bool(value.kwargs["replace"])))
    return value.target(*arguments, **value.kwargs)  # type: ignore[operator]


# ---- finding --------------------------------------------------------------------------------------------------------


def weight_sites(program: Program) -> list[WeightSite]:
    """Every weight read by a linear or an embedding, in the order of first use, shared ones once."""
    consumers: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in WEIGHT_OPERAND:
            operand: Any = node.args[WEIGHT_OPERAND[node.target]]
            consumers.setdefault(operand, []).append(node)
    leaves = {root: expression_leaf(root) for root in consumers}
    return [
        WeightSite(program, weight_name(root, leaf), root, leaf, tuple(consumers[root]))
        for root, leaf in leaves.items()
        if leaf is not None
    ]


def expression_leaf(node: Any) -> fx.Node | None:
    """The leaf of a weight expression, or None if ``node`` is not one (a computed weight)."""
    while isinstance(node, fx.Node) and node.target is ops.add_outliers:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        return node
    if node.op == "call_function" and node.target in PARTS:
        first = node.args[0]
        return node if isinstance(first, fx.Node) and first.op == "get_attr" else None
    return None


def weight_name(root: fx.Node, leaf: fx.Node) -> str:
    """The name of the weight that an expression stands for: what the names of its tensors begin with."""
    if leaf.op == "get_attr":
        return str(leaf.target) if leaf is root else str(leaf.target).removesuffix(".dense")
    return str(leaf.args[0].target).rpartition(".")[0]  # type: ignore[union-attr]
