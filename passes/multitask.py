"""multitask: several Programs over shared tensors as one, which takes a batch for each of them in one call.

    linear(x0, w, scale0), linear(x1, w, scale1)
        ->  x = cat(x0, x1);  parts = split(x);  cat(linear(parts[0], w, scale0), linear(parts[1], w, scale1))

Tasks that were tuned on one compressed model differ in some tensors (scales, outlier values, norms), and perhaps in
their last layers. What is the same for all is computed once, on the rows of all; what is not, on the rows of each.
Products with weights are always computed task by task: how a library multiplies depends on the number of rows, and so
do the last bits of what comes out. All else treats rows alike, so that every task gets what its own Program gives.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from prequant.runtime import PrequantError, ops

from .hide_outputs import hide
from .nesting import OutputTree
from .program import Input, Program, ProgramInfo, Signature
from .shapes import propagate_shapes

aten = torch.ops.aten

MATRIX_PRODUCTS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.mv.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.bilinear.default,
    aten.einsum.default,
    ops.packed_linear,
    ops.packed_linears,
)
INDEXING = (aten.index.Tensor, aten.index_select.default, aten.gather.default)
NUMBERING = (aten.arange.default, aten.arange.start, aten.arange.start_step)
"""What numbers rows where it counts as many as there are."""
KEPT_META = ("module_stack", "stack_trace")


def multitask(programs: Sequence[Program]) -> Program:
    """The Program with the inputs ``<name>_<i>`` for each input of program i, program by program, and with a tuple of
    each one's flat results.

    Every input is ``[rows, ...]``; its first axis is named ``rows_<i>`` for all inputs of program i, other dynamic axes
    keep their names, so that they have one size for all. Exposed values are left out. The result is in eval mode, and
    planned where all programs are; it shares every tensor. Raises :class:`PrequantError` for no program, and for one
    whose inputs are not all ``[rows, ...]``.
    """
    if not programs:
        raise PrequantError("no program to put together")
    evaluated = [program.copy().train(False) for program in programs]
    for program in evaluated:
        hide(program)
    tasks = [_Task(index, program) for index, program in enumerate(evaluated)]
    merged = _Merge(tasks).program()
    merged.planned = all(program.planned for program in programs)
    return merged


class _Task:
    """One of the programs: what its values are made of."""

    def __init__(self, index: int, program: Program) -> None:
        self.index, self.program = index, program
        names = {item.shape[0] if item.shape else None for item in program.signature.inputs}
        if len(names) != 1 or not isinstance(name := names.pop(), str):
            raise PrequantError(
                f"the inputs of program {index} don't begin with one dynamic axis of rows: "
                + ", ".join(f"{item.name}{list(item.shape)}" for item in program.signature.inputs)
            )
        self.rows = propagate_shapes(program).axes[name]
        self.hanging: set[fx.Node] = set()
        """Values that hang on the rows of this task, or on how many they are."""
        self.own: set[fx.Node] = set()
        """Values that rows of other tasks would change: what has no axis of rows any more, and what numbers them."""
        for node in program.graph.nodes:
            self._judge(node)

    def _judge(self, node: fx.Node) -> None:
        value, operands = node.meta.get("val"), node.all_input_nodes
        if not isinstance(value, (Tensor, list, tuple)) and node.op == "call_function":
            if self._hangs(value):
                self.hanging.add(node)
            elif node.target is not aten.sym_size.int and not self.hanging.isdisjoint(operands):
                self.hanging.add(node)
                self.own.add(node)
            return
        if node.op == "placeholder" or not self.hanging.isdisjoint(operands):
            self.hanging.add(node)
            numbers = node.target in NUMBERING or not self.own.isdisjoint(operands)
            if not self._has_rows(value) or (numbers and node.target not in INDEXING):
                self.own.add(node)

    def _hangs(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and self.rows in size.node.expr.free_symbols

    def _has_rows(self, value: Any) -> bool:
        values = value if isinstance(value, (list, tuple)) else [value]
        return all(isinstance(each, Tensor) and any(map(self._hangs, each.shape)) for each in values)

    def begins_with_rows(self, node: fx.Node) -> bool:
        """Whether a value's first axis is the rows, and nothing else of it is."""
        value = node.meta.get("val")
        if node in self.own or not (isinstance(value, Tensor) and value.dim()):
            return False
        first: Any = value.shape[0]
        alone = isinstance(first, torch.SymInt) and first.node.expr == self.rows
        return alone and not any(map(self._hangs, value.shape[1:]))


@dataclass
class _Value:
    """A value of some tasks: computed once for all rows (``whole``), or for the rows of each (``parts``), or both."""

    members: dict[int, fx.Node] = field(default_factory=dict)
    """The node that computes it in each task's graph."""
    operands: tuple[int, ...] = ()
    """Places of the values that it is computed of."""
    whole: fx.Node | None = None
    parts: dict[int, fx.Node] = field(default_factory=dict)


class _Merge:
    """Finds what the tasks have in common, and writes one graph."""

    def __init__(self, tasks: list[_Task]) -> None:
        self.tasks = tasks
        self.values: list[_Value] = []
        self.places: list[dict[fx.Node, int]] = [{} for _ in tasks]
        self.graph = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.counts: list[fx.Node] = []
        self.reads: dict[str, fx.Node] = {}
        known: dict[Any, int] = {}
        for task in tasks:
            for node in task.program.graph.nodes:
                if node.op != "output":
                    self._find(task, node, known)

    # ---- what is the same --------------------------------------------------------------------------------------------

    def _find(self, task: _Task, node: fx.Node, known: dict[Any, int]) -> None:
        places = self.places[task.index]
        key = (node.op, node.target, _key(node.args, places), _key(node.kwargs, places))
        place = known.setdefault(key, len(self.values))
        if place == len(self.values):
            self.values.append(_Value(operands=tuple(places[operand] for operand in node.all_input_nodes)))
        self.values[place].members.setdefault(task.index, node)
        places[node] = place

    def _is_common(self, value: _Value) -> bool:
        """Whether one computation serves all tasks."""
        if len(value.members) < len(self.tasks):
            return False
        for index, node in value.members.items():
            task = self.tasks[index]
            if node in task.own or not task.own.isdisjoint(node.all_input_nodes):
                return False
            if node.target in MATRIX_PRODUCTS and not task.hanging.issuperset(node.all_input_nodes):
                return False
        if next(iter(value.members.values())).op == "get_attr":
            first, *others = (self.tasks[i].program.tensor(str(node.target)) for i, node in value.members.items())
            return all(_is_same(first, other) for other in others)
        return all(self._can_be_whole(self.values[place]) for place in value.operands)

    def _can_be_whole(self, value: _Value) -> bool:
        if value.whole is not None:
            return True
        if len(value.members) < len(self.tasks):
            return False
        if not all(self.tasks[i].begins_with_rows(node) for i, node in value.members.items()):
            return False
        return len({_form(node.meta["val"]) for node in value.members.values()}) == 1

    # ---- writing the graph -------------------------------------------------------------------------------------------

    def program(self) -> Program:
        """The merged Program."""
        inputs = self._inputs()
        for value in self.values:
            if next(iter(value.members.values())).op != "placeholder":
                self._compute(value)
        results: list[Any] = []
        trees: list[OutputTree] = []
        for task in self.tasks:
            flat: Any = task.program.graph.output_node().args[0]
            trees.append(tuple(range(len(results), len(results) + len(flat))))
            places = self.places[task.index]
            results += [
                self._part(self.values[places[node]], task.index) if isinstance(node, fx.Node) else node
                for node in flat
            ]
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        read = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in read}
        info = ProgramInfo(Signature(tuple(inputs), tuple(trees)))
        return Program(tensors, self.graph, info).train(False)

    def _inputs(self) -> list[Input]:
        inputs: list[Input] = []
        for task in self.tasks:
            nodes = task.program.graph.find_nodes(op="placeholder")
            for item, node in zip(task.program.signature.inputs, nodes, strict=True):
                shape = (f"rows_{task.index}", *item.shape[1:])
                inputs.append(replace(item, name=f"{item.name}_{task.index}", shape=shape))
                value = self.values[self.places[task.index][node]]
                value.parts[task.index] = self.graph.placeholder(inputs[-1].name)
        for index in range(len(self.tasks)):
            any_input = next(value.parts[index] for value in self.values if index in value.parts)
            self.counts.append(self.graph.call_function(aten.sym_size.int, (any_input, 0)))
        return inputs

    def _compute(self, value: _Value) -> None:
        if self._is_common(value):
            node = next(iter(value.members.values()))
            value.whole = self._written(node, next(iter(value.members)), self._whole)
            return
        for index, node in value.members.items():
            value.parts[index] = self._written(node, index, lambda operand, index=index: self._part(operand, index))

    def _written(self, node: fx.Node, index: int, operand: Any) -> fx.Node:
        """The node in the merged graph; ``operand`` gives what stands for each of its operands there."""
        if node.op == "get_attr":
            return self._tensor(node, index)
        places = self.places[index]

        def mapped(each: fx.Node) -> fx.Node:
            written: fx.Node = operand(self.values[places[each]])
            return written

        made = self.graph.create_node(
            node.op, node.target, fx.map_arg(node.args, mapped), fx.map_arg(node.kwargs, mapped)
        )
        made.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        return made

    def _tensor(self, node: fx.Node, index: int) -> fx.Node:
        tensor, name = self.tasks[index].program.tensor(str(node.target)), str(node.target)
        if name in self.tensors and not _is_same(self.tensors[name], tensor):
            name = f"task_{index}.{name}"
        if name not in self.reads:
            self.tensors[name] = tensor
            self.reads[name] = self.graph.create_node("get_attr", name)
        return self.reads[name]

    def _whole(self, value: _Value) -> fx.Node:
        """A value for the rows of all tasks."""
        if value.whole is None:
            parts = [value.parts[task.index] for task in self.tasks]
            value.whole = self.graph.call_function(aten.cat.default, (parts,))
        return value.whole

    def _part(self, value: _Value, index: int) -> fx.Node:
        """A value for the rows of one task."""
        if index not in value.parts:
            task, node = self.tasks[index], value.members[index]
            assert value.whole is not None
            if node not in task.hanging:
                return value.whole
            if task.begins_with_rows(node):
                split = self.graph.call_function(aten.split_with_sizes.default, (value.whole, list(self.counts)))
                value.parts = {
                    task.index: self.graph.call_function(operator.getitem, (split, task.index)) for task in self.tasks
                }
            else:  # rows beside other things on an axis: a view, as a rule
                value.parts[index] = self._written(node, index, lambda operand: self._part(operand, index))
        return value.parts[index]


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, seen in the same way."""
    first, second = ((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in (a, b))
    return a is b or (first == second and a.numel() > 0)


def _form(value: Tensor) -> tuple[Any, ...]:
    """What values have to have in common to be rows of one: their type, and fixed sizes."""
    return value.dtype, *(size if isinstance(size, int) else None for size in value.shape)


def _key(value: Any, places: dict[fx.Node, int]) -> Any:
    """Equal for arguments of nodes that are the same but for the graph they stand in."""
    if isinstance(value, fx.Node):
        return fx.Node, places[value]
    if isinstance(value, (list, tuple)):
        return tuple, tuple(_key(item, places) for item in value)
    if isinstance(value, dict):
        return dict, tuple((name, _key(item, places)) for name, item in sorted(value.items()))
    if isinstance(value, slice):
        return slice, _key((value.start, value.stop, value.step), places)
    return type(value), value
