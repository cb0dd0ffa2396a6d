"""ExposeOutputs: intermediate values become results of a Program, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, fx

from .aliasing import mutated, storage_source
from .attention_scores import Attention, attentions, expose_scores
from .base import Pass, PassError, Report
from .blocks import Stack, find_stacks
from .program import Program
from .scope import TYPE_PREFIX, Pattern, Scope
from .shapes import propagate_shapes

HIDDEN_STATES, SCORES = "hidden_states", "attention_scores"
ENCODER, DECODER, CROSS = "encoder_", "decoder_", "cross_"


@dataclass(frozen=True)
class ExposeOutputs(Pass):
    """Hidden states, attention scores or any other values become further results, for distillation and for looking.

    ``program.call_with_exposed(...)`` returns what a call returns, and beside it a dictionary of these values; a call
    returns what it did before. They carry gradients in both modes. ``hide-outputs`` takes them out again.

    Hidden states are ``hidden_states.0``, which enters the first transformer block, to ``hidden_states.N``, which
    leaves the last: before the final norm, where a model has one behind its blocks (transformers gives the value after
    it in the place of the last). With an encoder and a decoder they are ``encoder_hidden_states.K`` and
    ``decoder_hidden_states.K``.

    Attention scores are ``attention_scores.K`` in the order of the graph, [batch, heads, queries, keys]: scaled
    products of queries and keys with all that is added to them, as they go into the softmax, and 0 where they are
    masked, because the huge negative numbers there would swamp or overflow a squared error. What is masked is read from
    the mask, not from the scores, as a trained score may be large: the condition of a ``where`` or ``masked_fill`` that
    puts in an addend of -9,000 or less, or that addend itself. The scores decide only where elements move between the
    mask and the softmax. For fused attention the same scores are computed beside it, from the same operands. With an
    encoder and a decoder they are ``encoder_attention_scores.K``, ``decoder_attention_scores.K`` and
    ``cross_attention_scores.K``. Rows of padded queries are what the model computes.
    """

    name: ClassVar[str] = "expose-outputs"
    ensures: ClassVar[tuple[str, ...]] = ("valid-signature",)

    hidden_states: bool = False
    """The values between transformer blocks."""
    attention_scores: bool = False
    """What every attention takes the softmax of, with 0 where it is masked."""
    include: tuple[Pattern, ...] = field(default=(), kw_only=True)
    """Outputs of modules (globs over paths, or ``type:Class``; of the last call) by path, and other nodes by name."""

    def __post_init__(self) -> None:
        """Raises :class:`PassError` where nothing is asked for."""
        super().__post_init__()
        if not (self.hidden_states or self.attention_scores or self.include):
            raise PassError("expose-outputs: give hidden_states=true, attention_scores=true or include")

    def run(self, program: Program) -> Report:
        """Expose what is asked for."""
        report = self.report()
        if any("val" not in node.meta for node in program.graph.nodes if node.op != "output"):
            propagate_shapes(program)  # a Program from a file, say
        taken = program.signature.exposed
        found: dict[str, fx.Node] = {}
        for name, value in self._values(program):
            if name in taken:
                report.keep(name, "exposed already")
                continue
            node = expose_scores(value) if isinstance(value, Attention) else value
            _check_unwritten(node)
            if found.setdefault(name, node) is not node:
                raise PassError(f"two values would have the name {name!r}", node=node)
            report.rewrite(name, f"the value of {node.name}")
        _append(program, found)
        report.totals.update(exposed=len(found))
        return report

    def _values(self, program: Program) -> Iterator[tuple[str, fx.Node | Attention]]:
        """The names and values asked for."""
        if self.hidden_states:
            yield from _hidden_states(find_stacks(program))
        if self.attention_scores:
            yield from _named_attentions(program, find_stacks(program))
        if self.include:
            outputs = _module_outputs(program.graph)
            for pattern in self.include:
                yield from _matching(program.graph, pattern, outputs).items()


def _append(program: Program, found: Mapping[str, fx.Node]) -> None:
    """Make nodes results; one that is a result already keeps its place."""
    output = program.graph.output_node()
    flat: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    exposed = dict(program.signature.exposed)
    for name, node in found.items():
        if node not in flat:
            flat.append(node)
        exposed[name] = flat.index(node)
    output.args = (tuple(flat),)
    program.update_info(signature=replace(program.signature, exposed=exposed))


def _check_unwritten(node: fx.Node) -> None:
    """Raise :class:`PassError` for a value that a later node writes into: it would be returned as it is then."""
    source = storage_source(node)
    for later in node.graph.nodes:
        if node < later and any(storage_source(written) is source for written in mutated(later)):
            raise PassError(
                f"{later.name} writes into the value of {node.name} later: canonicalize comes first", node=node
            )


# ---- names -----------------------------------------------------------------------------------------------------------


def _hidden_states(stacks: Sequence[Stack]) -> Iterator[tuple[str, fx.Node]]:
    if not stacks:
        raise PassError("no transformer blocks found: expose values by include")
    roles = _by_role(stacks)
    if not roles:
        paths = ", ".join(stack.path for stack in stacks)
        raise PassError(
            f"blocks are in {paths}, not in one stack or an encoder and a decoder: expose values by include"
        )
    for prefix, stack in roles.items():
        for number, node in enumerate(stack.boundaries):
            yield f"{prefix}{HIDDEN_STATES}.{number}", node


def _by_role(stacks: Sequence[Stack]) -> dict[str, Stack]:
    """The stacks by the prefix of their names; nothing where they are neither one, nor an encoder and a decoder, which
    reads the encoder in its blocks.
    """
    if len(stacks) == 1:
        return {"": stacks[0]}
    if len(stacks) == 2:
        for encoder, decoder in (stacks, stacks[::-1]):
            entering, *_, leaving = map(_sources, decoder.boundaries)
            if encoder.boundaries[-1] in leaving - entering:
                return {ENCODER: encoder, DECODER: decoder}
    return {}


def _named_attentions(program: Program, stacks: Sequence[Stack]) -> Iterator[tuple[str, Attention]]:
    counts: dict[str, int] = {}
    roles = _by_role(stacks)
    for attention in attentions(program.graph):
        prefix = _role(attention, roles)
        number = counts.get(prefix, 0)
        counts[prefix] = number + 1
        yield f"{prefix}{SCORES}.{number}", attention
    if not counts:
        raise PassError("no attention found in the graph")


def _role(attention: Attention, roles: Mapping[str, Stack]) -> str:
    """The prefix of an attention's name: that of its stack, or that of attention to what does not come from there."""
    paths = [path for path, _ in attention.node.meta.get("module_stack", ())]
    for prefix, stack in roles.items():
        if prefix and any(path.startswith(f"{stack.path}.") for path in paths):
            inside = all(stack.boundaries[0] in _sources(factor) for factor in attention.factors)
            return prefix if inside or prefix == ENCODER else CROSS
    return ""


def _sources(node: fx.Node) -> set[fx.Node]:
    """A node with everything that it is computed from."""
    found, pending = {node}, [node]
    while pending:
        new = [operand for operand in pending.pop().all_input_nodes if operand not in found]
        found.update(new)
        pending += new
    return found


# ---- patterns --------------------------------------------------------------------------------------------------------


class _Output(NamedTuple):
    kind: str
    node: fx.Node


def _tensors(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)]


def _module_outputs(graph: fx.Graph) -> dict[str, _Output]:
    """The last value of each module that is read outside it, by the module's path."""
    outputs: dict[str, _Output] = {}
    for node in _tensors(graph):
        outside = [{path for path, _ in user.meta.get("module_stack", ())} for user in node.users]
        for path, kind in node.meta.get("module_stack", ()):
            if path and any(path not in paths for paths in outside):
                outputs[path] = _Output(kind, node)
    return outputs


def _matching(graph: fx.Graph, pattern: Pattern, outputs: Mapping[str, _Output]) -> dict[str, fx.Node]:
    """What a pattern matches, by name. Raises :class:`~prequant.passes.ScopeError` where that is nothing."""
    nodes = _tensors(graph)
    found: dict[str, fx.Node] = {}
    if callable(pattern):
        found = {node.name: node for node in nodes if pattern(node)}
    elif pattern.startswith(TYPE_PREFIX):
        kind = pattern.removeprefix(TYPE_PREFIX)
        found = {path: output.node for path, output in outputs.items() if fnmatchcase(output.kind, kind)}
    else:
        found = {node.name: node for node in nodes if fnmatchcase(node.name, pattern)}
        found |= {path: output.node for path, output in outputs.items() if fnmatchcase(path, pattern)}
    if not found:
        Scope((pattern,)).split(nodes)
        raise PassError(f"the pattern {pattern!r} matches nothing that is read outside its module")
    return found
