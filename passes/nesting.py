"""How the flat results of a graph go into the containers that a model returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

OutputTree: TypeAlias = "int | list[OutputTree] | tuple[OutputTree, ...] | dict[str, OutputTree] | None"
"""Where the flat results go: an index into them, None, or containers of these."""


def nest(tree: OutputTree, flat: tuple[Any, ...] | list[Any]) -> Any:
    """Put flat results into the containers of ``tree``."""
    if tree is None:
        return None
    if isinstance(tree, int):
        return flat[tree]
    if isinstance(tree, dict):
        return {key: nest(part, flat) for key, part in tree.items()}
    return type(tree)(nest(part, flat) for part in tree)


def leaves(tree: OutputTree) -> Iterator[int]:
    """Indices in a tree, in order."""
    if isinstance(tree, int):
        yield tree
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from leaves(part)
    elif tree is not None:
        for part in tree:
            yield from leaves(part)


def named_results(tree: OutputTree, path: str = "") -> Iterator[tuple[str, int]]:
    """Each result's place in the nest, ``logits`` or ``hidden_states.3``, with its index."""
    if isinstance(tree, int):
        yield path or "result", tree
        return
    parts: Any = tree.items() if isinstance(tree, dict) else enumerate(tree or ())
    for key, part in parts:
        yield from named_results(part, f"{path}.{key}" if path else str(key))
