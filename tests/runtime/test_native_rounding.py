"""Rounding on the native kernels: values and gradients to inputs are the reference's to the last bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.runtime import Granularity, WeightFormat, native, ops, reference

FORMATS = [
    *(f"affine{bits}:{rest}" for bits in (2, 3, 4, 8) for rest in ("row", "tensor", "group16", "row:asym")),
    *("affine4:group32", "affine5:group12:asym", "affine8:tensor:asym", "affine4:group1"),
    *(f"{scheme}:{rest}" for scheme in ("ternary", "binary") for rest in ("row", "tensor", "group16", "group5")),
]
SHAPES = [(5, 23), (40, 300), (1, 1), (9, 128), (7,), (2, 3, 33), (1, 9000)]
ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-30, 0.5, -0.5, 1.5, 2.5]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of whole operands is not there for the ops."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(ops, "_reference_fake_quantize", refuse)
    monkeypatch.setattr(ops, "_reference_fake_quantize_gradients", refuse)


class Case:
    """An input with ties, clipped and odd elements, its gradient, and scales of which one is negative."""

    def __init__(self, text: str, shape: tuple[int, ...], shared: bool = False, odd: bool = False) -> None:
        random = torch.Generator().manual_seed(0)
        self.text, self.format = text, WeightFormat.parse(text)
        self.input = torch.randn(shape, generator=random) * self.format.levels / 3
        self.gradient = torch.randn(shape, generator=random)
        leading = [1] * (len(shape) - 1) if shared else list(shape[:-1])
        dims = [*leading, self.format.groups(shape[-1])]
        if self.format.granularity is Granularity.TENSOR:
            dims = [1] * len(shape)
        self.scale = torch.rand(dims, generator=random) + 0.3
        self.scale.view(-1)[0] = -1.0
        halves = torch.arange(self.input.numel()).reshape(shape) % 3 == 0
        self.input = torch.where(halves, (self.input * 2).round() / 2, self.input)
        if odd:
            self.input.view(-1)[: len(ODD)] = torch.tensor(ODD)[: self.input.numel()]
            self.scale.view(-1)[-1] = 0.0
            self.scale.view(-1)[-2:-1] = 1e-42
        self.zero_point = None
        if not self.format.symmetric:
            self.zero_point = torch.rand(dims, generator=random) * (self.format.levels - 1)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.input, self.scale, self.zero_point

    def values(self) -> Tensor:
        return reference.fake_quantize(*self.operands, self.format)

    def gradients(self, clipped: bool = True, scale_gradient: bool = True) -> list[Tensor | None]:
        found = reference.fake_quantize_gradients(
            self.gradient, *self.operands, self.format, clipped=clipped, scale_gradient=scale_gradient
        )
        return list(found)

    def backward(self, **options: Any) -> list[Tensor | None]:
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in self.operands]
        ops.fake_quantize(*leaves, format=self.text, **options).backward(self.gradient)
        return [None if t is None else t.grad for t in leaves]


def on_and_off(isa: str) -> Iterator[str]:
    """Once with the kernels, and once without any."""
    for name in (isa, native.REFERENCE):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREQUANT_ISA", name)
            native.chosen_isa.cache_clear()
            yield name
    native.chosen_isa.cache_clear()


def bits(tensor: Tensor) -> Tensor:
    """Every number has its own, and NaN has one."""
    return torch.where(tensor.isnan(), torch.nan, tensor).view(torch.int32)


@pytest.mark.parametrize("text", FORMATS)
def test_values_are_those_of_the_reference(isa: str, alone: None, text: str) -> None:
    for shape in SHAPES:
        for shared in (False, True):
            for odd in (False, True):
                case = Case(text, shape, shared, odd)
                found = ops.fake_quantize(*case.operands, format=text)
                assert torch.equal(bits(found), bits(case.values())), (shape, shared, odd)


@pytest.mark.parametrize("options", [{}, {"clipped": False}, {"scale_gradient": False}])
@pytest.mark.parametrize("text", FORMATS)
def test_gradients_are_those_of_the_reference(isa: str, alone: None, text: str, options: dict[str, bool]) -> None:
    for shape in SHAPES:
        for shared in (False, True):
            case = Case(text, shape, shared)
            found, expected = case.backward(**options), case.gradients(**options)
            assert found[0] is not None and expected[0] is not None
            assert torch.equal(found[0], expected[0])
            for one, other in list(zip(found, expected, strict=True))[1:]:
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert one.shape == other.shape
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()) + 1e-6)


@pytest.mark.parametrize("text", ["affine4:row", "affine4:row:asym", "ternary:row", "binary:row"])
def test_gradients_of_odd_inputs_are_those_of_the_reference(isa: str, alone: None, text: str) -> None:
    case = Case(text, (1, len(ODD)))
    case.input = torch.tensor([ODD])
    found, expected = case.backward(), case.gradients()
    assert found[0] is not None and expected[0] is not None and torch.equal(found[0], expected[0])
    # Element by element, or one NaN would hide all others.
    case = Case(text, (len(ODD), 1))
    case.input = torch.tensor(ODD).reshape(-1, 1)
    for one, other in zip(case.backward(), case.gradients(), strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-6, atol=0)


def test_ternary_thresholds(isa: str, alone: None) -> None:
    for threshold in (0.7, 0.0, -1.0, float("nan")):
        for shape in ((4, 1), (1, 1)):
            input = torch.tensor([[*ODD, 0.7, -0.7, 0.71]]).repeat(4, 1)
            operands = (input, torch.full(shape, 2.0), torch.full(shape, threshold))
            expected = reference.fake_quantize(*operands, WeightFormat.ternary())
            assert torch.equal(bits(ops.fake_quantize(*operands, format="ternary:row")), bits(expected))


@pytest.mark.parametrize("text", ["affine4:row", "affine8:group16:asym", "ternary:tensor"])
@pytest.mark.parametrize("view", [lambda t: t.T.contiguous().T, lambda t: t.repeat(1, 2)[:, : t.shape[1]]])
def test_strides_do_not_matter(isa: str, alone: None, text: str, view: Callable[[Tensor], Tensor]) -> None:
    case = Case(text, (24, 40))
    expected, gradients = case.values(), case.backward()
    case.input = view(case.input)
    found = ops.fake_quantize(*case.operands, format=text)
    assert torch.equal(found, expected) and found.stride() == torch.empty_like(case.input).stride()
    case.gradient = view(case.gradient)
    for one, other in zip(case.backward(), gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("text", ["affine4:row", "affine4:tensor:asym", "ternary:group64", "binary:tensor"])
def test_the_number_of_threads_changes_nothing(isa: str, alone: None, text: str) -> None:
    case, results = Case(text, (1000, 300)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([ops.fake_quantize(*case.operands, format=text), *case.backward()])
    for other in results[1:]:
        assert all(a is None or (b is not None and torch.equal(a, b)) for a, b in zip(results[0], other, strict=True))


def test_sums_are_those_of_doubles(isa: str, alone: None) -> None:
    """Float32 would lose small terms beside large ones that cancel."""
    case = Case("ternary:tensor", (400, 500))
    case.input, case.gradient = torch.ones(400, 500), torch.full((400, 500), 1.0)
    case.scale = torch.ones(1, 1)
    case.gradient[0, 0], case.gradient[-1, -1] = 2.0**30, -(2.0**30)
    to_scale = case.backward(scale_gradient=False)[1]
    assert to_scale is not None and float(to_scale) == 400 * 500 - 2


@pytest.mark.parametrize("wanted", ["input", "scale", "zero_point"])
def test_only_what_is_wanted_is_computed(isa: str, alone: None, wanted: str) -> None:
    case = Case("affine4:row:asym", (8, 24))
    whole = dict(zip(("input", "scale", "zero_point"), case.backward(), strict=True))
    leaves = {name: t for name, t in zip(whole, case.operands, strict=True) if t is not None}
    leaves[wanted].requires_grad_()
    ops.fake_quantize(*leaves.values(), format=case.text).backward(case.gradient)
    for name, leaf in leaves.items():
        expected = whole[name]
        assert (leaf.grad is None) == (name != wanted)
        assert leaf.grad is None or (expected is not None and torch.equal(leaf.grad, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_partly_shared_scales_are_the_references(isa: str, dtype: torch.dtype) -> None:
    case = Case("affine4:row", (2, 3, 16))
    case.input, case.gradient = case.input.to(dtype), case.gradient.to(dtype)
    assert torch.equal(ops.fake_quantize(*case.operands, format=case.text), case.values())
    for one, other in zip(case.backward(), case.gradients(), strict=True):
        assert one is None or other is None or torch.equal(one, other)
    case = Case("affine4:row", (2, 3, 16))
    case.scale = case.scale[:1]
    assert torch.equal(ops.fake_quantize(*case.operands, format=case.text), case.values())
    for one, other in zip(case.backward(), case.gradients(), strict=True):
        assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("text", ["affine4:row:asym", "ternary:row"])
def test_second_derivatives_are_those_of_the_reference(isa: str, text: str) -> None:
    case, results = Case(text, (6, 20)), []
    for _ in on_and_off(isa):
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (case.gradient, *case.operands)]
        first, *operands = leaves
        wanted = [t for t in operands if t is not None]
        output = ops.fake_quantize(*operands, format=text)
        gradients = torch.autograd.grad(output, wanted, first, create_graph=True)
        penalty = torch.stack([part.square().sum() for part in gradients]).sum()
        both = [t for t in leaves if t is not None]
        results.append(torch.autograd.grad(penalty, both, allow_unused=True))
    assert results[0][0] is not None
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_quantized_inputs_of_packed_linears_take_the_same_way(isa: str) -> None:
    codes = ops.quantize(torch.randn(6, 32), torch.full((6, 1), 0.3), None, format="affine4:row")
    leaves = [torch.randn(2, 5, 32), torch.full((1, 1), 0.1), torch.full((1, 1), 7.0)]
    packed = (codes, torch.full((6, 1), 0.3), None, None, None, None, False, None)
    options: dict[str, Any] = {"format": "affine4:row", "columns": 32, "input_format": "affine4:tensor:asym"}
    results = []
    for _ in on_and_off(isa):
        input, scale, zero_point = (leaf.clone().requires_grad_() for leaf in leaves)
        output = ops.packed_linear(input, *packed, scale, zero_point, **options)
        results.append(torch.autograd.grad(output.square().sum(), (input, scale, zero_point)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_calls_that_make_no_sense_are_refused(isa: str) -> None:
    case = Case("affine4:row", (3, 8))
    options: dict[str, Any] = {"format": "affine4:row", "scale_gradient": True, "needs": (True, False, False)}
    for operands, changed, message in (
        ((case.gradient[:2], *case.operands), {}, r"a gradient \[2, 8\] does not fit an input \[3, 8\]"),
        ((case.gradient, *case.operands), {"needs": (True,)}, "needs are those of input, scale and zero point"),
        ((case.gradient, *case.operands), {"needs": (False, False, True)}, "has no zero point"),
        ((case.gradient, *case.operands), {"format": "ternary:row"}, "ternary:row clips no input"),
    ):
        with pytest.raises(native.PrequantError, match=message):
            ops.fake_quantize_gradients(*operands, **{**options, **changed})
