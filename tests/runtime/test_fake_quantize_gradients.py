"""Learned step sizes and the straight-through estimator, against the papers' formulas worked out by hand."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from prequant.runtime import WeightFormat, ops, reference

ROWS, COLUMNS = 4, 12


def lsq(
    input: Tensor, gradient: Tensor, scale: Tensor, zero_point: Tensor | None, text: str, scaled: bool, clipped: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equation 3 of LSQ (arXiv 1902.08153), its gradient scale 1 / sqrt(N Q_P), and LSQ+ (arXiv 2004.09576).

    With an explicit zero point z the levels are -z .. Q - z in units of the step, and v / s is clipped there.
    """
    format = WeightFormat.parse(text)
    to_input, to_scale = torch.zeros_like(input), torch.zeros_like(scale)
    to_zero = None if zero_point is None else torch.zeros_like(zero_point)
    group = format.group_size or input.shape[1]
    for r, c in itertools.product(*map(range, input.shape)):
        at = (0, 0) if scale.numel() == 1 else (r, c // group)
        v, s, g = float(input[r, c]), float(scale[at]), float(gradient[r, c])
        if format.symmetric:
            negative, positive = 2 ** (format.bits - 1), 2 ** (format.bits - 1) - 1
        else:
            assert zero_point is not None
            negative, positive = float(zero_point[at]), 2**format.bits - 1 - float(zero_point[at])
        if v / s <= -negative:
            step, inside = -negative, False
        elif v / s >= positive:
            step, inside = positive, False
        else:
            step, inside = round(v / s) - v / s, True
        to_scale[at] += g * step
        to_input[r, c] = g if inside or not clipped else 0.0
        if to_zero is not None and not inside:
            to_zero[at] -= g * s
    if scaled:
        largest = 2 ** (format.bits - 1) - 1 if format.symmetric else 2**format.bits - 1
        factor = 1 / math.sqrt(input.numel() / scale.numel() * largest)
        to_scale *= factor
        to_zero = None if to_zero is None else to_zero * factor
    return to_input, to_scale, to_zero


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group4"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_lsq(bits: int, granularity: str, asymmetric: bool, scaled: bool, clipped: bool) -> None:
    text = f"affine{bits}:{granularity}" + ":asym" * asymmetric
    format = WeightFormat.parse(text)
    scale = torch.rand(format.scale_shape(ROWS, COLUMNS), dtype=torch.float64) + 0.5
    zero_point = torch.randint(1, 2**bits - 1, scale.shape).double() if asymmetric else None
    input = torch.randn(ROWS, COLUMNS, dtype=torch.float64) * 2**bits * 0.4
    gradient = torch.randn_like(input)
    # Within half a step beyond the outermost level LSQ's formula counts as clipped, rounding as inside: stay away.
    input = torch.where(near_the_ends(input, scale, zero_point, format), 0.3, input)
    leaves = [t if t is None else t.clone().requires_grad_() for t in (input, scale, zero_point)]
    ops.fake_quantize(*leaves, format=text, clipped=clipped, scale_gradient=scaled).backward(gradient)
    expected = lsq(input, gradient, scale, zero_point, text, scaled, clipped)
    for tensor, truth in zip(leaves, expected, strict=True):
        if tensor is not None and truth is not None:
            assert tensor.grad is not None
            assert torch.allclose(tensor.grad, truth, rtol=1e-9, atol=1e-12)
    assert bool((expected[0] == 0).any()) == clipped  # some were clipped, some not
    assert bool((expected[0] != 0).any())


def near_the_ends(input: Tensor, scale: Tensor, zero_point: Tensor | None, format: WeightFormat) -> Tensor:
    spread = reference.per_element(scale, format, input.shape[1])
    zero = 2.0 ** (format.bits - 1) if zero_point is None else reference.per_element(zero_point, format, input.shape[1])
    code = input / spread + zero
    return ((code > -0.6) & (code < 0)) | ((code > format.levels - 1) & (code < format.levels - 0.4))


def test_what_rounds_to_the_outermost_level_is_inside() -> None:
    """Half a step beyond it nothing is clipped yet: the code is that of plain rounding."""
    input = torch.tensor([[7.4, 7.6, -8.4, -8.6]], dtype=torch.float64, requires_grad=True)
    scale = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    ops.fake_quantize(input, scale, None, format="affine4:row", scale_gradient=False).sum().backward()
    assert input.grad is not None and scale.grad is not None
    assert input.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert float(scale.grad) == pytest.approx((7 - 7.4) + 7 + (-8 + 8.4) - 8)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group4"])
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_ternary_and_binary_pass_the_gradient_on_and_give_the_scale_its_level(scheme: str, granularity: str) -> None:
    text = f"{scheme}:{granularity}"
    format = WeightFormat.parse(text)
    scale = (torch.rand(format.scale_shape(ROWS, COLUMNS), dtype=torch.float64) + 0.5).requires_grad_()
    input, gradient = (
        torch.randn(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True),
        torch.randn(ROWS, COLUMNS, dtype=torch.float64),
    )
    output = ops.fake_quantize(input, scale, None, format=text, scale_gradient=False)
    output.backward(gradient)
    assert input.grad is not None and scale.grad is not None
    assert torch.equal(input.grad, gradient)
    spread = reference.per_element(scale.detach(), format, COLUMNS).expand(ROWS, COLUMNS)
    expected = torch.zeros_like(scale)
    level = output.detach() / spread
    for r, c in itertools.product(range(ROWS), range(COLUMNS)):
        at = (0, 0) if scale.numel() == 1 else (r, c // (format.group_size or COLUMNS))
        expected[at] += gradient[r, c] * level[r, c]
    assert torch.allclose(scale.grad, expected)
    assert set(level.round().unique().tolist()) <= ({-1.0, 1.0} if scheme == "binary" else {-1.0, 0.0, 1.0})


def test_lsq_lowers_the_error_of_a_bad_scale() -> None:
    """What the gradient is for: a scale that is far too large shrinks under it."""
    weight, scale = torch.randn(8, 64), nn.Parameter(torch.full((8, 1), 2.0))
    optimizer = torch.optim.Adam([scale], lr=0.05)

    def error() -> Tensor:
        return (ops.fake_quantize(weight, scale, None, format="affine4:row") - weight).square().mean()

    before = float(error().detach())
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert float(error().detach()) < before / 10


def test_a_dynamic_scale_is_a_constant() -> None:
    input = torch.randn(3, 8, requires_grad=True)
    scale = ops.dynamic_scale(input, format="affine8:row")
    assert not scale.requires_grad
    ops.fake_quantize(input, scale, None, format="affine8:row").sum().backward()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.ones(3, 8))
