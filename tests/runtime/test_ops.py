"""The simulated ops against slow float64 NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from prequant.runtime import FormatError, PrequantError, Scheme, WeightFormat, ops
from prequant.runtime.packing import pack

from .oracle import (
    AFFINE,
    BCQ,
    COLUMNS,
    FEW,
    FORMATS,
    ROWS,
    SMALL,
    Weight,
    assert_close,
    rounding_case,
    strided,
    true_codes,
    true_weight,
)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dequantize(format: WeightFormat) -> None:
    weight = Weight(format)
    result = ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options())
    assert result.dtype == torch.float32
    assert_close(result, weight.true)
    double = ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options(), dtype=torch.float64)
    assert torch.equal(double, result.double())


@pytest.mark.parametrize("format", BCQ, ids=str)
def test_dequantize_bcq(format: WeightFormat) -> None:
    weight = Weight(format)
    assert_close(ops.dequantize_bcq(weight.codes, weight.scale, **weight.options()), weight.true)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", FEW, ids=str)
def test_values_have_the_type_of_the_scale_unless_told(format: WeightFormat, dtype: torch.dtype) -> None:
    weight = Weight(format)
    zero_point = None if weight.zero_point is None else weight.zero_point.to(dtype).round()
    result = ops.dequantize(weight.codes, weight.scale.to(dtype), zero_point, **weight.options())
    assert result.dtype == dtype
    cast = ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options(), dtype=dtype)
    assert cast.dtype == dtype
    assert_close(cast, weight.true, tolerance=2 * torch.finfo(dtype).eps + 1e-7)


@pytest.mark.parametrize("format", AFFINE + SMALL, ids=str)
def test_quantize(format: WeightFormat) -> None:
    input, scale, zero_point = rounding_case(format)
    expected = true_codes(input.numpy(), scale.numpy(), None if zero_point is None else zero_point.numpy(), format)
    assert torch.equal(
        ops.quantize(input, scale, zero_point, format=str(format)), pack(torch.from_numpy(expected), format)
    )
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize("format", AFFINE + SMALL, ids=str)
def test_fake_quantize(format: WeightFormat) -> None:
    input, scale, zero_point = rounding_case(format)
    zero = None if zero_point is None else zero_point.numpy()
    codes = true_codes(input.numpy(), scale.numpy(), zero, format)
    result = ops.fake_quantize(input, scale, zero_point, format=str(format))
    assert_close(result, true_weight(codes, scale.numpy(), zero, format))
    packed = ops.quantize(input, scale, zero_point, format=str(format))
    assert torch.equal(result, ops.dequantize(packed, scale, zero_point, format=str(format), columns=COLUMNS))


def test_ties_go_to_the_even_code() -> None:
    input = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
    result = ops.fake_quantize(input, torch.ones(1, 1), None, format="affine4:row")
    assert result.tolist() == [[-2.0, 0.0, 0.0, 2.0, 2.0]]


def test_zero_is_not_a_third_binary_level() -> None:
    input = torch.tensor([[0.0, -0.0, -1e-30, 1e-30]])
    assert ops.fake_quantize(input, torch.tensor([[0.5]]), None, format="binary:row").tolist() == [
        [0.5, 0.5, -0.5, 0.5]
    ]


def test_a_ternary_threshold_decides_what_is_zero() -> None:
    input = torch.tensor([[-0.8, -0.7, 0.2, 0.7, 0.71]])
    threshold = torch.tensor([[0.7]])
    assert ops.fake_quantize(input, torch.tensor([[2.0]]), threshold, format="ternary:row").tolist() == [
        [-2, 0, 0, 0, 2]
    ]


@pytest.mark.parametrize("text", ["affine4:row", "affine4:row:asym", "ternary:row", "binary:row"])
def test_nan_stays_nan_and_is_never_coded(text: str) -> None:
    input = torch.tensor([[0.3, float("nan"), -0.4]])
    zero_point = torch.tensor([[3.0]]) if text.endswith("asym") else None
    result = ops.fake_quantize(input, torch.tensor([[0.1]]), zero_point, format=text)
    assert result.isnan().tolist() == [[False, True, False]]
    with pytest.raises(FormatError, match="nan"):
        ops.quantize(input, torch.tensor([[0.1]]), zero_point, format=text)


def test_infinity_is_clipped() -> None:
    input = torch.tensor([[float("inf"), float("-inf")]])
    assert ops.fake_quantize(input, torch.tensor([[0.5]]), None, format="affine4:row").tolist() == [[3.5, -4.0]]


@pytest.mark.parametrize("text", ["affine4:row", "affine8:tensor", "ternary:row", "binary:row"])
def test_rows_of_zeros_with_a_scale_of_zero_stay_zero(text: str) -> None:
    codes = ops.quantize(torch.zeros(1, 4), torch.zeros(1, 1), None, format=text)
    assert ops.dequantize(codes, torch.zeros(1, 1), None, format=text, columns=4).abs().tolist() == [[0.0] * 4]


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1e20, 3e37])
def test_scales_of_any_magnitude(magnitude: float) -> None:
    levels = torch.tensor([[-8.0, -3.0, 0.0, 1.0, 7.0]])
    scale = torch.tensor([[magnitude]])
    input = levels * scale
    codes = ops.quantize(input, scale, None, format="affine4:row")
    assert torch.equal(ops.dequantize(codes, scale, None, format="affine4:row", columns=5), input)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["affine8:row", "affine8:tensor", "affine4:row"])
def test_half_precision_inputs_are_rounded_as_exactly_as_others(text: str, dtype: torch.dtype) -> None:
    """8 bits of code do not fit bfloat16's 8 bits of mantissa, if the sum with the zero point is taken there."""
    input = torch.randn(4, 64).to(dtype)
    scale = ops.dynamic_scale(input, format=text)
    assert scale.dtype == torch.float32
    result = ops.fake_quantize(input, scale, None, format=text)
    assert result.dtype == dtype
    exact = ops.fake_quantize(input.double(), scale.double(), None, format=text)
    assert torch.equal(result, exact.to(dtype))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
def test_dynamic_scale(bits: int, shape: tuple[int, ...]) -> None:
    input = torch.randn(shape)
    per_token = ops.dynamic_scale(input, format=f"affine{bits}:row")
    tokens = np.abs(input.numpy().astype(float)).reshape(-1, 7)
    expected = np.array([token.max() / (2 ** (bits - 1) - 1) for token in tokens])
    assert_close(per_token, expected.reshape(*shape[:-1], 1))
    per_tensor = ops.dynamic_scale(input, format=f"affine{bits}:tensor")
    assert_close(per_tensor, np.full([1] * len(shape), expected.max() if expected.size else 1.0))
    if input.numel():
        level = float(ops.fake_quantize(input, per_tensor, None, format=f"affine{bits}:tensor").abs().max())
        assert level == pytest.approx(float(input.abs().max()), rel=1e-6)  # nothing is clipped


def test_dynamic_scale_of_nothing_is_one_and_of_nan_is_seen() -> None:
    input = torch.tensor([[0.0, 0.0], [1e-42, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    scale = ops.dynamic_scale(input, format="affine8:row")
    assert scale[:2].tolist() == [[1.0], [1.0]]
    assert not bool(torch.isfinite(scale[2:]).any())
    seen = ops.fake_quantize(input, scale, None, format="affine8:row")
    assert torch.isnan(seen).any(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("text", ["affine8:row:asym", "affine8:group4", "ternary:row", "binary:tensor", "bcq2:row"])
def test_other_dynamic_scales_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match=f"not {text}"):
        ops.dynamic_scale(torch.randn(2, 4), format=text)


@pytest.mark.parametrize("op", [ops.quantize, ops.fake_quantize])
def test_rounding_to_bcq_is_refused(op: Callable[..., Tensor]) -> None:
    with pytest.raises(FormatError, match="solver"):
        op(torch.randn(2, 4), torch.ones(2, 2, 1), None, format="bcq2:row")


def test_an_activation_without_a_scale_does_not_run() -> None:
    with pytest.raises(PrequantError, match=r"'encoder\.0\.input' has no scale yet"):
        ops.uncalibrated(torch.randn(2), format="affine8:tensor", observer="minmax", name="encoder.0.input")


@pytest.mark.parametrize("index_type", [torch.uint16, torch.int32])
@pytest.mark.parametrize("value_type", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["add", "replace"])
def test_add_outliers(kind: str, value_type: torch.dtype, index_type: torch.dtype) -> None:
    weight = Weight(WeightFormat.affine(4), outliers=kind)
    assert weight.values is not None and weight.column_indices is not None and weight.row_offsets is not None
    values = weight.values.to(value_type)
    dense = torch.randn(ROWS, COLUMNS)
    result = ops.add_outliers(
        dense, values, weight.column_indices.to(index_type), weight.row_offsets, replace=kind == "replace"
    )
    expected = dense.double().numpy().copy()
    offsets = weight.row_offsets.tolist()
    for row in range(ROWS):
        for i in range(offsets[row], offsets[row + 1]):
            at = row, int(weight.column_indices[i])
            expected[at] = float(values[i]) + (expected[at] if kind == "add" else 0)
    assert_close(result, expected)
    assert result.dtype == dense.dtype


@pytest.mark.parametrize("format", [f for f in FEW if f.scheme is not Scheme.BCQ], ids=str)
def test_strides_of_what_is_rounded_do_not_matter(format: WeightFormat) -> None:
    input, scale, zero_point = rounding_case(format)
    codes = ops.quantize(input, scale, zero_point, format=str(format))
    values = ops.fake_quantize(input, scale, zero_point, format=str(format))
    for view in strided(input):
        assert torch.equal(ops.quantize(view, scale, zero_point, format=str(format)), codes)
        assert torch.equal(ops.fake_quantize(view, scale, zero_point, format=str(format)), values)
