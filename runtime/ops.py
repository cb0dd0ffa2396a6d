"""The graph ops, ``torch.ops.prequant.*``: schemas and kernels. What they compute stands in ``reference.py``.

All are functional, so ``torch.export``, ``torch.compile`` and every exporter see plain nodes. Formats travel as text
(``"affine4:row"``, see :class:`~prequant.runtime.formats.WeightFormat`). Codes never carry a gradient; scales, zero
points, alphas and outlier values do. The backward of the packed ops unpacks the weight again instead of keeping it,
so that training on frozen codes holds one layer's float weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .backends import call
from .errors import PrequantError
from .formats import Scheme, WeightFormat, _parse
from .reference import Outliers

library = torch.library.Library("prequant", "DEF")

_OUTLIERS = "Tensor? outlier_values, Tensor? outlier_columns, Tensor? outlier_row_offsets, bool outliers_replace"
_SCHEMAS = {
    "quantize": "(Tensor input, Tensor scale, Tensor? zero_point, *, str format) -> Tensor",
    "dequantize": "(Tensor codes, Tensor scale, Tensor? zero_point, *, str format, int columns, "
    "ScalarType? dtype=None) -> Tensor",
    "dequantize_bcq": "(Tensor planes, Tensor alphas, *, str format, int columns, ScalarType? dtype=None) -> Tensor",
    "dequantize_gradients": "(Tensor gradient, Tensor codes, Tensor scale, Tensor? zero_point, *, str format, "
    "bool[] needs) -> Tensor[]",
    "fake_quantize": "(Tensor input, Tensor scale, Tensor? zero_point, *, str format, bool clipped=True, "
    "bool scale_gradient=True) -> Tensor",
    "fake_quantize_gradients": "(Tensor gradient, Tensor input, Tensor scale, Tensor? zero_point, *, str format, "
    "bool scale_gradient, bool[] needs) -> Tensor[]",
    "dynamic_scale": "(Tensor input, *, str format) -> Tensor",
    "uncalibrated": "(Tensor input, *, str format, str observer, str name) -> Tensor",
    "scale_gradient": "(Tensor input, *, float factor) -> Tensor",
    "add_outliers": "(Tensor weight, Tensor values, Tensor columns, Tensor row_offsets, *, bool replace) -> Tensor",
    "packed_linear": f"(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point, {_OUTLIERS}, Tensor? bias, "
    "Tensor? input_scale, Tensor? input_zero_point, Tensor? residual=None, str format='', int columns=0, "
    "str input_format='', str activation='') -> Tensor",
    "packed_linears": "(Tensor input, Tensor[] codes, Tensor[] scales, Tensor?[] zero_points, "
    "Tensor?[] outlier_values, Tensor?[] outlier_columns, Tensor?[] outlier_row_offsets, bool[] outliers_replace, "
    "Tensor?[] biases, Tensor? input_scale, Tensor? input_zero_point, str[] formats, str[] activations, int columns, "
    "str input_format='') -> Tensor[]",
    "packed_embedding": f"(Tensor ids, Tensor codes, Tensor scale, Tensor? zero_point, {_OUTLIERS}, "
    "*, str format, int columns, int padding_idx=-1, ScalarType? dtype=None) -> Tensor",
}
"""Options go by keyword alone, but for those of packed linears: keywords cost torch more, at every call.
``packed_linear`` has defaults for them because a schema asks for some behind ``residual``; there is no weight without a
format."""

OP_NAMES = tuple(_SCHEMAS)
for _name, _schema in _SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _quantize(input: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str) -> Tensor:
    parsed = checks.scaled_format(format, input.shape, scale.shape, None if zero_point is None else zero_point.shape)
    return call("quantize", _reference_quantize, parsed, input, scale, zero_point)


def _reference_quantize(format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return reference.quantize(input, scale, zero_point, format)


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    columns: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if codes.dim() > 2 and (parsed := _parse(format)).scheme is not Scheme.BCQ:
        rows: Any = checks.as_rows(parsed, codes, scale, zero_point)
        return _dequantize(*rows, format=format, columns=columns, dtype=dtype).unflatten(0, codes.shape[:-1])
    parsed = checks.weight_format(format, columns, codes, scale, zero_point)
    return call("dequantize", _reference_dequantize, parsed, codes, scale, zero_point, columns, dtype or scale.dtype)


def _reference_dequantize(
    format: WeightFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    return reference.dequantize(codes, scale, zero_point, format, columns).to(dtype)


def _dequantize_bcq(
    planes: Tensor, alphas: Tensor, *, format: str, columns: int, dtype: torch.dtype | None = None
) -> Tensor:
    return _dequantize(planes, alphas, None, format=format, columns=columns, dtype=dtype)


def _dequantize_gradients(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    if codes.dim() > 2 and (parsed := _parse(format)).scheme is not Scheme.BCQ:
        rows: Any = checks.as_rows(parsed, codes, scale, zero_point)
        found = _dequantize_gradients(gradient.flatten(0, -2), *rows, format=format, needs=needs)
        return [part.reshape(scale.shape) for part in found]
    parsed = checks.weight_format(format, gradient.shape[-1], codes, scale, zero_point)
    checks.unpacking_gradients(parsed, gradient, codes, zero_point, needs)
    operands = (gradient, codes, scale, zero_point, needs)
    return call("dequantize_gradients", _reference_dequantize_gradients, parsed, *operands)


def _reference_dequantize_gradients(
    format: WeightFormat,
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    to_scale, to_zero_point = needs
    found = reference.dequantize_gradients(gradient, codes, scale, zero_point, format, (to_scale, to_zero_point))
    return [part.contiguous() for part in found if part is not None]


def _fake_quantize(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    clipped: bool = True,
    scale_gradient: bool = True,
) -> Tensor:
    parsed = checks.scaled_format(format, input.shape, scale.shape, None if zero_point is None else zero_point.shape)
    return call("fake_quantize", _reference_fake_quantize, parsed, input, scale, zero_point)


def _reference_fake_quantize(format: WeightFormat, input: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return reference.fake_quantize(input, scale, zero_point, format)


def _fake_quantize_gradients(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    scale_gradient: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    parsed = checks.scaled_format(format, input.shape, scale.shape, None if zero_point is None else zero_point.shape)
    checks.rounding_gradients(parsed, gradient, input, zero_point, needs)
    operands = (gradient, input, scale, zero_point, scale_gradient, needs)
    return call("fake_quantize_gradients", _reference_fake_quantize_gradients, parsed, *operands)


def _reference_fake_quantize_gradients(
    format: WeightFormat,
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scale_gradient: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    to_input, to_scale, to_zero_point = needs
    found = reference.fake_quantize_gradients(
        *(gradient, input, scale, zero_point, format),
        clipped=True,
        scale_gradient=scale_gradient,
        needs=(to_input, to_scale, to_zero_point),
    )
    return [part.contiguous() for part in found if part is not None]


def _dynamic_scale(input: Tensor, *, format: str) -> Tensor:
    return call("dynamic_scale", _reference_dynamic_scale, _parse(format), input)


def _reference_dynamic_scale(format: WeightFormat, input: Tensor) -> Tensor:
    return reference.dynamic_scale(input, format)


def _uncalibrated(input: Tensor, *, format: str, observer: str, name: str) -> Tensor:
    raise PrequantError(
        f"the activation {name!r} has no scale yet: calibrate the program before it runs (observer {observer!r})"
    )


def _add_outliers(weight: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, *, replace: bool) -> Tensor:
    outliers = checks.outliers(values, columns, row_offsets, replace, weight.shape[0])
    return call("add_outliers", _reference_add_outliers, None, weight, outliers)


def _reference_add_outliers(format: None, weight: Tensor, outliers: Outliers) -> Tensor:
    return reference.add_outliers(weight, outliers)


def _packed_linear(*arguments: Any, **options: Any) -> Tensor:
    return call("packed_linear", reference.packed_linear, *checked_linear(*arguments, **options))


def checked_linear(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_row_offsets: Tensor | None,
    outliers_replace: bool,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    residual: Tensor | None = None,
    format: str = "",
    columns: int = 0,
    input_format: str = "",
    activation: str = "",
) -> tuple[Any, ...]:
    """The arguments of ``packed_linear`` as its backends and its reference take them, once they are known to fit.

    Raises :class:`FormatError` for those that do not.
    """
    parsed = checks.weight_format(format, columns, codes, scale, zero_point)
    checks.linear(input, codes, columns, bias)
    outliers = checks.outliers(outlier_values, outlier_columns, outlier_row_offsets, outliers_replace, codes.shape[-2])
    parsed_input = checks.activation_format(input_format, input, input_scale, input_zero_point)
    checks.epilogue(activation, residual, input, codes)
    return (
        *(parsed, input, codes, scale, zero_point, outliers, bias, input_scale, input_zero_point, columns),
        *(parsed_input, activation, residual),
    )


def _packed_linears(*arguments: Any, **options: Any) -> list[Tensor]:
    calls = checked_linears(*arguments, **options)
    return call("packed_linears", each_linear, None, calls[0][1], calls)


def each_linear(format: None, input: Tensor, calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """What ``packed_linears`` means: each of the ``calls`` of ``packed_linear`` goes where it would alone."""
    return [call("packed_linear", reference.packed_linear, *each) for each in calls]


def linears_of(
    input: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor | None],
    outlier_values: Sequence[Tensor | None],
    outlier_columns: Sequence[Tensor | None],
    outlier_row_offsets: Sequence[Tensor | None],
    outliers_replace: Sequence[bool],
    biases: Sequence[Tensor | None],
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    formats: Sequence[str],
    activations: Sequence[str],
    columns: int,
    input_format: str = "",
) -> list[tuple[Any, ...]]:
    """The calls of ``packed_linear``, each with its arguments by position, that a call of ``packed_linears`` is.

    Raises :class:`FormatError` for lists of different lengths.
    """
    lists = {
        "codes": codes,
        "scales": scales,
        "zero_points": zero_points,
        "outlier_values": outlier_values,
        "outlier_columns": outlier_columns,
        "outlier_row_offsets": outlier_row_offsets,
        "outliers_replace": outliers_replace,
        "biases": biases,
        "formats": formats,
        "activations": activations,
    }
    checks.same_lengths(lists)
    return [
        (input, *weight, bias, input_scale, input_zero_point, None, format, columns, input_format, activation)
        for *weight, bias, format, activation in zip(*lists.values(), strict=True)
    ]


def checked_linears(*arguments: Any, **options: Any) -> list[tuple[Any, ...]]:
    """What :func:`checked_linear` says of each call that a call of ``packed_linears`` is."""
    return [checked_linear(*each) for each in linears_of(*arguments, **options)]


def _packed_embedding(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    outlier_values: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_row_offsets: Tensor | None,
    outliers_replace: bool,
    *,
    format: str,
    columns: int,
    padding_idx: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    parsed = checks.weight_format(format, columns, codes, scale, zero_point)
    checks.ids(ids, codes)
    outliers = checks.outliers(outlier_values, outlier_columns, outlier_row_offsets, outliers_replace, codes.shape[-2])
    return call(
        *("packed_embedding", reference.packed_embedding, parsed),
        *(ids, codes, scale, zero_point, outliers, columns, dtype or scale.dtype),
    )


def _scale_gradient(input: Tensor, *, factor: float) -> Tensor:
    return input.clone()  # an op's result may be no view of what it was given


KERNELS: dict[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "dequantize_bcq": _dequantize_bcq,
    "dequantize_gradients": _dequantize_gradients,
    "fake_quantize": _fake_quantize,
    "fake_quantize_gradients": _fake_quantize_gradients,
    "dynamic_scale": _dynamic_scale,
    "uncalibrated": _uncalibrated,
    "scale_gradient": _scale_gradient,
    "add_outliers": _add_outliers,
    "packed_linear": _packed_linear,
    "packed_linears": _packed_linears,
    "packed_embedding": _packed_embedding,
}
for _name, _kernel in KERNELS.items():
    library.impl(_name, _kernel, "CompositeExplicitAutograd")

CPU_KERNELS: dict[str, Callable[..., Any]] = {}
"""Kernels that stand in for those above where all tensors are plain ones on the CPU."""


def implement_on_cpu(name: str, kernel: Callable[..., Any]) -> None:
    """Run ``kernel``, which takes what the op takes, for calls of op ``name`` on the CPU."""
    CPU_KERNELS[name] = kernel
    library.impl(name, kernel, "CPU")


quantize = torch.ops.prequant.quantize.default
dequantize = torch.ops.prequant.dequantize.default
dequantize_bcq = torch.ops.prequant.dequantize_bcq.default
dequantize_gradients = torch.ops.prequant.dequantize_gradients.default
fake_quantize = torch.ops.prequant.fake_quantize.default
fake_quantize_gradients = torch.ops.prequant.fake_quantize_gradients.default
dynamic_scale = torch.ops.prequant.dynamic_scale.default
uncalibrated = torch.ops.prequant.uncalibrated.default
scale_gradient = torch.ops.prequant.scale_gradient.default
add_outliers = torch.ops.prequant.add_outliers.default
packed_linear = torch.ops.prequant.packed_linear.default
packed_linears = torch.ops.prequant.packed_linears.default
packed_embedding = torch.ops.prequant.packed_embedding.default


def quantized_input(
    input: Tensor, scale: Tensor | None, zero_point: Tensor | None, format: WeightFormat | None
) -> Tensor:
    """:func:`reference.quantized_input`, by way of the ops: they take backends."""
    if format is None:
        return input
    if scale is None:
        scale = dynamic_scale(input, format=str(format))
    return fake_quantize(input, scale, zero_point, format=str(format))
