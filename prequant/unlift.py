"""From an exported graph, which takes every parameter as an input, to one that reads tensors by their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils._pytree import TreeSpec
from transformers.utils import ModelOutput

from prequant.passes.aliasing import mutated, storage_source
from prequant.passes.nesting import OutputTree

from .trace_errors import trace_error

KEPT_META = ("val", "stack_trace")
"""What stays of a node's meta beside ``module_stack``: the fake value and the source line."""
_TENSORS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Unlifted:
    """A graph over named tensors."""

    graph: fx.Graph
    tensors: dict[str, Tensor]
    """What the graph reads, by name; no two of them share memory."""
    inputs: tuple[fx.Node, ...]
    outputs: OutputTree
    output_type: type | None
    """The ModelOutput class that the model returns, if it does."""
    aliases: dict[str, tuple[str, ...]]
    constants: tuple[str, ...]
    """Names of tensors that are not in the model's ``state_dict()``: buffers that it does not save, constants."""
    unread: tuple[str, ...]
    """Names in the model's ``state_dict()`` that the graph does not need."""


def unlift(exported: ExportedProgram, model: nn.Module) -> Unlifted:
    """Take the graph out of ``exported`` (which must not be used afterwards). Raises :class:`TraceError`."""
    names = TensorNames.of(model)
    stored = {**exported.state_dict, **exported.constants}
    graph = exported.graph
    tensors: dict[str, Tensor] = {}
    reads: dict[str, fx.Node] = {}
    inputs: list[fx.Node] = []
    placeholders = list(graph.find_nodes(op="placeholder"))
    for spec, node in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument):
            inputs.append(node)
            continue
        if node.users:
            if spec.kind not in _TENSORS:
                what = f"{spec.target or node.name!r}, a {spec.kind.name}"
                raise trace_error(model, f"it uses {what}", "let it hold and take tensors only")
            value = stored[str(spec.target)]
            name = names.name(value, str(spec.target))
            tensors.setdefault(name, value)
            _read(graph, node, name, reads)
        graph.erase_node(node)
    _check_nodes(model, graph)
    _clean_meta(graph)
    state = tuple(model.state_dict())
    aliases = {name: others for name in tensors if (others := names.others(name))}
    known = set(chain(tensors, *aliases.values()))
    spec = exported.call_spec.out_spec
    assert spec is not None
    return Unlifted(
        graph=graph,
        tensors=_apart(model, tensors),
        inputs=tuple(inputs),
        outputs=_output_tree(model, spec, graph.output_node().args[0]),
        output_type=spec.type if isinstance(spec.type, type) and issubclass(spec.type, ModelOutput) else None,
        aliases=aliases,
        constants=tuple(name for name in tensors if name not in state),
        unread=tuple(name for name in state if name not in known),
    )


def _read(graph: fx.Graph, placeholder: fx.Node, name: str, reads: dict[str, fx.Node]) -> None:
    """Let the placeholder's users read the tensor ``name``, through the one node for it, before its first use."""
    first = next(node for node in graph.nodes if node in placeholder.users)
    node = reads.get(name)
    if node is None:
        with graph.inserting_before(first):
            node = reads[name] = graph.create_node("get_attr", name)
        node.meta["val"] = placeholder.meta["val"]
    elif first < node:
        first.prepend(node)
    placeholder.replace_all_uses_with(node)


# ---- tensors ---------------------------------------------------------------------------------------------------------


@dataclass
class TensorNames:
    """One name for every tensor of a model: the first of ``named_parameters()`` or ``named_buffers()``.

    Where an output layer is tied to an embedding that is the embedding's; the exporter gives the other.
    """

    _names: dict[Any, list[str]] = field(default_factory=dict)
    _keys: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> TensorNames:
        """The names of a model's parameters and buffers."""
        names = cls()
        for name, tensor in chain(
            model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
        ):
            names._add(name, tensor)
        return names

    def name(self, tensor: Tensor, otherwise: str) -> str:
        """The name of a tensor; ``otherwise`` becomes the name of one that has none yet."""
        key = _memory(tensor)
        if key not in self._names:
            self._add(next(name for name in _candidates(otherwise) if name not in self._keys), tensor)
        return self._names[key][0]

    def others(self, name: str) -> tuple[str, ...]:
        """Further names of the tensor ``name``."""
        return tuple(self._names[self._keys[name]][1:])

    def _add(self, name: str, tensor: Tensor) -> None:
        key = self._keys[name] = _memory(tensor)
        self._names.setdefault(key, []).append(name)


def _candidates(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(1))


def _memory(tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory seen in the same way, even if they are different objects."""
    if tensor.numel() == 0 or tensor.is_meta:
        return id(tensor)
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _apart(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with copies of those that share a storage with an earlier one without being tied to it.

    Parameters become objects of their own over the same memory: whether one trains, and on which device it is, is then
    up to the Program alone. Raises :class:`TraceError` for parameters that overlap: a copy would train apart from the
    rest.
    """
    seen: dict[int, str] = {}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        first = seen.setdefault(storage.data_ptr(), name) if storage.nbytes() and not tensor.is_meta else name
        if not isinstance(tensor, nn.Parameter):
            result[name] = tensor if first == name else tensor.clone()
            continue
        value = tensor.detach()
        if first != name:
            if overlapping := [other for other in result if _overlap(tensor, tensors[other])]:
                raise trace_error(
                    model,
                    f"the parameters {overlapping[0]!r} and {name!r} overlap in memory without being the same tensor",
                    "make one of them a copy",
                )
            value = value.clone()
        result[name] = nn.Parameter(value, requires_grad=tensor.requires_grad)
    return result


def _overlap(a: Tensor, b: Tensor) -> bool:
    def extent(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (start, stop), (other_start, other_stop) = extent(a), extent(b)
    return start < other_stop and other_start < stop


# ---- nodes -----------------------------------------------------------------------------------------------------------


def _check_nodes(model: nn.Module, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise trace_error(
                model,
                f"its graph has a {node.target.name()} node ({node.name}) with graphs of its own{_source(node)}",
                "write torch.cond, loops and grad-mode switches as plain tensor operations (torch.where)",
            )
        for written in mutated(node):
            source = storage_source(written)
            if source.op in ("get_attr", "placeholder"):
                what = f"the tensor {source.target!r}" if source.op == "get_attr" else f"its input {source.target!r}"
                raise trace_error(
                    model, f"it writes into {what} ({node.name}){_source(node)}", "let forward return values instead"
                )


def _source(node: fx.Node) -> str:
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    return f"\n  at: {' '.join(lines[-2:])}" if lines else ""


def _clean_meta(graph: fx.Graph) -> None:
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        if node.op == "call_function":
            node.meta["module_stack"] = tuple((path, _class_name(kind)) for path, kind in stack.values())


def _class_name(kind: str | type) -> str:
    return (kind if isinstance(kind, str) else kind.__qualname__).rpartition(".")[2]


# ---- outputs ---------------------------------------------------------------------------------------------------------


def _output_tree(model: nn.Module, spec: TreeSpec, flat: Any) -> OutputTree:
    """The nesting of the results; None where the model returns None."""
    index = count()

    def walk(spec: TreeSpec) -> OutputTree:
        if spec.is_leaf():
            position = next(index)
            return None if flat[position] is None else position
        parts = [walk(child) for child in spec.children()]
        if spec.type is list:
            return parts
        if issubclass(spec.type, tuple):
            return tuple(parts)
        if issubclass(spec.type, dict) and isinstance(spec.context, list):
            return {str(key): part for key, part in zip(spec.context, parts, strict=True)}
        raise trace_error(model, f"it returns a {spec.type.__name__}", "return tensors in tuples, lists or dicts")

    return walk(spec)
