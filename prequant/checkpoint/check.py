"""Whether a graph may run over its tensors: every operand of prequant's ops that ends up as a code or an index is
looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from prequant.passes.packed import PACKED_OPS, PackedUse, operands_of, uses_in
from prequant.runtime import Granularity, PrequantError, Scheme, WeightFormat, ops

from .errors import CheckpointError
from .json_file import describe
from .weight_tensors import OUTLIER_PARTS, check_finite, check_outliers, check_weight, parse_format

_DEQUANTIZE = (ops.dequantize, ops.dequantize_bcq)
_PARTS = {"planes": "codes", "alphas": "scale"}
_FOLLOWED = ("codes", "planes", OUTLIER_PARTS[1], OUTLIER_PARTS[2])
"""Parts of a weight that are codes or positions."""
_PACKED_OUTLIERS = ("outlier_values", "outlier_columns", "outlier_row_offsets")


def check_graph(graph: fx.Graph, tensors: Mapping[str, Tensor], where: Callable[[str], str], source: str) -> None:
    """Raise :class:`CheckpointError` unless the operands of every prequant op fit its format and each other.

    ``where(name)`` begins the message about a tensor, with its file; ``source`` is what the graph is of. Codes, their
    scales and the positions of outliers have to be stored tensors, since what is computed can't be checked before it
    runs.
    """
    checker = _Checker(tensors, where)
    for node in graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "prequant":
            try:
                checker.check(node)
            except CheckpointError as error:
                raise CheckpointError(f"{error} (read by the node {node.name} of {source})") from None
    # What was looked at must not be written into by then.
    for node in graph.find_nodes(op="get_attr"):
        if id(tensors.get(str(node.target))) in checker.trusted:
            for user in node.users:
                if getattr(user.target, "namespace", "") != "prequant":
                    raise CheckpointError(
                        f"{where(str(node.target))} holds codes or positions, which prequant's operators alone may "
                        f"read (it is read by the node {user.name} of {source})"
                    )


class _Checker:
    def __init__(self, tensors: Mapping[str, Tensor], where: Callable[[str], str]) -> None:
        self.tensors, self.where = tensors, where
        self.done: set[Any] = set()
        """What has been checked already: a tied weight stands in several nodes."""
        self.trusted: set[int] = set()
        """Identities of tensors whose values are codes or positions, which kernels follow."""

    def check(self, node: fx.Node) -> None:
        operands = operands_of(node)
        if node.target in _DEQUANTIZE:
            self._codes(operands, ())
        elif node.target in PACKED_OPS:
            for use in _uses(node):
                self._codes(use.operands, tuple(use.operands[part] for part in _PACKED_OUTLIERS))
            if operands.get("input_format"):
                self._input(operands["input_format"], operands["input_scale"], operands["input_zero_point"])
        elif node.target is ops.add_outliers:
            self._outliers(operands)
        elif node.target is ops.fake_quantize:
            self._fake_quantize(operands)
        elif "format" in operands:
            _format(operands["format"])

    def _codes(self, operands: Mapping[str, Any], outliers: tuple[Any, ...]) -> None:
        columns = operands["columns"]
        if type(columns) is not int or columns < 1:
            raise CheckpointError(f"columns is {describe(columns)}; a weight has at least one")
        format = _format(operands["format"], columns)
        stored, scale = ("planes", "alphas") if format.scheme is Scheme.BCQ else ("codes", "scale")
        given = {_PARTS.get(name, name): value for name, value in operands.items()}
        nodes = {stored: given["codes"], scale: given["scale"]}
        if given.get("zero_point") is not None:
            nodes["zero_point"] = given["zero_point"]
        nodes |= {part: value for part, value in zip(OUTLIER_PARTS, outliers, strict=False) if value is not None}
        names = {part: self._stored(part, value) for part, value in nodes.items()}
        if (key := (str(format), columns, *names.values())) in self.done:
            return
        codes = self.tensors[names[stored]]
        self._trust(names)
        if codes.dim() < 2:
            raise CheckpointError(
                f"{self.where(names[stored])} is of shape {list(codes.shape)}; codes have 2 or 3 dimensions"
            )
        parts = {part: self.tensors[name] for part, name in names.items()}
        check_weight(
            format,
            codes.shape[-2],
            columns,
            parts,
            lambda part: self.where(names[part]) if part in names else f"{self.where(names[stored])}: its {part}",
        )
        self.done.add(key)

    def _outliers(self, operands: Mapping[str, Any]) -> None:
        """Outliers over a dense, latent or dequantized weight, whose shape bounds their positions."""
        inner = operands["weight"]
        while isinstance(inner, fx.Node) and inner.target is ops.add_outliers:
            inner = inner.args[0]
        if isinstance(inner, fx.Node) and inner.target in _DEQUANTIZE:
            below = operands_of(inner)
            codes = self.tensors[self._stored("codes", below.get("codes", below.get("planes")))]
            shape: tuple[int, ...] = (codes.shape[-2], below["columns"])
        else:
            if isinstance(inner, fx.Node) and inner.target is ops.fake_quantize:
                inner = inner.args[0]
            shape = tuple(self.tensors[self._stored("weight", inner)].shape)
        if len(shape) != 2:
            raise CheckpointError(f"outliers of a weight of shape {list(shape)}; it has to be a matrix")
        names = {part: self._stored(part, operands[part.rpartition(".")[2]]) for part in OUTLIER_PARTS}
        parts = {part: self.tensors[name] for part, name in names.items()}
        self._trust(names)
        check_outliers(shape[0], shape[1], parts, lambda part: self.where(names[part]))

    def _trust(self, names: Mapping[str, str]) -> None:
        self.trusted |= {id(self.tensors[names[part]]) for part in _FOLLOWED if part in names}

    def _fake_quantize(self, operands: Mapping[str, Any]) -> None:
        input, scale, zero_point = operands["input"], operands["scale"], operands["zero_point"]
        if isinstance(input, fx.Node) and input.op == "get_attr":  # a latent weight
            latent, where = self.tensors[str(input.target)], self.where(str(input.target))
            if latent.dim() != 2 or not latent.is_floating_point():
                raise CheckpointError(
                    f"{where} is {latent.dtype} of shape {list(latent.shape)}; a latent weight is a float matrix"
                )
            format = _format(operands["format"], latent.shape[1])
            for part in (scale, zero_point):
                if isinstance(part, fx.Node) and part.op == "get_attr":
                    self._finite(str(part.target), format.scale_shape(*latent.shape))
        elif isinstance(scale, fx.Node) and scale.op == "get_attr":
            self._input(operands["format"], scale, zero_point)
        else:
            _format(operands["format"])

    def _input(self, text: Any, scale: Any, zero_point: Any) -> None:
        """The static scale of an activation: one number, and a zero point near the codes if it has one."""
        format = _format(text)
        if format.scheme is not Scheme.AFFINE or format.granularity is Granularity.GROUP:
            raise CheckpointError(f"inputs are quantized affinely, per token (row) or tensor, not {format}")
        if scale is None:
            if not format.symmetric:
                raise CheckpointError(f"the input format {format} without a stored scale; dynamic scales are symmetric")
            return
        names = [
            self._stored(part, value)
            for part, value in (("input scale", scale), ("input zero point", zero_point))
            if value is not None
        ]
        if (len(names) == 2) is format.symmetric:
            raise CheckpointError(f"the input format {format} takes {'no' if format.symmetric else 'a'} zero point")
        check_input(format, [self.tensors[name] for name in names], [self.where(name) for name in names])

    def _finite(self, name: str, shape: tuple[int, ...]) -> None:
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{self.where(name)} is of shape {list(tensor.shape)}; expected {list(shape)}")
        check_finite(None, tensor, self.where(name))

    def _stored(self, part: str, value: Any) -> str:
        if not (isinstance(value, fx.Node) and value.op == "get_attr"):
            advice = "; if it is being trained, freeze first" if part == "alphas" else ""
            raise CheckpointError(f"its {part} is {describe(value)}, which is no stored tensor{advice}")
        return str(value.target)


def _uses(node: fx.Node) -> list[PackedUse]:
    try:
        return uses_in(node)
    except PrequantError as error:
        raise CheckpointError(str(error)) from error


def check_input(format: WeightFormat, tensors: list[Tensor], names: list[str]) -> None:
    """Raise :class:`CheckpointError` unless an activation's scale, and zero point if it has one, are single sensible
    numbers.
    """
    tensors = [tensor.detach() for tensor in tensors]
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.numel() != 1 or tensor.dim() > 2:
            raise CheckpointError(f"{name} is of shape {list(tensor.shape)}; an input has one scale, of shape [1, 1]")
        check_finite(format, tensor, name)
    if len(tensors) == 2 and not -format.levels <= float(tensors[1]) <= 2 * format.levels:
        raise CheckpointError(
            f"{names[1]} is {float(tensors[1])}; the zero point of {format} lies near its codes, "
            f"from {-format.levels} to {2 * format.levels}"
        )


def _format(text: Any, columns: int = 0) -> WeightFormat:
    if not isinstance(text, str):
        raise CheckpointError(f"format is {describe(text)}, not a text")
    return parse_format(text, columns)
