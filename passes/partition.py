"""partition: a Program as a chain of Programs, cut between blocks, and the chain as one Program again.

Every module is a plain Program over the tensors of its part, so that passes, training and plans work on it as on any
other, and a process that holds one holds no more. What a module takes of those before it is an input of its own, and a
result of each module on the way. This is little: the value between two blocks (``hidden_states``), and by its node's
name what else was computed with parameters: T5's position bias, or what its decoder reads of its encoder. What hangs on
the model's own inputs without parameters (masks, rotary tables) is computed again by each module that reads it, which
takes these inputs as well: token ids and a mask are small, and mean the same for every module, whoever trains it. Sizes
are taken of whatever a module is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, TypeAlias

from torch import fx

from .balance import best_cuts
from .base import PassError
from .blocks import Stack, find_stacks, numbered
from .cutting import Parts
from .joining import Origin, chained, joined
from .multiply_adds import multiply_adds
from .options import near_misses
from .program import Input, Program
from .shapes import Shapes, propagate_shapes

Balance: TypeAlias = Literal["parameters", "flops"]
BALANCES = ("parameters", "flops")


@dataclass(frozen=True)
class Cut:
    """Where two modules part. ``border``: the node whose value is ``hidden_states``. ``blocks``: how many are before.
    ``crossing``: what the later module takes of the earlier one.
    """

    border: str
    blocks: int
    crossing: tuple[Input, ...]


@dataclass(frozen=True)
class Partitioned:
    """A chain of modules, with what it takes to make one Program of it. ``costs``: of each module, as it was cut."""

    modules: tuple[Program, ...] = field(repr=False)
    cuts: tuple[Cut, ...]
    costs: tuple[float, ...]
    origin: Origin = field(repr=False)

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """Tensors that several modules read (tied weights, constants), with the numbers of these modules."""
        readers: dict[str, tuple[int, ...]] = {}
        for number, module in enumerate(self.modules):
            for name in dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr")):
                readers[name] = (*readers.get(name, ()), number)
        return {name: numbers for name, numbers in readers.items() if len(numbers) > 1}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the modules one after the other: takes and returns what the whole Program does."""
        return self._chain(*args, **kwargs)

    @cached_property
    def _chain(self) -> Program:
        return chained(self.modules, self.origin)

    def with_modules(self, modules: Sequence[Program]) -> Partitioned:
        """The chain with these modules in place of its own: quantized, trained, or lowered ones of equal signatures.

        Raises :class:`PassError` for another number of modules, and for a module with another signature.
        """
        if len(modules) != len(self.modules):
            raise PassError(f"{len(modules)} modules given for a chain of {len(self.modules)}")
        for number, (new, old) in enumerate(zip(modules, self.modules, strict=True)):
            if new.signature != old.signature:
                raise PassError(
                    f"module {number} takes and returns something else than the one in its place: "
                    f"{new.signature} instead of {old.signature}"
                )
        return replace(self, modules=tuple(modules))

    def whole(self) -> Program:
        """One Program over the modules' tensors as they are now: of the class, the signature and the configuration of
        the one that was cut, with the reports of all modules.

        Raises :class:`PassError` for a tensor of several modules that they no longer have in common.
        """
        return joined(self.modules, self.origin)


def partition(
    program: Program,
    modules: int | None = None,
    boundaries: Sequence[int | str] | None = None,
    balance: Balance = "parameters",
    sizes: Mapping[str, int] | None = None,
    costs: Sequence[float] | None = None,
) -> Partitioned:
    """The program as a chain of modules that share its tensors; the first has the embeddings, the last the head.

    Say into how many ``modules``, or at which ``boundaries``. Each of these is the number of blocks before it (those of
    a T5's decoder count on from its encoder's), the path of the block behind it (``encoder.layer.4``), or the name of
    the node between two blocks. Of so many modules the largest is as small as it can be: by ``parameters``, the
    elements of the tensors that it reads (packed codes count by the byte); by ``flops``, the multiply-adds of its
    products at ``sizes`` of the dynamic axes; or by ``costs``, one number for each block, as the seconds that modules
    of one block each were measured to take.

    Raises :class:`PassError` for a Program without blocks, or whose blocks give more than one value each, for more
    modules than blocks, an unknown boundary, and a graph that writes into its values.
    """
    if (modules is None) == (boundaries is None):
        raise PassError("say either into how many modules, or at which boundaries")
    if balance not in BALANCES:
        raise PassError(f"there is no balance {balance!r}; there are {' and '.join(BALANCES)}")
    origin, program = Origin.of(program), program.copy()
    shapes = propagate_shapes(program)
    borders = _Borders(program, _stacks(program))
    price = _Price(program, shapes, borders, balance, sizes, costs)
    if boundaries is not None:
        chosen = borders.named(boundaries)
    else:
        assert modules is not None
        if not 1 <= modules <= borders.count:
            raise PassError(
                f"{modules} modules of {borders.count} blocks: each has one at least; choose 1 to {borders.count}"
            )
        chosen = best_cuts([0, *borders.before, borders.count], modules, price)
    nodes = [borders.nodes[number - 1] for number in chosen]
    made = Parts(program, shapes, nodes).programs()
    names = set(program.signature.names)
    return Partitioned(
        tuple(made),
        tuple(
            Cut(
                node.name,
                borders.before[number - 1],
                tuple(item for item in module.signature.inputs if item.name not in names),
            )
            for node, number, module in zip(nodes, chosen, made[1:], strict=True)
        ),
        tuple(price(start, stop) for start, stop in zip((0, *chosen), (*chosen, len(borders.nodes) + 1), strict=True)),
        origin,
    )


def _stacks(program: Program) -> tuple[Stack, ...]:
    if stacks := find_stacks(program):
        return stacks
    for path, calls in numbered(program.graph).items():
        if (count := len({call.number for call in calls})) > 1:
            raise PassError(
                f"the {count} blocks {path!r} can't be parted: each gives the next more than one value, and "
                "should give one"
            )
    raise PassError("the Program has no blocks to cut between: modules of one class, numbered one after the other")


class _Borders:
    """The values at which a Program can be cut, in the order of its graph, with the number of blocks before each."""

    def __init__(self, program: Program, stacks: Sequence[Stack]) -> None:
        order = {node: number for number, node in enumerate(program.graph.nodes)}
        found: dict[fx.Node, int] = {}
        self.paths: dict[str, fx.Node] = {}
        self.entries: dict[int, fx.Node] = {}
        """The value that enters the block that so many are before; behind the last one, what it gives."""
        self.count = 0
        last: fx.Node | None = None
        for stack in stacks:
            for number, node in enumerate(stack.boundaries):
                if last is not None and order[node] < order[last]:  # computed before the stack before this one ends
                    node = last
                last, found[node] = node, self.count + number
                self.entries[self.count + number] = node
                if number < len(stack):
                    self.paths[stack.block(number)] = node
            self.count += len(stack)
        self.nodes = sorted((node for node in found if node.op != "placeholder"), key=order.__getitem__)
        self.before = [found[node] for node in self.nodes]

    def named(self, boundaries: Sequence[int | str]) -> tuple[int, ...]:
        """The numbers of borders, counted from one, in order."""
        nodes = {node.name: node for node in self.nodes}
        chosen = []
        for boundary in boundaries:
            known: Mapping[Any, fx.Node] = self.entries if isinstance(boundary, int) else {**nodes, **self.paths}
            if known.get(boundary) not in self.nodes:
                hint = near_misses(boundary, known) if isinstance(boundary, str) else ""
                raise PassError(
                    f"there is no boundary {boundary!r}{hint}; a boundary is a number of blocks from "
                    f"{self.before[0]} to {self.count}, or the path of a block: {', '.join(self.paths)}"
                )
            chosen.append(self.nodes.index(known[boundary]) + 1)
        if len(set(chosen)) < len(chosen):
            raise PassError(f"the boundaries {list(boundaries)} name one twice; each is named once")
        return tuple(sorted(chosen))


class _Price:
    """What a module from one border to another costs; border 0 is the start of the graph, the last one its end."""

    def __init__(
        self,
        program: Program,
        shapes: Shapes,
        borders: _Borders,
        balance: Balance,
        sizes: Mapping[str, int] | None,
        costs: Sequence[float] | None,
    ) -> None:
        self.parts = Parts(program, shapes, borders.nodes)
        self.before = [0, *borders.before, borders.count]
        self.reads = [self.parts.tensors(part) for part in range(len(borders.nodes) + 1)]
        self.elements = {name: program.tensor(name).numel() for names in self.reads for name in names}
        self.sums: list[float] | None = None
        """What all before each border costs, where costs add up."""
        if costs is not None:
            if len(costs) != borders.count:
                raise PassError(f"{len(costs)} costs given for {borders.count} blocks; each has one")
            until = [0.0, *accumulate(costs)]
            self.sums = [until[blocks] for blocks in self.before]
        elif balance == "flops":
            counts = [0] * (len(borders.nodes) + 1)
            for node, count in multiply_adds(program, shapes, sizes).items():
                counts[self.parts.part_of(node)] += count
            self.sums = [0, *accumulate(counts)]

    def __call__(self, start: int, stop: int) -> float:
        if self.sums is not None:
            return self.sums[stop] - self.sums[start]
        return sum(self.elements[name] for name in set[str]().union(*self.reads[start:stop]))
