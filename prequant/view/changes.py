"""What a pass changed in a graph: nodes added, removed, rewritten; and which node stands for which that is gone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx as nx

READERS = ("linear", "embedding", "prequant.packed_linear", "prequant.packed_linears", "prequant.packed_embedding")
"""Ops that compute with a weight, instead of making its value."""
REFERENCE = re.compile(r"%(\w+)")


@dataclass(frozen=True)
class Changes:
    """Nodes by name. ``standing_for``: nodes that are there and the one before that each takes the place of, itself
    where it was there already. ``rewritten``: those of them whose op, constants, tensors or operands are other ones.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    rewritten: tuple[str, ...]
    standing_for: Mapping[str, str]


def changes(before: nx.DiGraph, after: nx.DiGraph) -> Changes:
    """Compare two graphs of :func:`prequant.passes.to_networkx`, tensors (``get_attr``) aside.

    A node keeps its name unless a pass replaces it. A new one stands for one that is gone where a node that was there
    before and after reads the one in the place of the other, or where both compute the product with the same weight
    and nothing else does: what stands for a node has its value, but for rounding and quantization. That a node reads
    the new one for the old is no rewriting of its own.
    """
    old, new = _values(before), _values(after)
    gone, fresh = set(old) - set(new), set(new) - set(old)
    standing = {name: name for name in new if name in old}
    for name in reversed(list(after)):  # from the end: what stands for a node has operands to compare, too
        if name not in standing or before.nodes[standing[name]]["target"] != after.nodes[name]["target"]:
            continue
        for was, now in _operand_pairs(before, after, standing[name], name):
            if was in gone and now in fresh and now not in standing and was not in standing.values():
                standing[now] = was
    for was, now in _by_weight(before, after, gone - set(standing.values()), fresh - set(standing)):
        standing[now] = was
    return Changes(
        added=tuple(name for name in new if name not in standing),
        removed=tuple(name for name in old if name not in set(standing.values())),
        rewritten=tuple(
            name
            for name, was in standing.items()
            if name != was or _text(after, name, standing) != _text(before, was, {})
        ),
        standing_for=standing,
    )


def _values(graph: nx.DiGraph) -> list[str]:
    return [name for name, op in graph.nodes(data="op") if op != "get_attr"]


def _text(graph: nx.DiGraph, name: str, standing: Mapping[str, str]) -> str:
    """A node's text; operands by the names that they had before. An output's are its text."""
    if graph.nodes[name]["op"] == "output":
        return " ".join(standing.get(source, source) for source in graph.predecessors(name))
    text: str = graph.nodes[name]["text"]
    return REFERENCE.sub(lambda match: f"%{standing.get(match[1], match[1])}", text)


def _operand_pairs(before: nx.DiGraph, after: nx.DiGraph, was: str, now: str) -> Iterable[tuple[str, str]]:
    """What two forms of a node read in the same places."""
    old, new = _slots(before, was), _slots(after, now)
    for slot in old.keys() & new.keys():
        if len(old[slot]) == len(new[slot]):
            yield from zip(old[slot], new[slot], strict=True)


def _slots(graph: nx.DiGraph, name: str) -> dict[str, list[str]]:
    slots: dict[str, list[str]] = {}
    for source, _, operands in graph.in_edges(name, data="operands"):
        for operand in operands:
            slots.setdefault(operand, []).append(source)
    return slots


def _by_weight(before: nx.DiGraph, after: nx.DiGraph, gone: set[str], fresh: set[str]) -> Iterable[tuple[str, str]]:
    """Readers of one weight, where there is one among those that are gone and one among those that are new."""
    old, new = _readers(before, gone), _readers(after, fresh)
    for weight in old.keys() & new.keys():
        if len(old[weight]) == len(new[weight]) == 1:
            yield old[weight][0], new[weight][0]


def _readers(graph: nx.DiGraph, names: set[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        facts = graph.nodes[name]
        if facts["target"] in READERS and facts["weight"] is not None and not facts["fused"]:
            found.setdefault(facts["weight"], []).append(name)
    return found
