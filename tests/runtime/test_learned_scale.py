import math

import pytest
import torch

from prequant.runtime import WeightFormat, ops

FORMATS = ["affine4:row", "affine3:tensor", "affine4:group4", "affine4:row:asym", "ternary:row", "binary:row"]


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def operands(text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    format = WeightFormat.parse(text)
    shape = format.scale_shape(5, 12)
    scale = torch.rand(shape, dtype=torch.float64) + 0.2
    zero_point = None if format.symmetric else torch.randint(3, 12, shape).double()
    return torch.randn(5, 12, dtype=torch.float64), scale, zero_point


@pytest.mark.parametrize("text", FORMATS)
def test_a_scale_that_crossed_zero_works_by_its_magnitude(text: str) -> None:
    input, scale, zero_point = operands(text)
    gradient = torch.randn_like(input)
    grads = []
    for sign in (1, -1):
        signed = (sign * scale).requires_grad_()
        output = ops.fake_quantize(input, signed, zero_point, format=text)
        output.backward(gradient)
        grads.append((output.detach(), gradient_of(signed)))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], -grads[1][1])
    assert bool(grads[0][1].abs().sum() > 0)


def test_a_scale_of_exactly_zero_gives_numbers() -> None:
    input, scale = torch.tensor([[0.0, 1.0, -2.0]], requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    output = ops.fake_quantize(input, scale, None, format="affine4:row")
    output.sum().backward()
    assert bool(torch.isfinite(output).all()) and float(output.detach().abs().max()) < 1e-30
    assert bool(torch.isfinite(gradient_of(scale)).all())


def test_lsq_gradient_of_a_hand_worked_row() -> None:
    # affine3: levels -4 to 3. x / s = 0.6, 1.0, 9.0, -7.0: round inside, clipped to 3 and to -4 outside.
    input = torch.tensor([[0.3, 0.5, 4.5, -3.5]], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    ops.fake_quantize(input, scale, None, format="affine3:row").backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double())
    expected = (1 * (1 - 0.6) + 2 * 0.0 + 3 * 3 + 4 * -4) / math.sqrt(4 * 3)
    assert float(gradient_of(scale)) == pytest.approx(expected, rel=1e-9)
    assert gradient_of(input).tolist() == [[1.0, 2.0, 0.0, 0.0]]


def test_unclipped_inputs_get_the_whole_gradient() -> None:
    input = torch.tensor([[0.3, 4.5]], requires_grad=True)
    ops.fake_quantize(input, torch.tensor([[0.5]]), None, format="affine3:row", clipped=False).sum().backward()
    assert gradient_of(input).tolist() == [[1.0, 1.0]]
