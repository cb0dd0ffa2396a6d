"""Shapes of a whole Program without computing it: the graph is run on fake tensors whose dynamic axes are fresh
symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from prequant.runtime import PrequantError

from .base import PassError
from .printing import dtype_text, target_text
from .program import Input, Program

EXAMPLE_SIZES = (11, 13, 17, 19, 23, 29, 31, 37)
"""Sizes that stand for dynamic axes where the trace left none: all different, and unlikely to equal a model's own
sizes.
"""


@dataclass(frozen=True)
class Shapes:
    """``outputs``: the flat results as fake tensors; ``axes``: what each dynamic axis turned out to be, a symbol or
    expression; ``guards``: what has to hold of these for the shapes to be right, as expressions.
    """

    outputs: tuple[Any, ...]
    axes: dict[str, Any]
    guards: tuple[Any, ...] = ()

    def of_outputs(self) -> tuple[tuple[torch.dtype, tuple[int, ...]] | None, ...]:
        """Dtype and shape of every result at the example sizes; None for what is no tensor."""
        return tuple(
            (item.dtype, tuple(_example(size) for size in item.shape)) if isinstance(item, Tensor) else None
            for item in self.outputs
        )


def propagate_shapes(program: Program) -> Shapes:
    """Run the graph on fake tensors, made from the signature, and renew every node's ``meta["val"]``.

    Raises :class:`PassError` that names the node where an op refuses its operands, and :class:`PrequantError` where
    the graph allows only one size of an axis that the signature calls dynamic, or forces two such axes to be equal.
    """
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    symbols = _symbols(program, environment)
    device = next((value.device for value in chain(program.parameters(), program.buffers())), torch.device("cpu"))
    with mode, torch.no_grad():
        inputs = [
            torch.empty(tuple(symbols.get(size, size) for size in item.shape), dtype=item.dtype, device=device)
            for item in program.signature.inputs
        ]
        outputs = _Propagation(program, mode).run(*inputs)
    axes = {name: environment.simplify(symbol.node.expr) for name, symbol in symbols.items()}
    _check_axes(axes)
    guards = tuple(environment.simplify(guard.expr) for guard in environment.guards)
    return Shapes(tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,), axes, guards)


class _Propagation(fx.Interpreter):
    """Runs a graph on fake tensors, keeps each node's value in its ``meta``, and names the node that fails."""

    def __init__(self, program: Program, mode: FakeTensorMode) -> None:
        super().__init__(program)
        self.mode = mode
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            operands = ", ".join(_shape_text(node) for node in n.all_input_nodes)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PassError(f"{target_text(n)} does not take ({operands}): {reason}", node=n) from error
        n.meta["val"] = value
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


def _symbols(program: Program, environment: ShapeEnv) -> dict[Any, Any]:
    """One symbol for each dynamic axis of the signature, by name."""
    spare = chain(EXAMPLE_SIZES, repeat(41))
    symbols: dict[Any, Any] = {}
    placeholders = {str(node.target): node for node in program.graph.find_nodes(op="placeholder")}
    for item in program.signature.inputs:
        for axis, size in enumerate(item.shape):
            if isinstance(size, str) and size not in symbols:
                example = _traced_size(placeholders.get(item.name), item, axis) or next(spare)
                source = ConstantSource(f"axis_{size}")
                symbol = environment.create_symbol(
                    example, source=source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None
                )
                made = environment.create_symintnode(symbol, hint=example, source=source)
                assert isinstance(made, torch.SymInt)
                symbols[size] = made
    return symbols


def _traced_size(node: fx.Node | None, item: Input, axis: int) -> int | None:
    """The size that a dynamic axis had in the trace; it satisfies relations between axes that names can't tell."""
    value = node.meta.get("val") if node is not None else None
    if not isinstance(value, Tensor) or value.dim() != len(item.shape):
        return None
    size: Any = value.shape[axis]
    hint = size.node.hint if isinstance(size, torch.SymInt) else None
    return int(hint) if hint is not None and int(hint) > 1 else None


def _check_axes(axes: dict[str, Any]) -> None:
    seen: dict[Any, str] = {}
    for name, expression in axes.items():
        if expression.is_number:
            raise PrequantError(
                f"the axis {name!r} is dynamic in the signature, but the graph only takes the size {expression}"
            )
        if expression in seen:
            raise PrequantError(f"the graph only takes equal sizes of the axes {seen[expression]!r} and {name!r}")
        seen[expression] = name


def _example(size: int | torch.SymInt) -> int:
    """A size at the example sizes; -1 where it hangs on the data."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.hint is not None else -1


def _shape_text(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"%{node.name} {dtype_text(value.dtype)}{[str(size) for size in value.shape]}".replace("'", "")
    return f"%{node.name}"
