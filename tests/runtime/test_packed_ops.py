"""The packed ops against slow float64 NumPy, and against the simulated expression that they stand for."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prequant.runtime import FormatError, Granularity, WeightFormat, ops

from .oracle import COLUMNS, FEW, FORMATS, ROWS, Weight, assert_close, strided, true_codes, true_weight


@pytest.mark.parametrize("outliers", ["", "add", "replace"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_linear(format: WeightFormat, outliers: str) -> None:
    weight = Weight(format, outliers=outliers)
    input, bias = torch.randn(3, COLUMNS), torch.randn(ROWS)
    expected = input.double().numpy() @ weight.true.T
    assert_close(weight.linear(input), expected, 2e-6)
    assert_close(weight.linear(input, bias), expected + bias.double().numpy(), 2e-6)


@pytest.mark.parametrize(
    "shape",
    [(COLUMNS,), (1, COLUMNS), (0, COLUMNS), (4, COLUMNS), (2, 3, COLUMNS), (2, 0, COLUMNS), (2, 1, 2, COLUMNS)],
)
@pytest.mark.parametrize("format", FEW, ids=str)
def test_packed_linear_of_any_shape(format: WeightFormat, shape: tuple[int, ...]) -> None:
    weight = Weight(format, outliers="add")
    input = torch.randn(shape)
    result = weight.linear(input, torch.zeros(ROWS))
    assert result.shape == (*shape[:-1], ROWS)
    assert result.is_contiguous()
    assert_close(result, input.double().numpy() @ weight.true.T, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", FEW, ids=str)
def test_packed_linear_in_the_type_of_its_input(format: WeightFormat, dtype: torch.dtype) -> None:
    weight = Weight(format, outliers="replace")
    input, bias = torch.randn(4, COLUMNS).to(dtype), torch.randn(ROWS)
    result = weight.linear(input, bias)
    assert result.dtype == dtype
    rounded = (
        torch.from_numpy(weight.true).float().to(dtype).double().numpy()
    )  # the weight that a float layer would hold
    expected = input.double().numpy() @ rounded.T + bias.to(dtype).double().numpy()
    assert_close(result, expected, 4 * max(torch.finfo(dtype).eps, 1e-6))


def activation_cases() -> Iterator[tuple[str, bool, bool]]:
    for bits in (4, 8):
        yield f"affine{bits}:row", False, False
        yield f"affine{bits}:tensor", False, False
        yield f"affine{bits}:tensor", True, False
        yield f"affine{bits}:tensor:asym", True, True


@pytest.mark.parametrize("shape", [(COLUMNS,), (4, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)])
@pytest.mark.parametrize(("activation", "static", "with_zero_point"), list(activation_cases()))
@pytest.mark.parametrize("format", FEW, ids=str)
def test_packed_linear_with_quantized_input(
    format: WeightFormat, activation: str, static: bool, with_zero_point: bool, shape: tuple[int, ...]
) -> None:
    weight = Weight(format, outliers="add")
    input, bias = torch.randn(shape), torch.randn(ROWS)
    parsed = WeightFormat.parse(activation)
    tokens = input.double().numpy().reshape(-1, COLUMNS)
    levels = 2 ** (parsed.bits - 1) - 1
    operands: tuple[Tensor, ...] = ()
    zero = None
    if static:
        scale = torch.tensor([[2.0**-4]])
        operands = (scale,)
        if with_zero_point:
            operands = (scale, torch.tensor([[3.0]]))
            zero = np.array([[3.0]])
        seen_scale = scale.numpy()
    elif parsed.granularity is Granularity.ROW:
        seen_scale = np.abs(tokens).max(1, keepdims=True) / levels
    else:
        seen_scale = np.full((1, 1), np.abs(tokens).max(initial=0) / levels)
    seen = (
        true_weight(true_codes(tokens, seen_scale, zero, parsed), seen_scale, zero, parsed) if tokens.size else tokens
    )
    expected = (seen @ weight.true.T + bias.double().numpy()).reshape(*shape[:-1], ROWS)
    assert_close(weight.linear(input, bias, *operands, input_format=activation), expected, 4e-6)


@pytest.mark.parametrize("outliers", ["", "add", "replace"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_packed_embedding(format: WeightFormat, outliers: str) -> None:
    weight = Weight(format, outliers=outliers)
    ids = torch.tensor([[4, 0, 4], [2, 2, 1]])
    assert_close(weight.embedding(ids), weight.true[ids.numpy()])


@pytest.mark.parametrize("id_type", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (6,), (2, 0), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("format", FEW, ids=str)
def test_packed_embedding_of_any_shape(format: WeightFormat, shape: tuple[int, ...], id_type: torch.dtype) -> None:
    weight = Weight(format, outliers="replace")
    ids = torch.randint(0, ROWS, shape).to(id_type)
    result = weight.embedding(ids)
    assert result.is_contiguous()
    assert_close(result, weight.true[ids.numpy()])


@pytest.mark.parametrize("format", FEW, ids=str)
def test_a_table_of_one_row(format: WeightFormat) -> None:
    weight = Weight(format, rows=1, outliers="add", nnz=2)
    assert_close(weight.embedding(torch.tensor([0, 0])), weight.true[[0, 0]])
    assert_close(weight.linear(torch.ones(1, COLUMNS)), weight.true.sum(1, keepdims=True), 2e-6)


def test_packed_embedding_in_a_type_of_choice() -> None:
    weight = Weight(WeightFormat.affine(4))
    result = weight.embedding(torch.tensor([1]), dtype=torch.bfloat16)
    assert result.dtype == torch.bfloat16
    assert_close(result, weight.true[[1]], 0.01)


@pytest.mark.parametrize(
    ("ids", "reach"), [([0, ROWS], "0 to 5"), ([-1, 2], "-1 to 2"), ([2**40], f"{2**40} to {2**40}")]
)
def test_ids_outside_of_the_table_raise(ids: list[int], reach: str) -> None:
    with pytest.raises(IndexError, match=f"reach from {reach}; the table has rows 0 to 4"):
        Weight(WeightFormat.affine(4)).embedding(torch.tensor(ids))


@pytest.mark.usefixtures("reference_kernels")
@pytest.mark.parametrize("format", FEW, ids=str)
def test_packed_ops_give_the_very_numbers_of_the_simulated_expression(format: WeightFormat) -> None:
    weight = Weight(format, rows=16, columns=48, outliers="add")
    assert weight.values is not None
    dense = ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options())
    dense = ops.add_outliers(dense, weight.values, weight.column_indices, weight.row_offsets, replace=weight.replace)
    input, bias = torch.randn(7, 48), torch.randn(16)
    scale = ops.dynamic_scale(input, format="affine8:row")
    simulated = torch.nn.functional.linear(ops.fake_quantize(input, scale, None, format="affine8:row"), dense, bias)
    assert torch.equal(weight.linear(input, bias, input_format="affine8:row"), simulated)
    ids = torch.randint(0, 16, (2, 5))
    assert torch.equal(weight.embedding(ids), torch.nn.functional.embedding(ids, dense))


@pytest.mark.parametrize("format", [*FEW, WeightFormat.affine(8)], ids=str)
def test_strides_do_not_matter(format: WeightFormat) -> None:
    weight = Weight(format, outliers="add")
    input, ids, bias = torch.randn(2, 3, COLUMNS), torch.randint(0, ROWS, (2, 3)), torch.randn(ROWS)
    linear = weight.linear(input, bias, input_format="affine8:row")
    embedding, dense = (
        weight.embedding(ids),
        ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options()),
    )
    for view in strided(input):
        assert torch.allclose(weight.linear(view, bias, input_format="affine8:row"), linear, atol=1e-5)
    for view in strided(ids):
        assert torch.equal(weight.embedding(view), embedding)
    for name in ("codes", "scale", "zero_point", "values", "column_indices", "row_offsets"):
        original = getattr(weight, name)
        for view in [] if original is None else strided(original):
            setattr(weight, name, view)
            assert torch.equal(weight.linear(input, bias, input_format="affine8:row"), linear), name
            assert torch.equal(weight.embedding(ids), embedding), name
            assert torch.equal(
                ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options()), dense
            ), name
        setattr(weight, name, original)


def test_no_op_writes_to_its_arguments() -> None:
    for format in FEW:
        weight = Weight(format, outliers="replace")
        arguments = [
            torch.randn(3, COLUMNS),
            torch.randn(ROWS),
            *(t for t in weight.operands() if isinstance(t, Tensor)),
        ]
        before = [argument.clone() for argument in arguments]
        weight.linear(arguments[0], arguments[1], input_format="affine8:row")
        weight.embedding(torch.tensor([1, 1, 3]))
        ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options())
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


# ---- epilogues -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_format", ["", "affine8:row"])
@pytest.mark.parametrize("activation", ["", "relu", "gelu", "gelu_tanh"])
def test_an_epilogue_computes_and_learns_as_its_parts_do(activation: str, input_format: str) -> None:
    weight = Weight(WeightFormat.affine(4), outliers="add")
    assert weight.values is not None
    residual, bias = torch.randn(7, ROWS), torch.randn(ROWS)
    trained = [torch.randn(7, COLUMNS), residual, bias, weight.scale, weight.values]
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda output: output,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    }
    results = []
    for fused in (True, False):
        for tensor in trained:
            tensor.requires_grad_().grad = None
        if fused:
            options: dict[str, Any] = {"activation": activation, "residual": residual}
            output = weight.linear(trained[0], bias, input_format=input_format, **options)
        else:
            output = parts[activation](weight.linear(trained[0], bias, input_format=input_format)) + residual
        output.square().sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in trained)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_an_epilogue_that_does_not_fit_is_refused() -> None:
    weight, input = Weight(WeightFormat.affine(4)), torch.randn(3, COLUMNS)
    with pytest.raises(FormatError, match=r"activation 'silu' is none of '', 'relu', 'gelu', 'gelu_tanh'"):
        weight.linear(input, activation="silu")
    for residual in (torch.randn(ROWS), torch.randn(3, ROWS + 1), torch.randn(3, ROWS).double()):
        with pytest.raises(FormatError, match=r"a residual \[.*\] of torch.float.. does not fit a result \[3, 5\]"):
            weight.linear(input, residual=residual)
