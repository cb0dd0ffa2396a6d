"""Gradients of the graph ops (registered on import; formulas in ``reference.py``).

The packed ops save packed tensors alone and unpack the weight again in the backward. Everything here is a fixed
sequence of torch and prequant ops, so that ``torch.compile`` can trace a training step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .autograd import register_composite, register_constant, register_gradient
from .formats import Granularity, Scheme, WeightFormat
from .reference import Outliers

Arguments = tuple[Any, ...]
Gradients = tuple["Tensor | None", ...]
Needs = Sequence[bool]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


# ---- simulated ops ---------------------------------------------------------------------------------------------------


def _dequantize_setup(ctx: Any, needs: Needs, arguments: Arguments, options: dict[str, Any]) -> None:
    ctx.format = WeightFormat.parse(options["format"])
    ctx.save_for_backward(*arguments)


def _dequantize_backward(ctx: Any, needs: Needs, gradient: Tensor) -> Gradients:
    codes, scale, zero_point = ctx.saved_tensors
    return None, *_unpacking_gradients(gradient, codes, scale, zero_point, ctx.format, (needs[1], needs[2]))


def _dequantize_bcq_backward(ctx: Any, needs: Needs, gradient: Tensor) -> Gradients:
    planes, alphas = ctx.saved_tensors
    return None, _unpacking_gradients(gradient, planes, alphas, None, ctx.format, (needs[1], False))[0]


def _unpacking_gradients(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: WeightFormat,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """``reference.dequantize_gradients``, by way of the op: it takes backends."""
    asked = (needs[0], needs[1] and zero_point is not None and format.scheme is Scheme.AFFINE)
    found: Iterator[Tensor] = iter(())
    if any(asked):
        operands = (gradient, codes, scale, zero_point)
        found = iter(ops.dequantize_gradients(*operands, format=str(format), needs=asked))
    to_scale, to_zero_point = (next(found) if each else None for each in asked)
    return to_scale, to_zero_point


def _dequantize_gradients(
    gradient: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, format: str, needs: Needs
) -> list[Tensor]:
    """In torch ops, whose gradients are known: second derivatives come from them."""
    options = (WeightFormat.parse(format), (needs[0], needs[1]))
    found = reference.dequantize_gradients(gradient, codes, scale, zero_point, *options)
    return [part for part in found if part is not None]


def _fake_quantize_setup(ctx: Any, needs: Needs, arguments: Arguments, options: dict[str, Any]) -> None:
    _dequantize_setup(ctx, needs, arguments, options)
    ctx.clipped, ctx.scale_gradient = options["clipped"], options["scale_gradient"]


def _fake_quantize_backward(ctx: Any, needs: Needs, gradient: Tensor) -> Gradients:
    input, scale, zero_point = ctx.saved_tensors
    options = (ctx.format, (needs[0], needs[1], needs[2]), ctx.clipped, ctx.scale_gradient)
    return _rounding_gradients(gradient, input, scale, zero_point, *options)


def _rounding_gradients(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: WeightFormat,
    needs: tuple[bool, bool, bool],
    clipped: bool = True,
    scale_gradient: bool = True,
) -> Gradients:
    """``reference.fake_quantize_gradients``, by way of the op: it takes backends, and computes only what is wanted."""
    affine = format.scheme is Scheme.AFFINE
    asked = (needs[0] and affine and clipped, needs[1], needs[2] and affine and zero_point is not None)
    found: Iterator[Tensor] = iter(())
    if any(asked):
        operands, options = (gradient, input, scale, zero_point), {"format": str(format), "needs": asked}
        found = iter(ops.fake_quantize_gradients(*operands, scale_gradient=scale_gradient, **options))
    to_input, to_scale, to_zero_point = (next(found) if each else None for each in asked)
    return gradient if needs[0] and not asked[0] else to_input, to_scale, to_zero_point


def _fake_quantize_gradients(
    gradient: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: str,
    scale_gradient: bool,
    needs: Needs,
) -> list[Tensor]:
    """In torch ops, whose gradients are known: second derivatives come from them."""
    options = (WeightFormat.parse(format), True, scale_gradient, (needs[0], needs[1], needs[2]))
    found = reference.fake_quantize_gradients(gradient, input, scale, zero_point, *options)
    return [part for part in found if part is not None]


def _scale_gradient_setup(ctx: Any, needs: Needs, arguments: Arguments, options: dict[str, Any]) -> None:
    ctx.factor = options["factor"]


def _scale_gradient_backward(ctx: Any, needs: Needs, gradient: Tensor) -> Gradients:
    return (gradient * ctx.factor,)


def _add_outliers_setup(ctx: Any, needs: Needs, arguments: Arguments, options: dict[str, Any]) -> None:
    ctx.save_for_backward(*arguments[1:])
    ctx.replace = options["replace"]


def _add_outliers_backward(ctx: Any, needs: Needs, gradient: Tensor) -> Gradients:
    values, columns, row_offsets = ctx.saved_tensors
    outliers = Outliers(values, columns, row_offsets, ctx.replace)
    to_values = _outlier_gradient(gradient, outliers) if needs[1] else None
    return _dense_gradient(gradient, outliers) if needs[0] else None, to_values, None, None


def _outlier_gradient(gradient: Tensor, outliers: Outliers) -> Tensor:
    """Gradient to the values: the weight's gradient at their positions."""
    return gradient[outliers.positions()].to(outliers.values.dtype)


def _dense_gradient(gradient: Tensor, outliers: Outliers | None) -> Tensor:
    """The part of a weight's gradient that reaches what lies under the outliers: replaced positions get none."""
    if outliers is None or not outliers.replace:
        return gradient
    return gradient.index_put(outliers.positions(), gradient.new_zeros(()))


# ---- packed ops ------------------------------------------------------------------------------------------------------


def _packed_linear_setup(ctx: Any, needs: Needs, arguments: Arguments, options: dict[str, Any]) -> None:
    input, codes, scale, zero_point, values, columns, row_offsets, ctx.replace, bias, input_scale, input_zero = (
        arguments[:11]
    )
    ctx.format, ctx.columns, ctx.activation = options["format"], options["columns"], options["activation"]
    ctx.input_format = WeightFormat.parse(options["input_format"]) if options["input_format"] else None
    ctx.bias_dtype = None if bias is None else bias.dtype
    # The input is read by the weight's gradient and by that of its own quantization, and else need not be kept.
    reads_input = any(needs[i] for i in (2, 3, 4, 9, 10)) or ctx.input_format is not None or bool(ctx.activation)
    ctx.save_for_backward(
        *(
            input if reads_input else None,
            codes,
            scale,
            zero_point,
            values,
            columns,
            row_offsets,
            input_scale,
            input_zero,
            bias if ctx.activation else None,
        )
    )


def _packed_linear_backward(ctx: Any, needs: Needs, gradient: Tensor) -> Gradients:
    input, codes, scale, zero_point, values, columns, row_offsets, input_scale, input_zero, _ = ctx.saved_tensors
    outliers = None if values is None else Outliers(values, columns, row_offsets, ctx.replace)
    # The dispatcher leaves a residual out that is not there.
    to_residual = gradient if len(needs) > 11 and needs[11] else None
    if ctx.activation:
        gradient = _before_activation(ctx, gradient)
    effective_scale = input_scale
    if ctx.input_format is not None and input_scale is None:
        effective_scale = ops.dynamic_scale(input, format=str(ctx.input_format))

    to_scale = to_zero_point = to_values = to_bias = None
    if needs[2] or needs[3] or needs[4]:
        seen = ops.quantized_input(input, effective_scale, input_zero, ctx.input_format)
        to_weight = _matrix(gradient).transpose(0, 1) @ _matrix(seen)
        if needs[2] or needs[3]:
            dense, format = _dense_gradient(to_weight, outliers), WeightFormat.parse(ctx.format)
            wanted = (needs[2], needs[3])
            to_scale, to_zero_point = _unpacking_gradients(dense, codes, scale, zero_point, format, wanted)
        if needs[4] and outliers is not None:
            to_values = _outlier_gradient(to_weight, outliers)
        del to_weight
    if needs[8]:
        to_bias = _matrix(gradient).sum(0).to(ctx.bias_dtype)

    to_input = to_input_scale = to_input_zero = None
    if needs[0] or needs[9] or needs[10]:
        dtype = gradient.dtype if outliers is None else None  # outliers come to a weight that is not rounded yet
        weight = ops.dequantize(codes, scale, zero_point, format=ctx.format, columns=ctx.columns, dtype=dtype)
        if outliers is not None:
            weight = ops.add_outliers(weight, values, columns, row_offsets, replace=ctx.replace)
        to_input = gradient @ weight.to(gradient.dtype)
        if ctx.input_format is not None:
            to_input, to_input_scale, to_input_zero = _rounding_gradients(
                *(to_input, input, effective_scale, input_zero, ctx.input_format),
                needs=(needs[0], needs[9], needs[10]),
            )
    return (
        *(to_input, None, to_scale, to_zero_point, to_values, None, None, None),
        *(to_bias, to_input_scale, to_input_zero, to_residual),
    )


def _before_activation(ctx: Any, gradient: Tensor) -> Tensor:
    """The gradient to what an activation was given, which is computed again instead of kept."""
    input, codes, scale, zero_point, values, columns, row_offsets, input_scale, input_zero, bias = ctx.saved_tensors
    outliers = (values, columns, row_offsets, ctx.replace)
    options = {"format": ctx.format, "columns": ctx.columns}
    if ctx.input_format is not None:
        options["input_format"] = str(ctx.input_format)
    operands = (input, codes, scale, zero_point, *outliers, bias, input_scale, input_zero)
    before = ops.packed_linear(*operands, **options)
    if ctx.activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, before, 0)
    return torch.ops.aten.gelu_backward(gradient, before, approximate="tanh" if "tanh" in ctx.activation else "none")


def _packed_linears(*arguments: Any, **options: Any) -> list[Tensor]:
    """Gradients of several linears are those of each: no part of the backward is shared."""
    return [ops.packed_linear(*each) for each in ops.linears_of(*arguments, **options)]


def _packed_embedding_setup(ctx: Any, needs: Needs, arguments: Arguments, options: dict[str, Any]) -> None:
    ctx.format, ctx.padding_idx = WeightFormat.parse(options["format"]), options["padding_idx"]
    ctx.replace = arguments[7]
    ctx.save_for_backward(*arguments[:7])


def _packed_embedding_backward(ctx: Any, needs: Needs, gradient: Tensor) -> Gradients:
    ids, codes, scale, zero_point, values, columns, row_offsets = ctx.saved_tensors
    rows = ids.flatten()
    if ctx.padding_idx >= 0:  # the padding row gets no gradient, as in aten.embedding
        gradient = gradient.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
    slots, gradient = _summed_by_row(rows, gradient.reshape(rows.shape[0], gradient.shape[-1]), codes.shape[-2])
    to_scale = to_zero_point = to_values = None
    if values is not None:
        outlier_rows, outlier_columns = Outliers(values, columns, row_offsets, ctx.replace).positions()
        positions = (slots[outlier_rows], outlier_columns)
        if needs[4]:
            to_values = gradient[positions].to(values.dtype)
        if ctx.replace:
            gradient = gradient.index_put(positions, gradient.new_zeros(()))
    if needs[2] or needs[3]:
        taken = [reference.taken_scales(rows, t, ctx.format) for t in (scale, zero_point)]
        codes, dense, wanted = codes.index_select(-2, rows), gradient[:-1], (needs[2], needs[3])
        parts = _unpacking_gradients(dense, codes, taken[0], taken[1], ctx.format, wanted)
        to_scale, to_zero_point = (
            None if part is None or whole is None else _spread_by_row(part, rows, whole, ctx.format)
            for part, whole in zip(parts, (scale, zero_point), strict=True)
        )
    return None, None, to_scale, to_zero_point, to_values, None, None, None


def _summed_by_row(rows: Tensor, gradient: Tensor, table_rows: int) -> tuple[Tensor, Tensor]:
    """Add up the gradients ``[n, columns]`` of look-ups of the same row, at the place of the first of them.

    Returns that place for every row of the table, ``[table_rows]``, and the sums ``[n + 1, columns]``; rows that were
    not looked up have place ``n``, where the sum is 0. Sizes depend on no value, and no ``[table_rows, columns]``
    matrix is made.
    """
    n = rows.shape[0]
    order = torch.arange(n, device=rows.device)
    slots = torch.full((table_rows,), n, device=rows.device).scatter_reduce(0, rows.to(torch.int64), order, "amin")
    sums = gradient.new_zeros(n + 1, gradient.shape[-1])
    if gradient.is_cuda:  # where index_add adds in any order, and this sorts first
        return slots, sums.index_put((slots[rows],), gradient, accumulate=True)
    return slots, sums.index_add(0, slots[rows], gradient)


def _spread_by_row(part: Tensor, rows: Tensor, whole: Tensor, format: WeightFormat) -> Tensor:
    """Gradients to the scales of some rows, as a gradient to the scales of all."""
    if format.granularity is Granularity.TENSOR:
        return part
    return torch.zeros_like(whole).index_add(whole.dim() - 2, rows, part.to(whole.dtype))


register_gradient("dequantize", _dequantize_setup, _dequantize_backward)
register_gradient("dequantize_bcq", _dequantize_setup, _dequantize_bcq_backward)
register_composite("dequantize_gradients", _dequantize_gradients)
register_gradient("fake_quantize", _fake_quantize_setup, _fake_quantize_backward)
register_composite("fake_quantize_gradients", _fake_quantize_gradients)
register_gradient("scale_gradient", _scale_gradient_setup, _scale_gradient_backward)
register_gradient("add_outliers", _add_outliers_setup, _add_outliers_backward)
register_gradient("packed_linear", _packed_linear_setup, _packed_linear_backward)
register_composite("packed_linears", _packed_linears)
register_gradient("packed_embedding", _packed_embedding_setup, _packed_embedding_backward)
register_constant("dynamic_scale")  # as DeepSpeed's and Huawei Noah's quantizers have it
