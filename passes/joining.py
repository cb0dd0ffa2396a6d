"""A chain of Programs as one: either with the modules as they are, one call each, or with their nodes in one graph."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from .base import PassError
from .cutting import computed_again
from .nesting import OutputTree
from .program import Input, Program, ProgramInfo, Signature

aten = torch.ops.aten


@dataclass(frozen=True)
class Origin:
    """What is known of the Program that was cut, without its tensors: all that one put together again needs.

    ``order``: of its nodes, by name. ``sizes``: the input and axis that each size is taken of, by the node's name.
    ``values``: of its inputs, as the graph has them in ``meta``.
    """

    written_class: type[Program]
    info: ProgramInfo
    meta: Mapping[str, Any]
    order: Mapping[str, int]
    sizes: Mapping[str, tuple[str, int]]
    values: Mapping[str, Any]

    @classmethod
    def of(cls, program: Program) -> Origin:
        """What is known of a Program."""
        sizes = {
            node.name: (str(source.target), int(axis))
            for node in program.graph.find_nodes(op="call_function", target=aten.sym_size.int)
            for source, axis in [node.args]
            if source.op == "placeholder"
        }
        return cls(
            program.written_class,
            program.info,
            dict(program.meta),
            {node.name: number for number, node in enumerate(program.graph.nodes)},
            sizes,
            {str(node.target): dict(node.meta) for node in program.graph.find_nodes(op="placeholder")},
        )

    @property
    def signature(self) -> Signature:
        """How it was called."""
        return self.info.signature

    def inputs(self, graph: fx.Graph) -> dict[str, fx.Node]:
        """Its inputs in a graph that has none yet, by name."""
        found = {}
        for name in self.signature.names:
            found[name] = graph.placeholder(name)
            found[name].meta = dict(self.values[name])
        return found


# ---- module by module ------------------------------------------------------------------------------------------------


def chained(modules: Sequence[Program], origin: Origin) -> Program:
    """A Program of the origin's class that calls the modules in turn; it is called like the origin."""
    graph = fx.Graph()
    values = origin.inputs(graph)
    for number, module in enumerate(modules):
        result = graph.call_module(f"module_{number}", tuple(values[name] for name in module.signature.names))
        if number < len(modules) - 1:
            values.update({name: graph.call_function(operator.getitem, (result, name)) for name in _named(module)})
    paths = dict(_paths(origin.signature.outputs))
    flat: list[Any] = [None] * (max(paths, default=-1) + 1)
    for index, path in paths.items():
        flat[index] = result
        for key in path:
            flat[index] = graph.call_function(operator.getitem, (flat[index], key))
    graph.output(tuple(flat))
    return origin.written_class({f"module_{n}": module for n, module in enumerate(modules)}, graph, origin.info)


def _named(module: Program) -> dict[str, int]:
    """Which result of a module is what the next one takes by that name."""
    return cast("dict[str, int]", module.signature.outputs)


def _paths(tree: OutputTree, path: tuple[Any, ...] = ()) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The place in a tree of every flat result."""
    if isinstance(tree, int):
        yield tree, path
    elif tree is not None:
        parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, part in parts:
            yield from _paths(part, (*path, key))


# ---- in one graph ----------------------------------------------------------------------------------------------------


def joined(modules: Sequence[Program], origin: Origin) -> Program:
    """One Program of the modules' nodes over their tensors, with the class and all else that the origin had.

    What several modules compute, each for itself, is computed once again. Raises :class:`PassError` for a tensor of
    several modules that they have in different forms, or with different values.
    """
    tensors = _tensors(modules)
    join = _Join(origin, modules[-1])
    for module in modules:
        join.add(module)
    infos = [origin.info, *(module.info for module in modules)]
    weights = {weight: names for info in infos for weight, names in info.aliases.items()}
    info = replace(
        origin.info,
        aliases={weight: names for weight, names in weights.items() if any(map(_below(weight), tensors))},
        constants=_once(name for info in infos for name in info.constants if name in tensors),
        transposed=_once(name for info in infos for name in info.transposed if any(map(_below(name), tensors))),
    )
    program = origin.written_class(tensors, join.graph, info)
    program.meta = {**origin.meta, "prequant": info}
    program.reports = (*program.reports, *(report for module in modules for report in module.reports))
    program.planned = all(module.planned for module in modules)
    program.train(all(module.training for module in modules))
    return program


def _once(names: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _below(weight: str) -> Any:
    """Whether a tensor is a weight, or what it is made of."""
    return lambda name: name == weight or name.startswith(f"{weight}.")


def _tensors(modules: Sequence[Program]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    owners: dict[str, int] = {}
    for number, module in enumerate(modules):
        for name in dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")):
            value = module.tensor(name)
            if not _same(found.setdefault(name, value), value):
                raise PassError(
                    f"the modules {owners[name]} and {number} have different values of {name!r}, which both read: "
                    "train it in none of them, or put the trained one into both (set_tensor)"
                )
            owners.setdefault(name, number)
            if value.requires_grad and not found[name].requires_grad:
                found[name] = value
    for name in found:
        path, _, _ = name.rpartition(".")
        while path:
            if path in found:
                raise PassError(
                    f"module {owners[path]} has {path!r}, and module {owners[name]} {name!r}: what both read can only "
                    "be joined in one form"
                )
            path, _, _ = path.rpartition(".")
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and bool(torch.equal(a, b))


@dataclass
class _Join:
    """Puts the nodes of one module after the other into one graph."""

    origin: Origin
    last: Program
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, fx.Node] = field(default_factory=dict)
    """Inputs of the modules that follow, by name."""
    names: dict[fx.Node, str] = field(default_factory=dict)
    """What nodes were called in their modules."""
    known: dict[Any, list[fx.Node]] = field(default_factory=dict)
    """What may be computed in several modules, by what it computes."""

    def __post_init__(self) -> None:
        self.values.update(self.origin.inputs(self.graph))

    def add(self, module: Program) -> None:
        """Put a module's nodes behind those that are there, apart from what is there already."""
        inputs = {item.name: item for item in module.signature.inputs}
        again, here = computed_again(module), dict[fx.Node, fx.Node]()
        for node in module.graph.nodes:
            if node.op == "placeholder":
                here[node] = self.values[str(node.target)]
            elif node.op == "output":
                self._results(module, fx.map_arg(node.args[0], here.__getitem__), node)
            else:
                self._node(node, here, inputs, node.op == "get_attr" or node in again)

    def _node(self, node: fx.Node, here: dict[fx.Node, fx.Node], inputs: Mapping[str, Input], again: bool) -> None:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), here.__getitem__)
        args = self._of_origin(node, inputs) or args
        key = (node.op, node.target, _key(args), _key(kwargs))
        there = [other for other in self.known.get(key, ()) if other not in here.values()] if again else []
        same = [other for other in there if self.names[other] == node.name]
        if not same and _is_stored(node):
            same = there  # a weight is made of its tensors once, whatever the node is called
        if same:
            here[node] = same[0]
            return
        made = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        made.meta, self.names[made] = dict(node.meta), node.name
        here[node] = made
        if again:
            self.known.setdefault(key, []).append(made)
            self._put_back(made)

    def _of_origin(self, node: fx.Node, inputs: Mapping[str, Input]) -> tuple[Any, ...] | None:
        """For a size of what a module is given: the input of the whole that has it, and its axis."""
        source = node.args[0] if node.target is aten.sym_size.int else None
        if not isinstance(source, fx.Node) or source.op != "placeholder":
            return None
        axis = inputs[str(source.target)].shape[node.args[1]]  # type: ignore[index]
        wholes = {item.name: item.shape for item in self.origin.signature.inputs}
        places = [(name, place) for name, shape in wholes.items() for place, other in enumerate(shape) if other == axis]
        if not isinstance(axis, str) or not places:
            return None
        usual = self.origin.sizes.get(node.name)
        name, place = usual if usual in places else places[0]
        return self.values[name], place

    def _put_back(self, made: fx.Node) -> None:
        """Move what was just made to where the origin had it, among what the first modules computed for themselves."""
        place = self.origin.order.get(self.names[made])
        if place is None:
            return
        after = [node for node in self.graph.nodes if self.origin.order.get(self.names.get(node, ""), -1) > place]
        if after and all(operand < after[0] for operand in made.all_input_nodes):
            after[0].prepend(made)

    def _results(self, module: Program, results: Any, output: fx.Node) -> None:
        if module is self.last:
            self.graph.output(results).meta = dict(output.meta)
        else:
            self.values.update({name: results[index] for name, index in _named(module).items()})


def _is_stored(node: fx.Node) -> bool:
    """Whether a node is a stored tensor, or hangs on no input."""
    seen, pending = {node}, [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand.op == "placeholder":
                return False
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return True


def _key(value: Any) -> Any:
    """Operands as something hashable: equal for the same nodes and numbers of one type."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(part)) for name, part in sorted(value.items()))
    if isinstance(value, slice):
        return (slice, _key(value.start), _key(value.stop), _key(value.step))
    return (type(value), value)
