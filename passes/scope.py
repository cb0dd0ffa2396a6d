"""Scopes: which weights or nodes a pass touches, said the same way in every pass.

A pattern is one of

* a glob over names, ``*.attention.*``: a weight's name or an alias of it (``.weight`` may be left out), or the path of
  the innermost module that uses it,
* ``type:Name``, the class name of a module that the node's code comes from, itself a glob (``type:Bert*Attention``),
* a function of the ``fx.Node`` (Python only: it has no text form).

Something is in scope if it matches any ``include`` pattern (or there are none) and no ``exclude`` pattern. A pattern
that matches nothing at all raises, and names near misses.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

from torch import fx

from prequant.runtime import PrequantError

from .sites import WeightSite

Pattern: TypeAlias = str | Callable[[fx.Node], bool]
T = TypeVar("T", WeightSite, fx.Node)
TYPE_PREFIX = "type:"

NEAR = 0.6
"""From which similarity on, as :mod:`difflib` measures it, a name is a near miss of a pattern."""


class ScopeError(PrequantError):
    """A pattern that matches nothing."""


@dataclass(frozen=True)
class Scope:
    """Patterns of what is in, and of what is out again."""

    include: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()

    def holds(self, item: WeightSite | fx.Node) -> bool:
        """Whether something is in scope."""
        included = not self.include or any(matches(pattern, item) for pattern in self.include)
        return included and not any(matches(pattern, item) for pattern in self.exclude)

    def split(self, candidates: Iterable[T]) -> tuple[list[T], list[T]]:
        """``candidates`` in scope, and out of it.

        Raises :class:`ScopeError` for a pattern that matches none of them.
        """
        items = list(candidates)
        for pattern in (*self.include, *self.exclude):
            if not any(matches(pattern, item) for item in items):
                raise ScopeError(_nothing(pattern, items))
        inside = [item for item in items if self.holds(item)]
        chosen = set(map(id, inside))
        return inside, [item for item in items if id(item) not in chosen]


def matches(pattern: Pattern, item: WeightSite | fx.Node) -> bool:
    """Whether one pattern matches a site (any node that uses it) or a node."""
    if callable(pattern):
        nodes: Sequence[fx.Node] = item.consumers if isinstance(item, WeightSite) else (item,)
        return any(pattern(node) for node in nodes)
    if pattern.startswith(TYPE_PREFIX):
        wanted = pattern.removeprefix(TYPE_PREFIX)
        return any(fnmatchcase(kind, wanted) for kind in _types(item))
    return any(fnmatchcase(name, pattern) for name in _names(item))


def _names(item: WeightSite | fx.Node) -> tuple[str, ...]:
    if isinstance(item, WeightSite):
        return (*item.names, *(name.removesuffix(".weight") for name in item.names), *_paths(item.consumers))
    return (item.name, *_paths((item,)))


def _paths(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    return tuple(node.meta["module_stack"][-1][0] for node in nodes if node.meta.get("module_stack"))


def _types(item: WeightSite | fx.Node) -> tuple[str, ...]:
    nodes: Sequence[fx.Node] = item.consumers if isinstance(item, WeightSite) else (item,)
    return tuple(kind for node in nodes for _, kind in node.meta.get("module_stack", ()))


def _nothing(pattern: Pattern, items: Sequence[WeightSite | fx.Node]) -> str:
    if callable(pattern):
        return f"the predicate {getattr(pattern, '__name__', pattern)!r} matches none of the {len(items)} candidates"
    if pattern.startswith(TYPE_PREFIX):
        known = {TYPE_PREFIX + kind for item in items for kind in _types(item)}
    else:
        known = {name.removesuffix(".weight") for item in items for name in _names(item)}
    nearness = {name: _nearness(pattern, name) for name in sorted(known)}
    ranked = sorted(nearness, key=nearness.__getitem__, reverse=True)
    near = [name for name in ranked if nearness[name][0] >= NEAR]
    what = f"near misses: {', '.join(near[:3])}" if near else f"there are, among others: {', '.join(ranked[:3])}"
    return f"the pattern {pattern!r} matches none of the {len(items)} candidates" + (f"; {what}" if known else "")


def _nearness(pattern: str, name: str) -> tuple[float, float]:
    """How similar a pattern, wildcards at its ends aside, is to the part of a dotted name that is most like it, and to
    all of it; 1 where they are equal.
    """
    wanted, parts = pattern.strip("*?."), name.split(".")
    length = wanted.count(".") + 1
    windows = [".".join(parts[i : i + length]) for i in range(max(1, len(parts) - length + 1))]
    part, whole = (max(difflib.SequenceMatcher(None, wanted, text).ratio() for text in t) for t in (windows, [name]))
    return part, whole
