"""What a plan is collected in, node by node: layouts of values, and units of work in the order of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from prequant.runtime import plan as runtime_plan
from prequant.runtime.native_layers import Layer

from ..program import Program
from .layout import Layout, Size, product, size_of


@dataclass(frozen=True)
class LayerRequest:
    """A layer of the native library: what makes it, of which tensors of the program by the maker's parameters, and with
    which other arguments.
    """

    make: Callable[..., Layer]
    tensors: dict[str, str]
    options: dict[str, Any]

    def __call__(self, tensor: Callable[[str], Tensor]) -> Layer:
        """The layer; ``tensor`` gives those of the program by name."""
        layer: Layer = self.ask(self.make, tensor)
        return layer

    def read(self, tensor: Callable[[str], Tensor]) -> list[Tensor]:
        """The tensors that the layer is made of."""
        return [tensor(target) for target in self.tensors.values()]

    def ask(self, function: Callable[..., Any], tensor: Callable[[str], Tensor]) -> Any:
        """The result of another function of these arguments."""
        return function(**{name: tensor(target) for name, target in self.tensors.items()}, **self.options)


@dataclass
class Step:
    """A native step; see ``prequant_step``. Operands in the order that the kind has them. ``layers``: an
    embedding's, or those of linears on one input. ``ids`` are those of an embedding, and how many rows it has.
    """

    kind: int
    operands: tuple[Layout | None, ...]
    sizes: tuple[Size, ...]
    option: int = 0
    number: float = 0.0
    layers: tuple[LayerRequest, ...] = ()
    ids: tuple[Layout, int] | None = None


@dataclass
class Call:
    """A call of PyTorch, with layouts and sizes in its arguments."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int, ...]
    reason: str


@dataclass
class Unit:
    """One step or call, with the buffers that it reads and writes."""

    work: Step | Call
    node: fx.Node
    reads: frozenset[int]
    writes: frozenset[int]


@dataclass
class BufferInfo:
    """A buffer: its type, how many elements it has, and whether the plan has to find memory for it."""

    dtype: torch.dtype
    elements: Size
    own: bool


@dataclass
class Builder:
    """See the module's docstring. ``values`` holds a layout for a tensor, a list of them for several, a size or another
    constant for what is none.
    """

    program: Program
    buffers: list[BufferInfo] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    constants: dict[int, str] = field(default_factory=dict)
    """Names of the program's tensors, by the buffers that they are."""
    needed: list[Size] = field(default_factory=list)
    """What may not be negative, or views would lie outside of their tensors: PyTorch cuts slices off there."""
    node: fx.Node | None = None
    """The one that is being taken."""

    # ---- buffers -----------------------------------------------------------------------------------------------------

    def buffer(self, dtype: torch.dtype, sizes: Sequence[Size], own: bool = True) -> Layout:
        """A new buffer, as the contiguous tensor that fills it."""
        self.buffers.append(BufferInfo(dtype, product(sizes), own))
        return Layout.contiguous(len(self.buffers) - 1, dtype, sizes)

    def constant(self, name: str) -> Layout:
        """A tensor of the program."""
        tensor = self.program.tensor(name)
        layout = self.buffer(tensor.dtype, tuple(tensor.shape), own=False)
        self.constants[layout.buffer] = name
        return layout

    # ---- values ------------------------------------------------------------------------------------------------------

    def value(self, argument: Any) -> Any:
        """What a node's argument stands for: nodes by their values, all else as it is."""
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def floats(self, argument: Any) -> Layout | None:
        """The layout of a float32 tensor; None for anything else."""
        value = self.value(argument)
        return value if isinstance(value, Layout) and value.dtype is torch.float32 else None

    def names(self, **arguments: Any) -> dict[str, str]:
        """The names of the program's tensors that nodes read, without those that are None.

        Raises ``TypeError`` for a tensor that is computed.
        """
        given = {name: node for name, node in arguments.items() if node is not None}
        for node in given.values():
            if not (isinstance(node, fx.Node) and node.op == "get_attr"):
                raise TypeError(f"its operand {node} is computed")
        return {name: str(node.target) for name, node in given.items()}

    # ---- work --------------------------------------------------------------------------------------------------------

    def step(self, step: Step, writes: Sequence[Layout]) -> None:
        """Add a native step that writes ``writes``."""
        assert self.node is not None
        written = frozenset(layout.buffer for layout in writes)
        read = {layout.buffer for layout in step.operands if layout is not None} - written
        self.units.append(Unit(step, self.node, frozenset(read), written))

    def call(self, call: Call) -> None:
        """Add a call of PyTorch."""
        assert self.node is not None
        read = {layout.buffer for layout in _layouts((call.args, call.kwargs))}
        written = frozenset(buffer for buffer in call.results if buffer != runtime_plan.ABSENT)
        self.units.append(Unit(call, self.node, frozenset(read), written))

    def copied(self, layout: Layout) -> Layout:
        """The same values one after the other. Raises ``ValueError`` for more axes than a step has."""
        out = self.buffer(layout.dtype, layout.sizes)
        self.copy(layout, out)
        return out

    def copy(self, source: Layout, out: Layout) -> None:
        """Write ``source`` where ``out`` lies; both have the same sizes."""
        sizes, (source, out) = four_axes(source, out)
        width = source.dtype.itemsize
        if width not in (1, 2, 4, 8):
            raise ValueError(f"elements of {width} bytes")
        self.step(Step(runtime_plan.COPY, (source, out), (*sizes, width)), [out])

    def need(self, *sizes: Size) -> None:
        """The plan is for calls only where none of these is negative."""
        self.needed += [size for size in sizes if not (isinstance(size, int) and size >= 0)]

    def contiguous(self, layout: Layout) -> Layout:
        """The layout, or a copy where elements don't follow each other in order."""
        return layout if layout.is_contiguous else self.copied(layout)


def four_axes(*layouts: Layout) -> tuple[tuple[Size, ...], tuple[Layout, ...]]:
    """Layouts of the same sizes with four axes: more of one element come before the first.

    Raises ``ValueError`` for layouts of more than four.
    """
    rank = len(layouts[0].sizes)
    if rank > runtime_plan.AXES:
        raise ValueError(f"{rank} axes")
    padded = []
    for layout in layouts:
        for _ in range(runtime_plan.AXES - rank):
            layout = layout.with_axis(0)
        padded.append(layout)
    return padded[0].sizes, tuple(padded)


def sizes_of(value: Any) -> tuple[Size, ...]:
    """The sizes of a fake tensor."""
    return tuple(size_of(size) for size in value.shape)


def _layouts(value: Any) -> list[Layout]:
    if isinstance(value, Layout):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [layout for item in value for layout in _layouts(item)]
