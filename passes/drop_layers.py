"""DropLayers: a shallower model out of some of a model's blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from .base import Pass, PassError, Report
from .blocks import Stack, data_flow, find_stacks, is_data
from .program import Program

aten = torch.ops.aten

WEIGHTED = ("prequant", "linear")
"""In the names of ops that a weight decides the form of, and not the place of a block."""


@dataclass(frozen=True)
class DropLayers(Pass):
    """block 0 -> block 1 -> block 2 -> block 3  ->  block 1 -> block 3, which are then called 0 and 1.

    Blocks are found by structure (:mod:`prequant.passes.blocks`). What kept ones compute is what they did; names of
    tensors and modules, and the configuration's depth, become those of an ordinary shallower model, so that the saved
    folder loads as one. XTC (arXiv 2206.01859, section 4) makes its students so, of a teacher's evenly spaced layers.

    What a dropped block computes for others without reading the data that flows through it (T5's first block has the
    position bias of all) stays. Raises :class:`PassError` for models without repeated blocks, with blocks that share
    their weights, give more than one value, or depend on their place.
    """

    name: ClassVar[str] = "drop-layers"

    keep: tuple[int, ...] = ()
    """Numbers of the blocks to keep, counted from 0, in order."""
    count: int = 0
    """Instead of ``keep``: how many to keep, by ``rule``."""
    rule: Literal["even", "top", "bottom"] = "even"
    """Which ones: the last of each of so many equal parts, those next to the output, or next to the input."""
    stack: str = "*"
    """A glob over the paths of stacks, for a model that has several (``encoder.*``, ``decoder.*``); all by default."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` for none or both of keep and count, and for numbers out of order."""
        super().__post_init__()
        if bool(self.keep) == bool(self.count):
            raise PassError(f"drop-layers: give either keep or count, not keep={list(self.keep)}, count={self.count}")
        if self.count < 0 or any(number < 0 for number in self.keep) or list(self.keep) != sorted(set(self.keep)):
            raise PassError(
                f"drop-layers: keep={list(self.keep)}, count={self.count}: expected numbers from 0, in order"
            )

    def run(self, program: Program) -> Report:
        """Drop blocks of every stack that matches."""
        report = self.report()
        stacks = self._stacks(program)
        flow = data_flow(program.graph)
        for stack in stacks:
            kept = self.kept(stack)
            self._check(stack, flow, kept)
            for number in range(len(stack)):
                if number not in kept:
                    report.rewrite(stack.block(number), "dropped", nodes=len(stack.bodies[number]))
                elif kept.index(number) != number:
                    report.rewrite(stack.block(number), f"now {stack.block(kept.index(number))}")
        for stack in stacks:
            _bypass(stack, self.kept(stack))
        program.graph.eliminate_dead_code()
        left = set(program.graph.nodes)
        for stack in stacks:
            for number in set(range(len(stack))).difference(self.kept(stack)):
                if still := [node for node in stack.bodies[number] if node in left]:
                    raise PassError(
                        f"{stack.block(number)} is needed: the size of {still[-1].name} is read", node=still[-1]
                    )
        report.totals["tensors dropped"] = len(program.prune())
        for stack in stacks:
            _rename(program, stack, self.kept(stack))
            program.set_depth(stack.path, len(stack), self.kept(stack))
        program.recompile()
        return report

    def _stacks(self, program: Program) -> list[Stack]:
        found = find_stacks(program)
        if not found:
            raise PassError(
                "the Program has no repeated blocks: no numbered modules that its data flows through in turn"
            )
        chosen = [stack for stack in found if fnmatchcase(stack.path, self.stack)]
        if not chosen:
            paths = ", ".join(stack.path for stack in found)
            raise PassError(f"stack={self.stack!r} matches none of the Program's stacks of blocks: {paths}")
        for stack in chosen:
            if stack.shared:
                raise PassError(
                    f"the blocks of {stack.path} share weights ({stack.shared[0]} is read by several): leaving one "
                    "out would leave no weight out"
                )
        return chosen

    def kept(self, stack: Stack) -> list[int]:
        """The numbers of the blocks that are kept. Raises :class:`PassError` for those that there are not."""
        depth = len(stack)
        if self.keep:
            if self.keep[-1] >= depth:
                raise PassError(f"keep={list(self.keep)}: {stack.path} has the blocks 0 to {depth - 1}")
            return list(self.keep)
        if self.count > depth:
            raise PassError(f"count={self.count}: {stack.path} has {depth} blocks")
        if self.rule == "even":
            return [(part + 1) * depth // self.count - 1 for part in range(self.count)]
        return list(range(depth))[-self.count :] if self.rule == "top" else list(range(self.count))

    def _check(self, stack: Stack, flow: Any, kept: Sequence[int]) -> None:
        for number, body in enumerate(stack.bodies):
            inside = set(body)
            for node in body[:-1]:
                if others := [user for user in flow.successors(node) if user not in inside]:
                    raise PassError(
                        f"{stack.block(number)} gives more than one value: {node.name} goes to {others[0].name}",
                        node=node,
                    )
                if any(user.op == "output" for user in node.users):
                    raise PassError(
                        f"{stack.block(number)} gives more than one value: {node.name} is a result", node=node
                    )
        for place, number in enumerate(kept):
            if place != number and _form(stack.bodies[place]) != _form(stack.bodies[number]):
                raise PassError(
                    f"{stack.block(number)} computes something else than {stack.block(place)}, whose place it would "
                    "take: its operations or their constants depend on the place"
                )


def _form(body: Sequence[fx.Node]) -> list[Any]:
    """What a block computes, without its weights: ops and constants in order."""
    return [
        (str(node.target), fx.map_arg((node.args, dict(node.kwargs)), lambda _: None))
        for node in body
        if not any(part in str(node.target) for part in WEIGHTED)
    ]


def _bypass(stack: Stack, kept: Sequence[int]) -> None:
    """Have what reads a dropped block read what entered it."""
    current = stack.boundaries[0]
    for number, end in enumerate(stack.boundaries[1:]):
        if number in kept:
            current = end
        else:
            end.replace_all_uses_with(current)
            for node in reversed(stack.bodies[number]):
                _erase(node)


def _erase(node: fx.Node) -> None:
    """Erase a node that only checks of its shape and sizes that nothing asks for are left of. Dead code elimination
    leaves checks, and what it takes for random, as dropout.
    """
    for user in list(node.users):
        if not is_data(user) and user.op == "call_function":
            _erase(user)
    if not node.users:
        node.graph.erase_node(node)


def _rename(program: Program, stack: Stack, kept: Sequence[int]) -> None:
    """Give tensors and modules of the kept blocks the numbers that they have now."""
    numbers = {f"{stack.block(number)}.": f"{stack.block(place)}." for place, number in enumerate(kept)}
    tensors = [name for name, _ in (*program.named_parameters(), *program.named_buffers())]
    new = {name: _renamed(name, numbers) for name in tensors}
    dropped = set(range(len(stack))).difference(kept)
    taken = Counter(new.values())
    for name in tensors:
        number = next((n for n in dropped if name.startswith(f"{stack.block(n)}.")), None)
        if number is not None and (number >= len(kept) or taken[name] > 1):
            raise PassError(
                f"{name} is read outside of its block, which is dropped: "
                f"a model of {len(kept)} blocks has no place for it"
            )
    values = {name: program.tensor(name) for name in tensors if new[name] != name}
    trains = {name: value.requires_grad for name, value in values.items()}
    for name in values:
        program.delete_tensor(name)
    for name, value in values.items():
        program.set_tensor(new[name], value, trainable=trains[name])
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = new[str(node.target)]
        if levels := node.meta.get("module_stack"):
            node.meta["module_stack"] = tuple((_renamed(f"{path}.", numbers)[:-1], kind) for path, kind in levels)
    info = program.info
    program.update_info(
        aliases={
            _renamed(name, numbers): tuple(_renamed(other, numbers) for other in others)
            for name, others in info.aliases.items()
        },
        constants=tuple(_renamed(name, numbers) for name in info.constants),
        transposed=tuple(_renamed(name, numbers) for name in info.transposed),
    )


def _renamed(name: str, numbers: Mapping[str, str]) -> str:
    return next((to + name.removeprefix(old) for old, to in numbers.items() if name.startswith(old)), name)
