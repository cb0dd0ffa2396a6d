"""Tensors that do not fit their format are refused by name, shape and type, before any kernel sees them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.runtime import FormatError, WeightFormat, checks, ops
from prequant.runtime.native import NativeLibraryError

from .oracle import COLUMNS, ROWS, Weight


def packed_call(**changes: Any) -> Callable[[], Tensor]:
    weight = Weight(WeightFormat.parse(changes.pop("format", "affine4:row")), outliers="add")
    for name in [name for name in changes if hasattr(weight, name)]:
        setattr(weight, name, changes.pop(name))
    input = changes.pop("input", torch.randn(2, COLUMNS))
    bias, scale = changes.pop("bias", None), changes.pop("input_scale", ())
    assert set(changes) <= {"input_format"}
    return lambda: weight.linear(input, bias, *scale, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.randn(2, COLUMNS - 1)}, r"an input \[2, 22\] does not fit a weight with 23 columns"),
        ({"input": torch.tensor(1.0)}, r"an input \[\] does not fit"),
        ({"input": torch.ones(2, COLUMNS, dtype=torch.int64)}, "of floats, not torch.int64"),
        ({"bias": torch.randn(ROWS + 1)}, r"a bias \[6\] does not fit a weight with 5 rows"),
        ({"bias": torch.randn(1)}, r"a bias \[1\]"),
        ({"columns": 25}, r"codes of affine4:row with 25 columns have a shape like \[5, 13\], not \[5, 12\]"),
        ({"codes": torch.zeros(12, dtype=torch.uint8)}, r"have a shape like \[1, 12\], not \[12\]"),
        ({"codes": torch.zeros(1, ROWS, 12, dtype=torch.uint8)}, r"not \[1, 5, 12\]"),
        ({"codes": torch.zeros(ROWS, 12)}, "codes are uint8, not torch.float32"),
        ({"scale": torch.ones(ROWS)}, r"go with a scale \[5, 1\], not \[5\]"),
        ({"scale": torch.ones(1, 1)}, r"go with a scale \[5, 1\], not \[1, 1\]"),
        ({"scale": torch.ones(ROWS, 1, dtype=torch.int32)}, "scales are floats, not torch.int32"),
        ({"zero_point": torch.ones(ROWS, 1)}, "affine4:row is symmetric and takes no zero point"),
        ({"format": "affine4:row:asym", "zero_point": None}, "affine4:row:asym is asymmetric and needs a zero point"),
        (
            {"format": "affine4:row:asym", "zero_point": torch.ones(1, 1)},
            r"has the shape of the scale, \[5, 1\], not \[1, 1\]",
        ),
        ({"format": "bcq2:row", "codes": torch.zeros(3, ROWS, 3, dtype=torch.uint8)}, r"a shape like \[2, 5, 3\]"),
        ({"column_indices": None}, "outlier values come with their columns and row offsets"),
        ({"row_offsets": None}, "outlier values come with their columns and row offsets"),
        ({"values": torch.randn(10)}, r"values \[10\] and columns \[11\] must be vectors of one length"),
        ({"row_offsets": torch.zeros(ROWS, dtype=torch.int32)}, r"row offsets of 5 rows have shape \[6\], not \[5\]"),
        ({"column_indices": torch.zeros(11)}, "uint16 or int32 columns"),
        ({"row_offsets": torch.zeros(ROWS + 1)}, "int32 row offsets"),
        ({"input_scale": (torch.ones(1, 1),)}, "needs an input format"),
        ({"input_scale": (None, torch.ones(1, 1)), "input_format": "affine8:tensor"}, "needs an input scale"),
        (
            {"input_scale": (torch.ones(2, 2),), "input_format": "affine8:tensor"},
            r"goes with a scale \[1\], not \[2, 2\]",
        ),
        (
            {"input_scale": (torch.ones(3, 1),), "input_format": "affine8:row"},
            r"goes with a scale \[2, 1\], not \[3, 1\]",
        ),
        ({"input_scale": (torch.ones(1, 1),), "input_format": "affine8:tensor:asym"}, "needs a zero point"),
        ({"input_format": "affine8:tensor:asym"}, "dynamic scales are for symmetric"),
        ({"input_format": "int8"}, "'int8' is not a weight format"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    assert packed_call()().shape == (2, ROWS)
    with pytest.raises(FormatError, match=message):
        packed_call(**changes)()


@pytest.mark.parametrize("id_type", [torch.float32, torch.bool, torch.uint8])
def test_ids_of_another_type_are_refused(id_type: torch.dtype) -> None:
    with pytest.raises(FormatError, match="embedding ids are int64 or int32"):
        Weight(WeightFormat.affine(4)).embedding(torch.ones(2).to(id_type))


def test_tensors_on_two_devices_are_refused() -> None:
    codes = torch.zeros(ROWS, 12, dtype=torch.uint8, device="meta")
    for check in (
        lambda: checks.linear(torch.ones(2, COLUMNS), codes, COLUMNS, None),
        lambda: checks.ids(torch.tensor([1]), codes),
    ):
        with pytest.raises(FormatError, match="the input is on cpu, the codes on meta"):
            check()


def test_outliers_outside_of_the_matrix_raise() -> None:
    """Values are not looked at before they are used, but nothing is read or written outside either."""
    columns = torch.full((11,), COLUMNS, dtype=torch.int32)
    with pytest.raises((IndexError, NativeLibraryError)):
        packed_call(column_indices=columns)()


@pytest.mark.parametrize(
    ("format", "scale", "message"),
    [
        ("affine4:row", (3, 1), r"an input \[2, 8\] goes with a scale \[2, 1\], not \[3, 1\]"),
        ("affine4:row", (2, 2), r"not \[2, 2\]"),
        ("affine4:row", (1,), r"not \[1\]"),
        ("affine4:group3", (2, 2), r"goes with a scale \[2, 3\], not \[2, 2\]"),
        ("affine4:tensor", (2, 1), r"goes with a scale \[1\], not \[2, 1\]"),
        ("affine4:row:asym", (2, 1), "needs a zero point"),
    ],
)
def test_scales_that_do_not_fit_an_input_are_refused(format: str, scale: tuple[int, ...], message: str) -> None:
    for op in (ops.quantize, ops.fake_quantize):
        with pytest.raises(FormatError, match=message):
            op(torch.randn(2, 8), torch.ones(scale), None, format=format)


@pytest.mark.parametrize("scale", [(), (1,), (1, 1), (1, 1, 1)])
def test_a_scale_per_tensor_may_have_any_dimensions(scale: tuple[int, ...]) -> None:
    for shape in ((8,), (2, 8)):
        input = torch.randn(shape)
        result = ops.fake_quantize(input, torch.full(scale, 0.25), None, format="affine8:tensor")
        assert torch.equal(result, torch.clamp(torch.round(input * 4), -128, 127) / 4)


def test_one_scale_may_serve_all_tokens() -> None:
    input = torch.randn(2, 3, 8)
    result = ops.fake_quantize(input, torch.full((1, 1, 1), 0.25), None, format="affine8:row")
    assert torch.equal(result, torch.clamp(torch.round(input * 4), -128, 127) / 4)


def test_a_scale_per_tensor_keeps_float32_precision_for_half_inputs() -> None:
    """A tensor without dimensions would lose against the input's type in torch's promotion."""
    input = torch.randn(64).to(torch.bfloat16) * 10
    scale = torch.tensor(0.1)
    expected = torch.clamp(torch.round(input.double() / scale.double()), -128, 127) * scale.double()
    assert torch.equal(ops.fake_quantize(input, scale, None, format="affine8:tensor"), expected.to(torch.bfloat16))
