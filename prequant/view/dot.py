"""A Record as a graph in Graphviz's language: every node of the last stage, its modules as clusters."""

from __future__ import annotations

from collections.abc import Iterator

from .record import NodeRecord, Record


def dot(record: Record) -> str:
    """The text of the graph. Nodes carry their op, shape and, where they compute with a weight, its format."""
    stage = record.stages[-1]
    nodes = [node for node in (record.nodes[place] for place in stage.nodes) if node.data]
    formats = {record.weights[place].name: record.weights[place].format for place in stage.weights}
    tree: dict[str, list[NodeRecord]] = {}
    for node in nodes:
        tree.setdefault(node.module if node.kind == "op" else "", []).append(node)
    lines = [
        f"digraph {quoted(record.title or 'program')} {{",
        '  graph [fontname="Helvetica", compound=true, color="#8891a1", style=rounded];',
        '  node [fontname="Helvetica", shape=box, style=rounded];',
        *_cluster("", _children(record, tree), tree, formats, 1),
    ]
    drawn = {node.name for node in nodes}
    lines += [
        f"  {quoted(source)} -> {quoted(node.name)};" for node in nodes for source in node.inputs if source in drawn
    ]
    return "\n".join([*lines, "}"]) + "\n"


def quoted(text: str) -> str:
    """A string of the language, in which a backslash would begin an escape; control characters become blanks."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _children(record: Record, tree: dict[str, list[NodeRecord]]) -> dict[str, list[str]]:
    """Modules directly below each module, of those that have nodes or are around one that has."""
    children: dict[str, list[str]] = {}
    for path in tree:
        while path:
            above = path.rpartition(".")[0]
            while above and above not in record.modules:
                above = above.rpartition(".")[0]
            known = children.setdefault(above, [])
            if path in known:
                break
            known.append(path)
            path = above
    return children


def _cluster(
    path: str, children: dict[str, list[str]], tree: dict[str, list[NodeRecord]], formats: dict[str, str], depth: int
) -> Iterator[str]:
    indent = "  " * depth
    for child in children.get(path, ()):
        yield f"{indent}subgraph {quoted(f'cluster_{child}')} {{"
        yield f"{indent}  label={quoted(child[len(path) + 1 :] if path else child)};"
        yield from _cluster(child, children, tree, formats, depth + 1)
        yield f"{indent}}}"
    for node in tree.get(path, ()):
        weights = [f"{formats[name]}" for name in node.uses if name in formats]
        words = [quoted(part)[1:-1] for part in (node.target, node.shape, *weights) if part]
        label = "\\n".join(words)
        yield f'{indent}{quoted(node.name)} [label="{label}"];'
