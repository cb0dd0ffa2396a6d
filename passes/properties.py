"""Properties that passes require and ensure: named checks that say what violates them first, or nothing.

A package that adds passes adds properties of its own with :func:`define_property`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, fx

from prequant.runtime import FormatError, PrequantError, Scheme, WeightFormat, ops

from .linear_forms import in_the_way, products
from .nesting import leaves
from .noops import ASSERTIONS
from .options import near_misses
from .packed import PACKED_OPS, operands_of, uses_in
from .program import Program
from .sites import WEIGHT_OPERAND

aten = torch.ops.aten

Check: TypeAlias = Callable[[Program], "str | None"]
"""What violates a property first (a text that names the node or tensor), or None where it holds."""
F = TypeVar("F", bound=Check)

_PROPERTIES: dict[str, Check] = {}


def define_property(name: str) -> Callable[[F], F]:
    """Decorator: make a check known under ``name``. Raises :class:`PrequantError` where the name is taken."""

    def define(check: F) -> F:
        if _PROPERTIES.setdefault(name, check) is not check:
            raise PrequantError(f"there is a property {name!r} already")
        return check

    return define


def violation(name: str, program: Program) -> str | None:
    """What violates the property ``name`` first; None where it holds.

    Raises :class:`PrequantError` for an unknown name.
    """
    if name not in _PROPERTIES:
        raise PrequantError(f"there is no property {name!r}{near_misses(name, _PROPERTIES)}")
    return _PROPERTIES[name](program)


def property_names() -> tuple[str, ...]:
    """Names of all properties."""
    return tuple(_PROPERTIES)


# ---- the form of the graph -----------------------------------------------------------------------------------


@define_property("canonical")
def _canonical(program: Program) -> str | None:
    """Every product with a stored weight that can be is a ``linear`` with an ``[out, in]`` matrix, and no assertions
    are left.
    """
    positions: Mapping[Any, int] = WEIGHT_OPERAND
    hidden = products(program)
    for product in hidden:
        if in_the_way(product, hidden) is None:
            what = "a linear layer in another form" if product.reader is product.node else "a transposed weight"
            return f"%{product.reader.name} is {what} ({_op_name(product.reader)})"
    for node in _calls(program):
        if _op_name(node).startswith(ASSERTIONS):
            return f"%{node.name} is an assertion ({_op_name(node)})"
        position = positions.get(node.target)
        if position is not None and _is_stored(node.args[position]) and not _is_matrix(program, node.args[position]):
            return f"%{node.name} reads a weight that is no matrix ({node.args[position]})"
    return None


@define_property("valid-signature")
def _valid_signature(program: Program) -> str | None:
    """The placeholders are the signature's inputs, in its order, and every result that it names is there."""
    placeholders = tuple(str(node.target) for node in program.graph.find_nodes(op="placeholder"))
    if placeholders != program.signature.names:
        return f"the graph takes ({', '.join(placeholders)}), the signature says ({', '.join(program.signature.names)})"
    returned = program.graph.output_node().args[0]
    count = len(returned) if isinstance(returned, (list, tuple)) else 1
    signature = program.signature
    beyond = [index for index in (*leaves(signature.outputs), *signature.exposed.values()) if not 0 <= index < count]
    return f"the signature names result {beyond[0]}, the graph returns {count}" if beyond else None


@define_property("no-orphans")
def _no_orphans(program: Program) -> str | None:
    """Every tensor is read by a node, through one ``get_attr`` node, and every ``get_attr`` node finds its tensor."""
    held = {name for name, _ in program.named_parameters()} | {name for name, _ in program.named_buffers()}
    seen: set[str] = set()
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in held:
            return f"%{node.name} reads {name!r}, which the Program does not have"
        if name in seen:
            return f"{name!r} is read through more than one get_attr node (%{node.name} is the second)"
        if not node.users:
            return f"no node uses {name!r}"
        seen.add(name)
    unread = sorted(held - seen)
    return f"no node reads {unread[0]!r}" + (f" (and {len(unread) - 1} more)" if unread[1:] else "") if unread else None


# ---- weights -------------------------------------------------------------------------------------------------


@define_property("no-latent-weights")
def _no_latent_weights(program: Program) -> str | None:
    """No stored float weight passes through ``fake_quantize``."""
    for node in _calls(program, ops.fake_quantize):
        if _is_stored(node.args[0]):
            return f"%{node.name} quantizes the latent weight {node.args[0].target}"  # type: ignore[union-attr]
    return None


@define_property("lowered")
def _lowered(program: Program) -> str | None:
    """No codes are turned back into a float weight by a node of the graph."""
    for node in _calls(program, ops.dequantize, ops.dequantize_bcq):
        if _is_stored(node.args[0]):
            return f"%{node.name} unpacks {node.args[0].target}"  # type: ignore[union-attr]
    return None


@define_property("valid-formats")
def _valid_formats(program: Program) -> str | None:
    """Codes, scales, zero points and outliers of every weight have the shapes and types that its format says."""
    for node in _calls(program, ops.dequantize, ops.dequantize_bcq, ops.add_outliers):
        operands = operands_of(node)
        if found := _codes_violation(program, operands) or _outliers_violation(program, operands, ""):
            return f"%{node.name}: {found}"
    for node in _calls(program, *PACKED_OPS):
        for use in uses_in(node):
            found = _codes_violation(program, use.operands) or _outliers_violation(program, use.operands, "outlier_")
            if found:
                return f"%{node.name}: {found}"
    for node in _calls(program, ops.fake_quantize):
        if found := _latent_violation(program, node):
            return f"%{node.name}: {found}"
    return None


def _codes_violation(program: Program, operands: Mapping[str, Any]) -> str | None:
    codes = _tensor(program, operands.get("codes", operands.get("planes")))
    scale = _tensor(program, operands.get("scale", operands.get("alphas")))
    if codes is None or scale is None:
        return None  # computed in the graph, for instance a quantized activation
    try:
        format = WeightFormat.parse(str(operands["format"]))
    except FormatError as error:
        return str(error)
    rank = 3 if format.scheme is Scheme.BCQ else 2
    if codes.dim() != rank:
        return f"{format} codes have {rank} dimensions, not the shape {list(codes.shape)}"
    rows, columns = codes.shape[-2], int(operands["columns"])
    zero_point = _tensor(program, operands.get("zero_point"))
    if (zero_point is None) != format.symmetric:
        return f"{format} weights have {'no' if format.symmetric else 'a'} zero point"
    return (
        _mismatch("codes", codes, format.codes_shape(rows, columns), format, torch.uint8)
        or _mismatch("scale", scale, format.scale_shape(rows, columns), format)
        or (
            None
            if zero_point is None
            else _mismatch("zero point", zero_point, format.scale_shape(rows, columns), format)
        )
    )


def _latent_violation(program: Program, node: fx.Node) -> str | None:
    operands = operands_of(node)
    latent, scale = _tensor(program, operands["input"]), _tensor(program, operands["scale"])
    if latent is None or scale is None:
        return None  # an activation
    try:
        format = WeightFormat.parse(str(operands["format"]))
    except FormatError as error:
        return str(error)
    if latent.dim() != 2:
        return f"the latent weight is no matrix: {list(latent.shape)}"
    return _mismatch("scale", scale, format.scale_shape(*latent.shape), format)


def _outliers_violation(program: Program, operands: Mapping[str, Any], prefix: str) -> str | None:
    values, columns, offsets = (
        _tensor(program, operands.get(prefix + part)) for part in ("values", "columns", "row_offsets")
    )
    if values is None or columns is None or offsets is None:
        return None
    if values.dim() != 1 or not values.is_floating_point():
        return f"outlier values are a float vector, not {values.dtype} {list(values.shape)}"
    if columns.shape != values.shape:
        return f"{values.numel()} outlier values with {columns.numel()} columns"
    if int(offsets[0]) != 0 or int(offsets[-1]) != values.numel():
        return f"outlier row offsets run from {int(offsets[0])} to {int(offsets[-1])}, not from 0 to {values.numel()}"
    return None


def _mismatch(
    what: str, tensor: Tensor, shape: tuple[int, ...], format: WeightFormat, dtype: torch.dtype | None = None
) -> str | None:
    if dtype is not None and tensor.dtype is not dtype:
        return f"{what} are {tensor.dtype}, not {dtype}"
    if dtype is None and not tensor.is_floating_point():
        return f"the {what} is {tensor.dtype}, not a float"
    if tuple(tensor.shape) != shape:
        return f"the {what} of {format} should have the shape {list(shape)}, not {list(tensor.shape)}"
    return None


# ---- reading nodes -------------------------------------------------------------------------------------------


def _calls(program: Program, *targets: Any) -> list[fx.Node]:
    return [
        node for node in program.graph.nodes if node.op == "call_function" and (not targets or node.target in targets)
    ]


def _op_name(node: fx.Node) -> str:
    return node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_stored(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _is_matrix(program: Program, value: Any) -> bool:
    tensor = _tensor(program, value)
    return tensor is not None and tensor.dim() == 2


def _tensor(program: Program, value: Any) -> Tensor | None:
    """The tensor behind a ``get_attr`` node; None for anything else."""
    return program.tensor(str(value.target)) if _is_stored(value) else None
