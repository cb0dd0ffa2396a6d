"""The ops under ``torch.autocast``: linears in its precision, all else in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from prequant.runtime import ops

from .oracle import FEW, Weight

DTYPES = [torch.bfloat16, torch.float16]
FORMAT = "affine4:row"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def packed(weight: Weight, input: Tensor, **options: Any) -> Tensor:
    return ops.packed_linear(
        *(input, *weight.operands(), None, None, None), format=str(weight.format), columns=weight.columns, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FEW, ids=str)
def test_a_packed_linear_is_that_of_a_lower_input(format: Any, dtype: torch.dtype) -> None:
    weight = Weight(format, outliers="add")
    input, residual = torch.randn(3, weight.columns), torch.randn(3, len(weight.true))
    wanted = packed(weight, input.to(dtype), residual=residual.to(dtype))
    with torch.autocast("cpu", dtype):
        found = packed(weight, input, residual=residual)
    assert found.dtype == dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("count", [1, 3])
def test_packed_linears_are_those_of_a_lower_input(count: int) -> None:
    made = [Weight(FEW[0], rows=4 + i) for i in range(count)]
    input = torch.randn(3, made[0].columns)

    def call(input: Tensor) -> list[Tensor]:
        lists = [list(each) for each in zip(*(weight.operands() for weight in made), strict=True)]
        none = [None] * count
        options = {"formats": [str(FEW[0])] * count, "activations": [""] * count, "columns": made[0].columns}
        return ops.packed_linears(input, *lists, none, None, None, **options)

    wanted = call(input.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        found = call(input)
    assert all(each.dtype == torch.bfloat16 for each in found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_gradients_are_those_of_a_linear_with_the_unpacked_weight() -> None:
    weight = Weight(FEW[0])
    scale, twin = (weight.scale.clone().requires_grad_() for _ in range(2))
    input, other = (torch.linspace(-1, 1, 3 * weight.columns).view(3, -1).requires_grad_() for _ in range(2))
    bias, its = (torch.zeros(len(weight.true), requires_grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        operands = weight.codes, scale, None, None, None, None, False
        found = ops.packed_linear(input, *operands, bias, None, None, format=str(weight.format), columns=weight.columns)
        unpacked = ops.dequantize(weight.codes, twin, None, format=str(weight.format), columns=weight.columns)
        wanted = linear(other, unpacked, its)
    for output in (found, wanted):
        output.float().square().sum().backward()
    for ours, theirs in ((scale, twin), (input, other), (bias, its)):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2, atol=2e-2 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_in_float32(dtype: torch.dtype) -> None:
    input, scale = torch.randn(4, 24).to(dtype), torch.rand(4, 1) + 0.1
    wanted = ops.fake_quantize(input.float(), scale, None, format=FORMAT)
    own = ops.dynamic_scale(input.float(), format=FORMAT)
    with torch.autocast("cpu", dtype):
        found = ops.fake_quantize(input, scale, None, format=FORMAT)
        assert torch.equal(ops.dynamic_scale(input, format=FORMAT), own)
        codes = ops.quantize(input, scale, None, format=FORMAT)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert torch.equal(codes, ops.quantize(input.float(), scale, None, format=FORMAT))


def test_it_is_off_outside() -> None:
    weight = Weight(FEW[0])
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        found = packed(weight, torch.randn(2, weight.columns))
    assert found.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        double = ops.fake_quantize(torch.randn(2, 4).double(), torch.ones(2, 1).double(), None, format=FORMAT)
    assert double.dtype == torch.float64
