"""What a graph in a file may call, by name.

A file comes from anywhere, and its graph runs. So a call in it names an operator of ATen or of prequant, or one of a
few pure Python functions on sizes; any other name is refused before anything is looked up. Of ATen's, those are refused
that open files, resize or alias storage, are internal to PyTorch, or take positions that they do not check. Operators
of other packages may be called once the person who loads the file has named their namespace.
"""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from .errors import CheckpointError
from .json_file import describe

NAMESPACES = ("aten", "prequant")

FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    **{
        f"operator.{name}": (getattr(operator, name), 2)
        for name in [
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
            "or_",
            "getitem",
        ]
    },
    **{f"operator.{name}": (getattr(operator, name), 1) for name in ("neg", "not_", "pos")},
    **{f"math.{name}": (getattr(math, name), 1) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": (getattr(torch, name), 1) for name in ("sym_int", "sym_float", "sym_not")},
    **{f"torch.{name}": (getattr(torch, name), 2) for name in ("sym_max", "sym_min")},
    "torch.sym_ite": (torch.sym_ite, 3),
    **{f"builtins.{name}": (getattr(builtins, name), 2) for name in ("max", "min")},
    **{f"builtins.{name}": (getattr(builtins, name), 1) for name in ("abs", "bool", "float", "int", "round")},
}
"""Python functions on sizes and tuples, with how many operands they take."""

_NAMES = {id(function): name for name, (function, _) in FUNCTIONS.items()}

_INTERNAL = frozenset(
    [
        "_to_copy",
        "_unsafe_view",
        "_softmax",
        "_log_softmax",
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "__and__",
        "__or__",
        "__xor__",
        "__lshift__",
        "__rshift__",
        "_adaptive_avg_pool2d",
        "_native_batch_norm_legit_no_training",
        "_scaled_dot_product_flash_attention_for_cpu",
    ]
)
"""Operators whose name starts with an underscore, and which exported graphs hold all the same."""

_DENIED = frozenset(
    [
        "from_file",
        "set",
        "set_",
        "set_data",
        "data",
        "resize",
        "resize_",
        "resize_as",
        "resize_as_",
        "record_stream",
        "requires_grad_",
        "retain_grad",
        "pin_memory",
        "as_strided_",
        "to_mkldnn",
        "to_padded_tensor",
        "choose_qparams_optimized",
        "fused_moving_avg_obs_fake_quant",
        # Positions, pivots and lengths that are operands, and that kernels follow unchecked, or may be told to.
        "segment_reduce",
        "linalg_lu_solve",
        "linalg_ldl_solve",
        "lu_solve",
        "lu_unpack",
        "ormqr",
        "orgqr",
        "linalg_householder_product",
        "embedding_renorm",
        "embedding_renorm_",
        "ctc_loss",
        "max_unpool2d",
        "max_unpool3d",
    ]
)
_DENIED_PREFIXES = (
    "cudnn_",
    "miopen_",
    "mkldnn_",
    "mps_",
    "fbgemm_",
    "quantized_",
    "sparse_",
    "to_sparse",
    "q_",
    "empty_quantized",
)
_TARGET = re.compile(r"([A-Za-z]\w*)::(\w+)\.(\w+)", re.ASCII)


def target_name(target: Any) -> str:
    """How a graph's call is written in a file. Raises :class:`CheckpointError` for one that no file may hold."""
    if isinstance(target, OpOverload):
        name = f"{target._schema.name}.{target._overloadname}"
        if target.namespace == "aten" and not _allowed_aten(target._opname):
            raise CheckpointError(f"the operator {name} can't be saved: files may not call it")
        return name
    if name := _NAMES.get(id(target), ""):
        return name
    raise CheckpointError(
        f"a call of {getattr(target, '__module__', '')}.{getattr(target, '__name__', target)} can't be saved: "
        f"graphs in files call operators (torch.ops) and {', '.join(sorted(FUNCTIONS))}"
    )


def find_target(name: str, namespaces: Iterable[str] = NAMESPACES) -> Callable[..., Any]:
    """The inverse of :func:`target_name`. Raises :class:`CheckpointError` for a name that is not on the list."""
    if name in FUNCTIONS:
        return FUNCTIONS[name][0]
    match = _TARGET.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{describe(name)} is nothing that a graph may call; an operator looks like 'aten::linear.default'"
        )
    namespace, operator_name, overload = match.groups()
    if namespace not in namespaces:
        raise CheckpointError(
            f"the operator {name} is of the namespace {namespace!r}; trusted are {', '.join(sorted(namespaces))}. "
            f"If you know where the folder comes from, load it with trusted_ops=({namespace!r},)"
        )
    if namespace == "aten" and not _allowed_aten(operator_name):
        raise CheckpointError(f"the operator {name} is not one that a graph from a file may call")
    packet = getattr(getattr(torch.ops, namespace), operator_name, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        where = (
            "this PyTorch"
            if namespace == "aten"
            else "this prequant"
            if namespace == "prequant"
            else "what is imported"
        )
        raise CheckpointError(f"{where} has no operator {name}")
    return getattr(packet, overload)


def _allowed_aten(name: str) -> bool:
    if name in _DENIED or name.startswith(_DENIED_PREFIXES) or "backward" in name:
        return False
    return not name.startswith("_") or name in _INTERNAL


def check_call(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_node: Callable[[Any], bool]
) -> None:
    """Raise :class:`CheckpointError` unless the operands fit the target in number, names and kinds of value."""
    if not isinstance(target, OpOverload):
        name = _NAMES[id(target)]
        if len(args) != FUNCTIONS[name][1] or kwargs:
            raise CheckpointError(
                f"{name} takes {FUNCTIONS[name][1]} operands, not {len(args)} and {len(kwargs)} by name"
            )
        return
    schema = target._schema
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    if len(args) > len(positional):
        raise CheckpointError(f"{schema.name} takes {len(positional)} operands by position, not {len(args)}")
    given = {argument.name: value for argument, value in zip(positional, args, strict=False)}
    known = {argument.name: argument for argument in schema.arguments}
    for name, value in kwargs.items():
        if name not in known:
            raise CheckpointError(f"{schema.name} has no operand {describe(name)}; it has {', '.join(known)}")
        if name in given:
            raise CheckpointError(f"{schema.name} gets its operand {name!r} twice")
        given[name] = value
    for name, argument in known.items():
        if name not in given:
            if not argument.has_default_value():
                raise CheckpointError(f"{schema.name} lacks its operand {name!r}")
        elif not _fits(argument.type, given[name], is_node):
            raise CheckpointError(f"{schema.name}: {name} is {describe(given[name])}, which is no {argument.type}")


_PLAIN: dict[str, tuple[type, ...]] = {
    # PyTorch writes dtypes, layouts and memory formats as ints in its schemas.
    "IntType": (int, torch.dtype, torch.layout, torch.memory_format),
    "SymIntType": (int,),
    "FloatType": (int, float),
    "NumberType": (int, float, bool),
    "BoolType": (bool,),
    "SymBoolType": (bool,),
    "StringType": (str,),
    "DeviceObjType": (torch.device,),
    # Exported graphs give plain numbers where the schema says Tensor: add(x, 1).
    "TensorType": (int, float, bool),
}


def _fits(type_: Any, value: Any, is_node: Callable[[Any], bool]) -> bool:
    kind = type_.kind()
    if kind == "OptionalType":
        return value is None or _fits(type_.getElementType(), value, is_node)
    if kind == "ListType":
        element = type_.getElementType()
        if isinstance(value, (list, tuple)):
            return all(_fits(element, item, is_node) for item in value)
        return element.kind() != "TensorType" and _fits(element, value, is_node)  # one number stands for a list of it
    if is_node(value):
        return kind not in ("StringType", "DeviceObjType", "GeneratorType")
    if isinstance(value, bool):
        return bool in _PLAIN.get(kind, ())
    return isinstance(value, _PLAIN.get(kind, ()))
