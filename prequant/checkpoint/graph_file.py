"""A Program's graph and signature as JSON, and back.

::

    {"signature": {"inputs": [{"name", "dtype", "shape"}], "outputs": tree, "exposed": {name: index}},
     "aliases": {name: [names]}, "stacks": [[[module path, class name], ...], ...],
     "nodes": [{"name", "op", "target", "args", "kwargs", "stack": index, "attention_dropout": p}, ...]}

Nodes stand in the order they run in, and refer only to those before them, so a cycle can't be written. ``op`` is
``placeholder``, ``get_attr`` (of a stored tensor), ``call_function`` (see ``targets.py``) or ``output``. Left out is
what is empty. Names are checked before they reach ``fx``, which writes them into Python source.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import fx

from prequant.passes import Input, Signature
from prequant.passes.modes import ATTENTION_DROPOUT
from prequant.passes.nesting import OutputTree, leaves

from .arguments import DTYPES, decode, encode, named
from .errors import CheckpointError
from .json_file import Record, describe
from .targets import check_call, find_target, target_name

MAX_NODES = 200_000
_ATOM = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9_-]*", re.ASCII)


def is_tensor_name(name: str) -> bool:
    """Whether a name can be a tensor's: atoms of letters, digits, ``_`` and ``-``, joined by dots; none starts with
    ``__``.
    """
    return len(name) < 1024 and all(_ATOM.fullmatch(part) for part in name.split("."))


def _is_identifier(name: str) -> bool:
    return (
        len(name) < 1024
        and name.isascii()
        and name.isidentifier()
        and not keyword.iskeyword(name)
        and not name.startswith("__")
    )


# ---- graph -----------------------------------------------------------------------------------------------------------


def encode_graph(graph: fx.Graph) -> dict[str, Any]:
    """The nodes of a graph and the module stacks they name. Raises :class:`CheckpointError`, naming the node, for what
    has no form.
    """
    stacks: dict[tuple[tuple[str, str], ...], int] = {}
    nodes = []
    for node in graph.nodes:
        try:
            nodes.append(_encode_node(node, stacks))
        except CheckpointError as error:
            raise CheckpointError(f"node {node.name}: {error}") from error
    return {"stacks": [[list(entry) for entry in stack] for stack in stacks], "nodes": nodes}


def _encode_node(node: fx.Node, stacks: dict[tuple[tuple[str, str], ...], int]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op in ("placeholder", "get_attr"):
        entry["target"] = str(node.target)
        if node.op == "placeholder" and node.args:
            raise CheckpointError(f"an input with the default {describe(node.args[0])} can't be saved")
    elif node.op == "call_function":
        entry["target"] = target_name(node.target)
    elif node.op != "output":
        raise CheckpointError(f"a {node.op} node can't be saved: graphs in files call functions only")
    if node.args:
        entry["args"] = [encode(arg) for arg in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
    if stack := tuple((str(path), str(kind)) for path, kind in node.meta.get("module_stack", ())):
        entry["stack"] = stacks.setdefault(stack, len(stacks))
    if ATTENTION_DROPOUT in node.meta:
        entry[ATTENTION_DROPOUT] = float(node.meta[ATTENTION_DROPOUT])
    return entry


def decode_graph(record: Record, tensors: Collection[str], namespaces: Iterable[str]) -> fx.Graph:
    """The graph in a file, over stored tensors of these names. Raises :class:`CheckpointError` for anything but a graph
    in order.
    """
    stacks = [_decode_stack(stack, f"{record.where}, stacks {i}") for i, stack in enumerate(record.get("stacks", list))]
    entries = record.get("nodes", list)
    if len(entries) > MAX_NODES:
        raise CheckpointError(f"{record.where}: {len(entries):,} nodes; at most {MAX_NODES:,} are read")
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    namespaces = frozenset(namespaces)
    for index, value in enumerate(entries):
        entry = Record(value, f"{record.where}, node {index}")
        name = entry.get("name", str)
        entry.where = f"{record.where}, node {index} ({describe(name)})"
        entry.only(("name", "op", "target", "args", "kwargs", "stack", ATTENTION_DROPOUT))
        if not _is_identifier(name):
            raise CheckpointError(f"{entry.where}: its name is no Python identifier")
        if name in nodes:
            raise CheckpointError(f"{entry.where}: an earlier node has that name")
        if entry.get("op", str) == "output" and index != len(entries) - 1:
            raise CheckpointError(f"{entry.where}: the output is not the last node")
        try:
            nodes[name] = node = _decode_node(graph, entry, name, nodes, tensors, namespaces)
        except CheckpointError as error:
            raise error if str(error).startswith(record.where) else CheckpointError(f"{entry.where}: {error}") from None
        node.meta["module_stack"] = _pick(stacks, entry) if "stack" in entry.value else ()
        if ATTENTION_DROPOUT in entry.value:
            node.meta[ATTENTION_DROPOUT] = entry.get(ATTENTION_DROPOUT, float)
    if not nodes or next(reversed(nodes.values())).op != "output":
        raise CheckpointError(f"{record.where}: the last node is not the output")
    return graph


def _decode_node(
    graph: fx.Graph,
    entry: Record,
    name: str,
    nodes: dict[str, fx.Node],
    tensors: Collection[str],
    namespaces: frozenset[str],
) -> fx.Node:
    op = entry.get("op", str)
    args = tuple(decode(arg, nodes) for arg in entry.get("args", list, []))
    kwargs = {key: decode(value, nodes) for key, value in entry.get("kwargs", dict, {}).items()}
    target: Any
    if op == "call_function":
        target = find_target(entry.get("target", str), namespaces)
        check_call(target, args, kwargs, lambda value: isinstance(value, fx.Node))
    elif op == "output":
        target = "output"
        if len(args) != 1 or kwargs or not isinstance(args[0], (tuple, list)):
            raise CheckpointError("an output takes one operand, the tuple of results")
    elif op in ("placeholder", "get_attr"):
        target = entry.get("target", str)
        if args or kwargs:
            raise CheckpointError(f"a {op} takes no operands")
        if op == "get_attr" and target not in tensors:
            raise CheckpointError(f"it reads the tensor {describe(target)}, which is not in the list of tensors")
        if op == "placeholder" and not _is_identifier(target):
            raise CheckpointError(f"the input's name {describe(target)} is no Python identifier")
    else:
        raise CheckpointError(f"op {describe(op)}: expected placeholder, get_attr, call_function or output")
    return graph.create_node(op, target, args, kwargs, name=name)


def _decode_stack(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    pairs: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(part, str) for part in p) for p in pairs):
        raise CheckpointError(f"{where}: {describe(value)} where pairs of module path and class name belong")
    return tuple((path, kind) for path, kind in pairs)


def _pick(stacks: list[tuple[tuple[str, str], ...]], entry: Record) -> tuple[tuple[str, str], ...]:
    index = entry.get("stack", int)
    if not 0 <= index < len(stacks):
        raise CheckpointError(f"{entry.where}: stack {index}; the file has {len(stacks)}")
    return stacks[index]


# ---- signature -------------------------------------------------------------------------------------------------------


def encode_signature(signature: Signature) -> dict[str, Any]:
    """Inputs, nesting of outputs, and exposed values."""
    inputs = [
        {"name": item.name, "dtype": str(item.dtype).removeprefix("torch."), "shape": list(item.shape)}
        for item in signature.inputs
    ]
    exposed = {"exposed": dict(signature.exposed)} if signature.exposed else {}
    return {"inputs": inputs, "outputs": _encode_tree(signature.outputs), **exposed}


def decode_signature(record: Record, graph: fx.Graph) -> Signature:
    """The inverse of :func:`encode_signature`, which has to fit the graph's inputs and number of results."""
    inputs = []
    for index, value in enumerate(record.get("inputs", list)):
        item = Record(value, f"{record.where}, input {index}").only(("name", "dtype", "shape"))
        dtype = named(DTYPES, "dtype")(item.get("dtype", str))
        shape = tuple(item.get("shape", list))
        if len(shape) > 8 or any(not isinstance(size, str) and (type(size) is not int or size < 0) for size in shape):
            raise CheckpointError(
                f"{item.where}: shape {describe(list(shape))}; expected sizes and names of dynamic axes"
            )
        inputs.append(Input(item.get("name", str), dtype, shape))
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    if [item.name for item in inputs] != names:
        given = ", ".join(item.name for item in inputs)
        raise CheckpointError(
            f"{record.where}: the inputs {describe(given)} are not those of the graph, {', '.join(names)}"
        )
    if "outputs" not in record.value:
        raise CheckpointError(f"{record.where}: 'outputs' is missing")
    outputs = _decode_tree(record.value["outputs"], record.where)
    results = len(graph.output_node().args[0])  # type: ignore[arg-type]
    exposed = _decode_exposed(record.get("exposed", dict, {}), record.where)
    for index in (*leaves(outputs), *exposed.values()):
        if not 0 <= index < results:
            raise CheckpointError(f"{record.where}: output {index}; the graph has {results} results")
    return Signature(tuple(inputs), outputs, exposed)


def _decode_exposed(values: dict[str, Any], where: str) -> dict[str, int]:
    for name, index in values.items():
        if not is_tensor_name(name) or type(index) is not int:
            raise CheckpointError(f"{where}: exposed is {describe({name: index})} where a name and an index belong")
    return values


def _encode_tree(tree: OutputTree) -> Any:
    if isinstance(tree, dict):
        return {"dict": {key: _encode_tree(part) for key, part in tree.items()}}
    if isinstance(tree, tuple):
        return {"tuple": [_encode_tree(part) for part in tree]}
    return [_encode_tree(part) for part in tree] if isinstance(tree, list) else tree


def _decode_tree(value: Any, where: str, depth: int = 0) -> OutputTree:
    if depth > 16:
        raise CheckpointError(f"{where}: outputs nested more than 16 deep")
    if value is None or type(value) is int:
        return value
    if isinstance(value, list):
        return [_decode_tree(part, where, depth + 1) for part in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "tuple" and isinstance(content, list):
            return tuple(_decode_tree(part, where, depth + 1) for part in content)
        if kind == "dict" and isinstance(content, dict):
            return {key: _decode_tree(part, where, depth + 1) for key, part in content.items()}
    raise CheckpointError(
        f"{where}: outputs hold {describe(value)}; expected an index, null, a list, a tuple or a dict"
    )


def decode_aliases(record: Record) -> dict[str, tuple[str, ...]]:
    """Further names of tied tensors, by the name they are stored under."""
    aliases: dict[str, tuple[str, ...]] = {}
    for name in record.value:
        aliases[name] = record.strings(name)
        if bad := [n for n in (name, *aliases[name]) if not is_tensor_name(n)]:
            raise CheckpointError(f"{record.where}: {describe(bad[0])} is no name of a tensor")
    return aliases
