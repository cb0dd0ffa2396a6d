"""From the graph of a lowered Program to a plan (``prequant.runtime.plan``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx

from prequant.runtime import PrequantError, native_layers
from prequant.runtime import plan as runtime_plan
from prequant.runtime.memory import MappedFiles

from ..compose_ops import ComposeOps
from ..functional import writes
from ..fuse_epilogue import FuseEpilogue
from ..fuse_parallel_linears import FuseParallelLinears
from ..packed import operands_of
from ..program import Program
from ..shapes import propagate_shapes
from .builder import Builder, Call, LayerRequest, Step, Unit, sizes_of
from .layout import Layout, Size, product, size_of
from .numbers import NumberTable
from .steps import take_step
from .views import COPIES, VIEWS, take_view

aten = torch.ops.aten


class NoPlan(PrequantError):
    """A graph that no plan can be made of."""


@dataclass(frozen=True)
class Coverage:
    """What a plan runs how: names of the nodes that are native steps, those that are calls of PyTorch with the reason.
    Nodes that only look at a tensor in another way are in neither.
    """

    native: tuple[str, ...]
    torch: tuple[tuple[str, str], ...]


def compile_plan(program: Program) -> runtime_plan.Plan:
    """A plan that computes what ``program`` does in eval mode, on the CPU, without gradients.

    Raises :class:`NoPlan` for a graph that writes into its tensors, and for sizes that hang on data.
    """
    return draft_plan(program).finish(program.tensor)


def draft_plan(program: Program) -> Draft:
    """All of a plan but its weights: these are packed with :meth:`Draft.finish`. Raises :class:`NoPlan`."""
    program = _simplified(program)
    if writes(program.graph):
        raise NoPlan("the graph writes into tensors")
    try:
        shapes = propagate_shapes(program)
    except PrequantError as error:
        raise NoPlan(f"its shapes are not known: {error}") from error
    builder = Builder(program)
    inputs = [_take(builder, node) for node in program.graph.nodes]
    input_buffers = tuple(layout.buffer for layout in inputs if layout is not None)
    outputs, new = _outputs(builder)
    names = tuple(dict.fromkeys(str(node.target) for node in program.graph.find_nodes(op="get_attr")))
    symbols = _symbols(program, shapes.axes)
    holds = _conditions(builder.needed, shapes.guards, list(symbols))
    return _drafted(builder, input_buffers, outputs, new, symbols, names, holds)


def _simplified(program: Program) -> Program:
    """A copy without dropout, so that what stands around it can be fused."""
    program = program.copy()
    for node in program.graph.find_nodes(op="call_function", target=aten.dropout.default):
        operands = operands_of(node)
        if not operands["train"]:
            node.replace_all_uses_with(operands["input"])
            program.graph.erase_node(node)
    for fusion in (ComposeOps(), FuseEpilogue(), FuseParallelLinears()):
        fusion.run(program)
    program.graph.eliminate_dead_code()
    return program


def _take(builder: Builder, node: fx.Node) -> Layout | None:
    """Add a node; returns the layout of an input."""
    builder.node = node
    value: Any = node.meta.get("val")
    if node.op == "placeholder":
        builder.values[node] = layout = builder.buffer(value.dtype, sizes_of(value), own=False)
        return layout
    if node.op == "get_attr":
        if not isinstance(value, Tensor):
            raise NoPlan(f"the graph reads {node.target}, which is no tensor")
        builder.values[node] = builder.constant(str(node.target))
    elif node.op == "call_function":
        if isinstance(value, (bool, int, float)):
            builder.values[node] = value
        elif isinstance(value, torch.SymInt):
            builder.values[node] = size_of(value)
        elif not take_view(builder, node):
            reason = take_step(builder, node)
            if reason:
                _call(builder, node, reason)
    elif node.op != "output":
        raise NoPlan(f"the graph has a node {node.op} ({node.name})")
    return None


def _call(builder: Builder, node: fx.Node, reason: str) -> None:
    value = node.meta["val"]
    several = isinstance(value, (tuple, list))
    layouts = [
        builder.buffer(item.dtype, sizes_of(item), own=False) if isinstance(item, Tensor) else None
        for item in (value if several else [value])
    ]
    if not all(isinstance(item, (Tensor, type(None))) for item in (value if several else [value])):
        raise NoPlan(f"{node.name} computes {type(value).__name__}, which is no tensor, from data")
    args, kwargs = fx.map_arg((node.args, node.kwargs), builder.value)
    results = tuple(layout.buffer if layout is not None else runtime_plan.ABSENT for layout in layouts)
    builder.call(Call(node.target, tuple(args), dict(kwargs), results, reason))
    builder.values[node] = layouts if several else layouts[0]


def _outputs(builder: Builder) -> tuple[tuple[Any, ...], dict[int, Layout]]:
    """The results, and the buffers among them that a call makes anew."""
    (results,) = builder.program.graph.output_node().args
    new: dict[int, Layout] = {}
    values = []
    for result in results if isinstance(results, (tuple, list)) else (results,):
        value = builder.value(result)
        if isinstance(value, Layout) and _is_copy(result) and (value.buffer in new or not _is_own(builder, value)):
            value = builder.copied(value)
        if isinstance(value, Layout) and _is_own(builder, value):
            whole = value.is_contiguous and product(value.sizes) == builder.buffers[value.buffer].elements
            if value.buffer not in new and not whole:
                value = builder.copied(value)
            new.setdefault(value.buffer, Layout.contiguous(value.buffer, value.dtype, value.sizes))
        elif not isinstance(value, (Layout, int, float, bool, type(None), sympy.Expr)):
            raise NoPlan(f"a result is a {type(value).__name__}")
        values.append(value)
    for buffer in new:
        builder.buffers[buffer].own = False
    return tuple(values), new


def _is_own(builder: Builder, layout: Layout) -> bool:
    return builder.buffers[layout.buffer].own


def _is_copy(node: Any) -> bool:
    """Whether the graph copies a result: a caller may write into it, and nothing else changes."""
    while isinstance(node, fx.Node) and node.target in VIEWS:
        operands = operands_of(node)
        if node.target in COPIES or operands.get("copy"):
            return True
        node = operands["self" if "self" in operands else "input"]
    return False


def _symbols(program: Program, axes: dict[str, Any]) -> dict[sympy.Symbol, tuple[int, int]]:
    """Where the size of each dynamic axis is found: input and axis."""
    places: dict[sympy.Symbol, tuple[int, int]] = {}
    for number, item in enumerate(program.signature.inputs):
        for axis, size in enumerate(item.shape):
            if isinstance(size, str) and isinstance(axes[size], sympy.Symbol):
                places.setdefault(axes[size], (number, axis))
    return places


def _conditions(
    needed: Sequence[Size], guards: Sequence[sympy.Basic], symbols: list[sympy.Symbol]
) -> Callable[..., bool]:
    """Whether a plan is for these sizes of the dynamic axes: outside of these, the graph's shapes are others."""
    sizes, relations = NumberTable(), NumberTable()
    for size in needed:
        sizes(size_of(sympy.expand(size)))
    for guard in guards:
        if guard is not sympy.true:
            relations(guard)
    of_sizes, of_relations = _function(sizes, symbols), _function(relations, symbols)
    return lambda *values: min(of_sizes(*values), default=0) >= 0 and all(of_relations(*values))


# ---- the order of work -----------------------------------------------------------------------------------------------


def needed(units: Sequence[Unit], outputs: Sequence[Any]) -> list[Unit]:
    """Units without the steps whose results nothing reads, as attention that takes codes leaves some."""
    read = {output.buffer for output in outputs if isinstance(output, Layout)}
    kept = []
    for unit in reversed(units):
        if not isinstance(unit.work, Step) or not read.isdisjoint(unit.writes):
            kept.append(unit)
            read |= unit.reads
    return kept[::-1]


def ordered(units: Sequence[Unit]) -> list[Unit]:
    """Units in an order that keeps calls of PyTorch together, and steps: each kind goes on for as long as it can."""
    writers: dict[int, set[int]] = {}  # a concatenation has several
    for number, unit in enumerate(units):
        for buffer in unit.writes:
            writers.setdefault(buffer, set()).add(number)
    waiting = [set[int]().union(*(writers.get(buffer, set()) for buffer in unit.reads)) for unit in units]
    left, done, result = list(range(len(units))), set[int](), list[Unit]()
    native = False
    while left:
        taken = True
        while taken:
            taken = False
            for number in list(left):
                if isinstance(units[number].work, Step) is native and waiting[number] <= done:
                    left.remove(number)
                    done.add(number)
                    result.append(units[number])
                    taken = True
        native = not native
    return result


# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draft:
    """A plan without what its weights decide. ``layers`` are those of its steps, by number; ``names`` are all tensors
    that the plan reads, ``constants`` those that steps read as they are, by buffer. ``holds`` says for which sizes of
    the dynamic axes the plan is.
    """

    plan: runtime_plan.Plan
    coverage: Coverage
    layers: dict[int, tuple[LayerRequest, ...]]
    constants: dict[int, str]
    names: tuple[str, ...]
    holds: Callable[..., bool]

    def finish(self, tensor: Callable[[str], Tensor]) -> runtime_plan.Plan:
        """The plan with weights packed for the kernels; ``tensor`` gives those of :attr:`names`."""
        template = self.plan.template.copy()
        kept, files = [], MappedFiles()
        for row, requests in self.layers.items():
            made = []
            for request in requests:
                made.append(request(tensor))
                files.give_back(request.read(tensor))  # one by one, so that never all codes are there twice
            linears = template[row, 0] == runtime_plan.LINEAR
            kept.append(native_layers.together(made) if linears else made[0])
            template[row, runtime_plan.LAYER_WORD] = kept[-1].address
        constants = {buffer: tensor(name).detach().contiguous() for buffer, name in self.constants.items()}
        return replace(self.plan, template=template, constants=constants, kept=tuple(kept))


def _drafted(
    builder: Builder,
    inputs: tuple[int, ...],
    outputs: tuple[Any, ...],
    new: dict[int, Layout],
    symbols: dict[sympy.Symbol, tuple[int, int]],
    names: tuple[str, ...],
    holds: Callable[..., bool],
) -> Draft:
    units = ordered(needed(builder.units, outputs))
    table = NumberTable()
    steps = [(unit.node.name, unit.work) for unit in units if isinstance(unit.work, Step)]
    template = np.zeros((len(steps), runtime_plan.STEP_WORDS), dtype=np.int64)
    filled = []
    for row, (_, step) in enumerate(steps):
        template[row], entries = _words(step, table)
        filled += [(row * runtime_plan.STEP_WORDS + place, entry) for place, entry in entries]
    places = np.array(filled, dtype=np.int64).reshape(-1, 2)
    plan = runtime_plan.Plan(
        axes=tuple(symbols.values()),
        template=template,
        places=places[:, 0],
        sources=places[:, 1],
        buffers=_buffers(builder, units, table),
        inputs=inputs,
        constants={},
        new={buffer: _view(layout, table) for buffer, layout in new.items()},
        order=_order(units, table, fixed_calls(units, builder.constants, outputs)),
        outputs=tuple(_argument(output, table) for output in outputs),
        names=tuple(name for name, _ in steps),
        ids={
            row: (_view(step.ids[0], table), step.ids[1]) for row, (_, step) in enumerate(steps) if step.ids is not None
        },
        numbers=_function(table, list(symbols)),
    )
    calls = tuple((unit.node.name, unit.work.reason) for unit in units if isinstance(unit.work, Call))
    layers = {row: step.layers for row, (_, step) in enumerate(steps) if step.layers}
    used = {buffer: name for buffer, name in builder.constants.items() if _is_read(buffer, units, outputs)}
    return Draft(plan, Coverage(tuple(dict.fromkeys(plan.names)), calls), layers, used, names, holds)


def _function(table: NumberTable, symbols: list[sympy.Symbol]) -> Any:
    try:
        return table.function(symbols)
    except ValueError as error:
        raise NoPlan(str(error)) from error


def _is_read(buffer: int, units: Sequence[Unit], outputs: tuple[Any, ...]) -> bool:
    results = (output.buffer for output in outputs if isinstance(output, Layout))
    return buffer in results or any(buffer in unit.reads for unit in units)


def _words(step: Step, table: NumberTable) -> tuple[list[int], list[tuple[int, int]]]:
    """A step's words, and the places in it that are filled from entries of the table."""
    number = int(np.float64(step.number).view(np.int64))
    sizes: list[Size] = [*step.sizes, *[0] * (runtime_plan.SIZES - len(step.sizes))]
    values: list[Size] = [step.kind, step.option, number, 0, *sizes]
    for layout in (*step.operands, *[None] * (runtime_plan.OPERANDS - len(step.operands))):
        if layout is None:
            values += [runtime_plan.ABSENT, *[0] * (1 + runtime_plan.AXES)]
        else:
            strides = [*layout.strides, *[0] * runtime_plan.AXES][: runtime_plan.AXES]
            values += [layout.buffer, size_of(sympy.expand(layout.offset * layout.dtype.itemsize)), *strides]
    words = [value if isinstance(value, int) else 0 for value in values]
    return words, [(place, table(value)) for place, value in enumerate(values) if not isinstance(value, int)]


def _buffers(builder: Builder, units: Sequence[Unit], table: NumberTable) -> tuple[runtime_plan.Buffer, ...]:
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, unit in enumerate(units):
        for buffer in unit.reads | unit.writes:
            first.setdefault(buffer, number)
            last[buffer] = number
    return tuple(
        runtime_plan.Buffer(
            info.dtype,
            table(product((info.elements, info.dtype.itemsize))),
            first.get(number, -1),
            last.get(number, -1),
            info.own and number in first,
        )
        for number, info in enumerate(builder.buffers)
    )


def _order(
    units: Sequence[Unit], table: NumberTable, fixed: frozenset[str]
) -> tuple[runtime_plan.Native | runtime_plan.TorchCall, ...]:
    order: list[runtime_plan.Native | runtime_plan.TorchCall] = []
    done = 0
    for unit in units:
        if isinstance(unit.work, Call):
            call, name = unit.work, unit.node.name
            args = tuple(_argument(argument, table) for argument in call.args)
            kwargs = {key: _argument(argument, table) for key, argument in call.kwargs.items()}
            order.append(runtime_plan.TorchCall(call.target, args, kwargs, call.results, name, name in fixed))
            continue
        if order and isinstance(order[-1], runtime_plan.Native):
            order[-1] = runtime_plan.Native(order[-1].first, order[-1].count + 1)
        else:
            order.append(runtime_plan.Native(done, 1))
        done += 1
    return tuple(order)


def fixed_calls(units: Sequence[Unit], constants: Iterable[int], outputs: Iterable[Any]) -> frozenset[str]:
    """The nodes of PyTorch's calls whose results sizes alone decide, and that are no results of the plan."""
    known = set(constants)
    results = {output.buffer for output in outputs if isinstance(output, Layout)}
    names = set()
    for unit in units:
        if not isinstance(unit.work, Call) or not unit.reads <= known or unit.writes & results or not unit.writes:
            continue
        tags = getattr(unit.work.target, "tags", (torch.Tag.nondeterministic_seeded,))
        if torch.Tag.nondeterministic_seeded not in tags:
            known |= unit.writes
            names.add(unit.node.name)
    return frozenset(names)


def _argument(value: Any, table: NumberTable) -> Any:
    if isinstance(value, Layout):
        return _view(value, table)
    if isinstance(value, sympy.Expr):
        return runtime_plan.Number(table(size_of(value)))
    if isinstance(value, (list, tuple)):
        return type(value)(_argument(item, table) for item in value)
    return value


def _view(layout: Layout, table: NumberTable) -> runtime_plan.View:
    def entries(sizes: Iterable[Size]) -> tuple[int, ...]:
        return tuple(table(size) for size in sizes)

    return runtime_plan.View(
        layout.buffer, layout.dtype, entries(layout.sizes), entries(layout.strides), table(layout.offset)
    )
