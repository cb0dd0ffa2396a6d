"""transplant: the weights of one Program in the graph of another, which was traced from the same model otherwise.

A decoder with a cache, or the encoder of a seq2seq model, is a trace of its own over the same modules. Compressing it
again would cost its time again, and a second set of scales; so every linear and embedding gets what the first Program
has in its place: the expression of the weight, the quantization of the input, the packed operator. The tensors are
shared.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from prequant.runtime import ops

from .base import Pass, PassError
from .canonicalize import Canonicalize
from .compose_ops import ComposeOps
from .devices import set_device
from .fuse_epilogue import FuseEpilogue
from .fuse_parallel_linears import FuseParallelLinears, separate_linears
from .noops import bind_constants, remove_assertions, remove_dead_code, remove_noops
from .packed import PACKED_OPS, uses_in
from .pipeline import Pipeline
from .program import Program, ProgramInfo, attribute_node
from .properties import violation
from .reports import Report
from .sites import PARTS, WEIGHT_OPERAND
from .weights import weights

aten = torch.ops.aten

RESIDUAL = 11
"""Position of the operand that is added to a packed linear's result."""

FUSIONS: Mapping[Pass, Callable[[fx.Node], bool]] = {
    ComposeOps(): lambda node: node.target is aten.rms_norm.default or "gelu_tanh" in _activations(node),
    FuseEpilogue(): lambda node: node.target is ops.packed_linear and _has_epilogue(node),
    FuseParallelLinears(): lambda node: node.target is ops.packed_linears,
}
"""Passes that join what surrounds linears, and how to know a node that they made. They are run again, in this order."""


def transplant(source: Program, target: Program, new: Container[str] = ()) -> Program:
    """The graph of ``target`` over the tensors of ``source``, with the weights in the form that they have there.

    ``target`` is a trace of the same modules as float ones; its own tensors are not read (they may be on the meta
    device), but for those that ``source`` does not have. ``new`` names tensors that are ``target``'s own, whether
    ``source`` has some of these names or not: those of another head. The result is in eval mode, on the device of
    ``source``, and canonical, lowered or fused as that is.

    Raises :class:`PassError` for what the modules' weights and inputs alone don't tell: a linear or embedding that is
    not in ``source``, one whose calls have different forms, quantized values that no linear reads, a tensor that is
    missing or has another shape or dtype.
    """
    fusions = [fusion for fusion, made in FUSIONS.items() if any(map(made, source.graph.nodes))]
    planned, source = source.planned, separate_linears(source)
    donors = _Donors(source)
    canonical = violation("canonical", source) is None
    program = Canonicalize()(target) if canonical else _cleaned(target)
    for node in list(program.graph.nodes):
        if node.target in WEIGHT_OPERAND:
            _Graft(program, donors, new).replace(node)
    program = Pipeline(fusions)(_over(source, program, new))
    program.planned = planned
    return program


def _cleaned(target: Program) -> Program:
    """What canonicalization does, but for the form of the weights."""
    program, report = target.copy(), Report("transplant")
    remove_assertions(program, report)
    bind_constants(program, report)
    remove_noops(program, report)
    remove_dead_code(program, report)
    return program


def _over(source: Program, program: Program, new: Container[str]) -> Program:
    """``program`` with every tensor that it reads taken from ``source``; constants of its own stay, and what is new."""
    tensors: dict[str, Tensor] = {}
    held, own_names = {name for name in _names(source) if name not in new}, _names(program)
    counted = set(program.info.constants)  # their names are numbers, which another trace gives to other values
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        own = program.tensor(name) if name in own_names else None
        keeps = own is not None and name in counted and not own.is_meta
        value = source.tensor(name) if name in held and not keeps else own
        if value is None or value.is_meta:
            raise PassError(f"the Program does not have the tensor {name!r}, which its model reads here", node=node)
        if own is not None and (own.shape != value.shape or own.dtype != value.dtype):
            raise PassError(
                f"{name!r} is {_text(value)} in the Program, and {_text(own)} in the model of its configuration",
                node=node,
            )
        tensors[name] = value
    device = next((value.device for value in tensors.values()), torch.device("cpu"))
    set_device(program.graph, device)
    aliases = {name: names for name, names in source.info.aliases.items() if any(_part(name, read) for read in tensors)}
    transposed = tuple(name for name in source.info.transposed if name in tensors)
    constants = tuple(name for name in program.info.constants if name in tensors)
    info = ProgramInfo(program.signature, aliases, {}, constants, transposed)
    return Program(tensors, program.graph, info).train(False)


def _names(program: Program) -> set[str]:
    return {name for name, _ in (*program.named_parameters(), *program.named_buffers())}


def _part(weight: str, tensor: str) -> bool:
    return tensor == weight or tensor.startswith(f"{weight}.")


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


class _Donors:
    """Linears and embeddings of a Program by weight and module."""

    def __init__(self, source: Program) -> None:
        self.nodes: dict[tuple[str, str], fx.Node] = {}
        self.floats = {name for name, _ in source.named_parameters()}
        explained: set[fx.Node] = set()
        for view in weights(source):
            for node in view.consumers:
                first = self.nodes.setdefault((view.name, _path(node)), node)
                if _form(first) != _form(node):
                    raise PassError("the calls of its module quantize weight or input in different ways", node=node)
                explained |= _own_nodes(node)
        for node in source.graph.nodes:
            known = node in explained or any(made(node) for made in FUSIONS.values())
            if getattr(node.target, "namespace", "aten") != "aten" and not known:
                raise PassError(f"{node.target} stands at no linear or embedding, which no other trace has", node=node)

    def find(self, node: fx.Node, weight: str, new: Container[str]) -> fx.Node | None:
        """What stands in the place of a linear or embedding; None for one that is new, and stays as it is: also one
        over a float weight of the source, as a language model's head is tied to its embedding.
        """
        donor = self.nodes.get((weight, _path(node)))
        if weight in new or (donor is None and weight in self.floats):
            return None
        if donor is None:
            raise PassError(f"the Program has no linear or embedding {_path(node)!r} over {weight}", node=node)
        return donor


class _Graft:
    """Copies of nodes in another graph."""

    def __init__(self, program: Program, donors: _Donors, new: Container[str]) -> None:
        self.program, self.donors, self.new = program, donors, new

    def replace(self, node: fx.Node) -> None:
        """Give a float linear or embedding the form of its donor."""
        weight: Any = node.args[WEIGHT_OPERAND[node.target]]  # type: ignore[index]
        if weight.op != "get_attr":
            raise PassError("its weight is computed, not stored", node=node)
        donor = self.donors.find(node, str(weight.target), self.new)
        if donor is None:
            return
        if donor.target in PACKED_OPS:
            self._pack(node, donor)
        else:
            self._quantize(node, donor)
        if not weight.users:
            node.graph.erase_node(weight)

    def _quantize(self, node: fx.Node, donor: fx.Node) -> None:
        position = WEIGHT_OPERAND[donor.target]  # type: ignore[index]
        node.update_arg(position, self._copy(donor.args[position], node, {}))
        quantized: Any = donor.args[0]
        if donor.target is aten.linear.default and _is_quantizer(quantized):
            input = quantized.args[0]
            node.update_arg(0, self._copy(quantized, node, {input: node.args[0]}))

    def _pack(self, node: fx.Node, donor: fx.Node) -> None:
        input: Any = node.args[0] if donor.target is ops.packed_linear else node.args[1]
        operands = donor.args[1:RESIDUAL] if donor.target is ops.packed_linear else donor.args[1:]
        args = (input, *(self._copy(operand, node, {}) for operand in operands))
        with node.graph.inserting_before(node):
            packed = node.graph.create_node("call_function", donor.target, args, _without_epilogue(donor))
        packed.meta = dict(node.meta)
        node.replace_all_uses_with(packed)
        node.graph.erase_node(node)

    def _copy(self, value: Any, before: fx.Node, known: dict[Any, Any]) -> Any:
        """An expression over stored tensors and ``known`` values, before a node; one that is there is used again."""
        if not isinstance(value, fx.Node):
            return value
        if value in known:
            return known[value]
        if value.op == "get_attr":
            return attribute_node(self.program, str(value.target), before)
        args = tuple(self._copy(arg, before, known) for arg in value.args)
        for user in args[0].users:
            if user.target is value.target and user.args == args and dict(user.kwargs) == dict(value.kwargs):
                return user
        with before.graph.inserting_before(before):
            node = before.graph.create_node("call_function", value.target, args, dict(value.kwargs))
        node.meta = {key: value.meta[key] for key in ("module_stack",) if key in value.meta}
        if isinstance(args[0].meta.get("val"), Tensor) and _is_quantizer(value):
            node.meta["val"] = args[0].meta["val"]
        return node


def _path(node: fx.Node) -> str:
    stack = node.meta.get("module_stack", ())
    return str(stack[-1][0]) if stack else ""


def _is_quantizer(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (ops.fake_quantize, ops.uncalibrated)


def _own_nodes(node: fx.Node) -> set[fx.Node]:
    """A consumer with the nodes of its weight's expression, and those that quantize its input."""
    found = {node}
    if node.target in WEIGHT_OPERAND:
        weight: Any = node.args[WEIGHT_OPERAND[node.target]]
        while isinstance(weight, fx.Node) and weight.target in PARTS:
            found.add(weight)
            weight = weight.args[0]
        quantized: Any = node.args[0]
        if node.target is aten.linear.default and _is_quantizer(quantized):
            found.add(quantized)
            found |= {operand for operand in quantized.all_input_nodes if operand.target is ops.dynamic_scale}
    return found


def _form(node: fx.Node) -> Any:
    """What the calls of one module must have in common: the tensors that they read, and how."""
    own = _own_nodes(node)
    reads = {str(operand.target) for each in own for operand in each.all_input_nodes if operand.op == "get_attr"}
    return reads, {(each.target, repr(_without_epilogue(each))) for each in own}


def _without_epilogue(node: fx.Node) -> dict[str, Any]:
    return {name: value for name, value in node.kwargs.items() if name != "activation"}


def _activations(node: fx.Node) -> set[str]:
    """The activations that a node computes, by the names that packed linears have for them."""
    if node.target is aten.gelu.default:
        return {"gelu_tanh"} if node.kwargs.get("approximate") == "tanh" else {"gelu"}
    return {str(use.operands["activation"]) for use in uses_in(node) if use.kind == "linear"}


def _has_epilogue(node: fx.Node) -> bool:
    return bool(node.kwargs.get("activation")) or len(node.args) > RESIDUAL
