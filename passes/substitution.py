"""Runs of one Program with other weights in some places: nothing is traced, copied or rewritten for it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from prequant.runtime import WeightFormat, ops, reference

from .packed import PACKED_OPS, PackedUse, uses_in
from .program import Program
from .sites import PARTS, WeightSite, weight_sites
from .weights import WeightView

aten = torch.ops.aten


@dataclass(frozen=True)
class Form:
    """How a linear or an embedding computes in one place: with which float weight ``[rows, columns]``, and how the
    input of a linear is quantized first (``input_format``; no scale: a dynamic one).
    """

    weight: Tensor
    input_format: str = ""
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    def linear(
        self, input: Tensor, bias: Tensor | None, activation: str = "", residual: Tensor | None = None
    ) -> Tensor:
        """``activation(linear(quantized input, weight, bias)) + residual``."""
        format = WeightFormat.parse(self.input_format) if self.input_format else None
        quantization = (self.input_scale, self.input_zero_point, format)
        return reference.unpacked_linear(self.weight, input, bias, *quantization, activation, residual)


def forms_of(view: WeightView) -> dict[fx.Node, Form]:
    """The form of every consumer of a weight, simulated or lowered, in the order of the graph."""
    weight, program = view.value(), view.program

    def tensor(node: Any) -> Tensor | None:
        return (
            program.tensor(str(node.target)).detach() if isinstance(node, fx.Node) and node.op == "get_attr" else None
        )

    uses = {use.consumer: use for node in program.graph.nodes for use in uses_in(node)}
    found = {}
    for consumer in view.consumers:
        text, scale, zero_point = "", None, None
        if consumer in uses:
            operands = uses[consumer].operands
            text = str(operands.get("input_format", ""))
            scale, zero_point = (operands.get(name) for name in ("input_scale", "input_zero_point"))
        elif consumer.target is aten.linear.default and _quantizes(consumer.args[0]):
            input: Any = consumer.args[0]
            text, (_, scale, zero_point) = str(input.kwargs["format"]), input.args
        found[consumer] = Form(weight, text, tensor(scale), tensor(zero_point))
    return found


def _quantizes(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is ops.fake_quantize


Watch = Callable[[fx.Node, Tensor, Callable[[Form], Tensor]], None]
"""Is shown a consumer, its result, and what makes the result that another form would give for the same inputs."""


@dataclass(frozen=True)
class Change:
    """What is other in a run than in the Program.

    ``weights``: by the name of a simulated or dense weight, what makes a value to stand in its place wherever it is
    read. ``forms``: how consumers (nodes of :attr:`Substitution.program`) compute, whatever form their weights have.
    """

    weights: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    forms: Mapping[fx.Node, Form] = field(default_factory=dict)


class Substitution(fx.Interpreter):
    """Runs a Program in eval mode, with weights and forms other than its own where it is told so.

    The float values of all compressed weight expressions are made once, here, and kept: as much memory as they would
    take in float. Gradients are a matter of whoever calls.
    """

    def __init__(self, program: Program) -> None:
        program = program.copy()
        program.eval()  # of a copy, as the mode is part of the graph
        super().__init__(program)
        self.program = program
        self.sites = {site.name: site for site in weight_sites(program)}
        self.values = {site.root: site.value() for site in self.sites.values() if site.root.op != "get_attr"}
        self._inside = {node for site in self.sites.values() for node in _expression(site)} - set(self.values)
        self._position = {node: number for number, node in enumerate(program.graph.nodes)}
        self._weights: dict[fx.Node, Tensor] = {}
        self._forms: Mapping[fx.Node, Form] = {}
        self._watch: Watch | None = None
        self._unquantized: dict[fx.Node, Tensor] = {}

    def results(
        self, inputs: tuple[Tensor, ...], change: Change = Change(), watch: Watch | None = None
    ) -> tuple[Any, ...]:
        """The flat results for flat inputs, with what ``change`` says. ``watch`` sees every linear and embedding."""
        self.args_iter, self._watch = iter(inputs), watch
        try:
            with self._changed(change):
                return self._from(0, {})
        finally:
            self._watch, self._unquantized = None, {}

    def each(self, inputs: tuple[Tensor, ...], changes: Sequence[Change]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """The flat results with each of ``changes``, one at a time and not together, with its number.

        They come in the order of the graph: what stands before the first thing that a change is about is computed once
        for all of them, so that one takes half a run or so.
        """
        due: dict[int, list[int]] = {}
        for number, change in enumerate(changes):
            due.setdefault(self._first(change), []).append(number)
        self.args_iter = iter(inputs)
        env: dict[fx.Node, Any] = {}
        try:
            for position, node in enumerate(self.program.graph.nodes):
                for number in due.pop(position, ()):
                    with self._changed(changes[number]):
                        yield (
                            number,
                            self._from(position, {**env, **{n: w for n, w in self._weights.items() if n in env}}),
                        )
                if not due:
                    return
                self._step(node, env)
        finally:
            self._unquantized = {}

    def _first(self, change: Change) -> int:
        """The position of the first node that a change is about."""
        nodes = [user for name in change.weights for user in self.sites[name].root.users]
        nodes += [node.args[0] if node.target is operator.getitem else node for node in change.forms]  # type: ignore[misc]
        return min((self._position[node] for node in nodes), default=0)

    @contextmanager
    def _changed(self, change: Change) -> Iterator[None]:
        self._weights = {self.sites[name].root: make() for name, make in change.weights.items()}
        self._forms = change.forms
        try:
            yield
        finally:
            self._weights, self._forms = {}, {}

    def _from(self, position: int, env: dict[fx.Node, Any]) -> tuple[Any, ...]:
        """The results, given the values that the nodes from a position on read of those before it."""
        nodes = list(self.program.graph.nodes)
        for node in nodes[position:]:
            self._step(node, env)
        flat: tuple[Any, ...] = env[nodes[-1]]
        return flat

    def _step(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        self.env = env
        env[node] = self.run_node(node)
        for unused in self.user_to_last_uses.get(node, ()):
            env.pop(unused, None)

    def run_node(self, n: fx.Node) -> Any:
        """See :class:`torch.fx.Interpreter`."""
        if n in self._weights:
            return self._weights[n]
        if n in self.values:
            return self.values[n]
        if n in self._inside:
            return None  # a step on the way to a weight, whose value is known
        if _quantizes(n):
            self._unquantized[n] = self.fetch_args_kwargs_from_env(n)[0][0]
        if n.target in PACKED_OPS:
            return self._packed(n)
        if n.target in (aten.linear.default, aten.embedding.default):
            return self._consumer(n)
        return super().run_node(n)

    def _consumer(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def result(form: Form) -> Tensor:
            if n.target is aten.embedding.default:
                return torch.nn.functional.embedding(args[1], form.weight)
            source: Any = n.args[0]
            input = self._unquantized[source] if _quantizes(source) else args[0]
            return form.linear(input, args[2] if len(args) > 2 else kwargs.get("bias"))

        value = result(self._forms[n]) if n in self._forms else super().run_node(n)
        if self._watch is not None:
            self._watch(n, value, result)
        return value

    def _packed(self, n: fx.Node) -> Any:
        several, uses = n.target is ops.packed_linears, uses_in(n)
        values: Any = None
        if any(use.consumer not in self._forms for use in uses):
            values = super().run_node(n)
        values = list(values or [None] * len(uses)) if several else [values]
        for number, use in enumerate(uses):
            operands = self.map_nodes_to_values(use.operands, n)

            def result(form: Form, use: PackedUse = use, operands: Any = operands) -> Tensor:
                if use.kind == "embedding":
                    taken = torch.nn.functional.embedding(operands["ids"], form.weight)
                    return taken.to(operands["dtype"] or operands["scale"].dtype)
                return form.linear(
                    operands["input"], operands["bias"], operands["activation"], operands.get("residual")
                )

            if use.consumer in self._forms:
                values[number] = result(self._forms[use.consumer])
            if self._watch is not None:
                self._watch(use.consumer, values[number], result)
        return values if several else values[0]


def _expression(site: WeightSite) -> list[fx.Node]:
    """The ops of a weight's expression."""
    found, node = [], site.root
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in PARTS:
        found.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return found
