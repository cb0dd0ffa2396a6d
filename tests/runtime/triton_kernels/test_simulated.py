"""Rounding on the Triton kernels: values, codes, scales and gradients to inputs are the reference's to the last bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prequant.runtime import FormatError, Scheme, WeightFormat, ops, reference

from ..oracle import FORMATS as WEIGHT_FORMATS
from ..test_native_rounding import ODD, Case, bits

pytest.importorskip("triton")
from prequant.runtime.triton_kernels import simulated

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what NumPy says of numbers that are not finite

FORMATS = [
    *("affine2:row", "affine3:row:asym", "affine4:tensor", "affine8:group16", "affine5:group12:asym"),
    *("affine8:tensor:asym", "affine4:group1", "ternary:row", "ternary:tensor", "ternary:group5"),
    *("binary:row", "binary:tensor", "binary:group16"),
]
CODED = [
    format for format in WEIGHT_FORMATS if format.scheme is not Scheme.BCQ and (format.group_size or format.bits < 3)
]
SHAPES = [(5, 23), (7,), (2, 3, 33), (1, 5000)]
TYPES = (torch.float16, torch.bfloat16)
SCALES = ["affine8:row", "affine4:tensor"]


@pytest.fixture(autouse=True)
def kernels_only(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not step in."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    for name in ("quantize", "fake_quantize", "fake_quantize_gradients", "dynamic_scale"):
        monkeypatch.setattr(ops, f"_reference_{name}", refuse)


class OnDevice(Case):
    """The operands on a device and in some types; what the reference says of them comes back to the CPU."""

    def on(
        self, device: torch.device, dtype: torch.dtype = torch.float32, scale_type: torch.dtype = torch.float32
    ) -> "OnDevice":
        self.input, self.gradient = self.input.to(device, dtype), self.gradient.to(device, dtype)
        self.scale = self.scale.to(device, scale_type)
        self.zero_point = None if self.zero_point is None else self.zero_point.to(device, scale_type)
        return self


def assert_same(found: Tensor, expected: Tensor) -> None:
    """To the last bit; but the interpreter cuts off what bfloat16 has no place for, and a GPU rounds."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    loose = found.dtype is torch.bfloat16 and found.device.type == "cpu"
    tolerance = torch.finfo(torch.bfloat16).eps if loose else 0.0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0, equal_nan=True)


def assert_gradients(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert found[0] is not None and expected[0] is not None and torch.equal(found[0], expected[0])
    for one, other in list(zip(found, expected, strict=True))[1:]:
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            tolerance = max(torch.finfo(one.dtype).eps, 1e-5)
            assert one.shape == other.shape and one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()) + 1e-6)


# ---- fake_quantize ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_values_are_those_of_the_reference(gpu: torch.device, text: str) -> None:
    for shape in SHAPES:
        for shared in (False, True):
            case = OnDevice(text, shape, shared, odd=not shared).on(gpu)
            assert torch.equal(bits(ops.fake_quantize(*case.operands, format=text)), bits(case.values()))


@pytest.mark.parametrize("text", ["affine4:row:asym", "affine8:tensor", "ternary:group5", "binary:row"])
def test_half_precision(gpu: torch.device, text: str) -> None:
    for dtype in TYPES:
        for scale_type in (torch.float32, dtype):
            case = OnDevice(text, (5, 23)).on(gpu, dtype, scale_type)
            assert_same(ops.fake_quantize(*case.operands, format=text), case.values())
            assert_gradients(case.backward(), case.gradients())
    mixed = OnDevice(text, (5, 23)).on(gpu, torch.float32, torch.float16)
    assert_same(ops.fake_quantize(*mixed.operands, format=text), mixed.values())


@pytest.mark.parametrize(
    ("text", "options"), [*((text, {}) for text in FORMATS), (FORMATS[1], {"clipped": False, "scale_gradient": False})]
)
def test_gradients_are_those_of_the_reference(gpu: torch.device, text: str, options: dict[str, bool]) -> None:
    for shape in SHAPES:
        for shared in (False, True):
            case = OnDevice(text, shape, shared).on(gpu)
            found = case.backward(**options)
            assert_gradients(found, case.gradients(**options))
            if shared:  # the order of sums is always the same
                again = case.backward(**options)
                assert all(
                    a is None or (b is not None and torch.equal(a, b)) for a, b in zip(found, again, strict=True)
                )


@pytest.mark.parametrize("text", ["affine4:row", "affine4:row:asym", "ternary:row", "binary:row"])
def test_gradients_of_odd_inputs(gpu: torch.device, text: str) -> None:
    """Element by element, or one NaN would hide all others."""
    case = OnDevice(text, (len(ODD), 1)).on(gpu)
    case.input = torch.tensor(ODD, device=gpu).reshape(-1, 1)
    for one, other in zip(case.backward(), case.gradients(), strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wanted", ["input", "scale", "zero_point"])
def test_only_what_is_wanted_is_computed(gpu: torch.device, wanted: str) -> None:
    case = OnDevice("affine4:row:asym", (8, 24)).on(gpu)
    whole = dict(zip(("input", "scale", "zero_point"), case.backward(), strict=True))
    leaves = {name: t for name, t in zip(whole, case.operands, strict=True) if t is not None}
    leaves[wanted].requires_grad_()
    ops.fake_quantize(*leaves.values(), format=case.text).backward(case.gradient)
    for name, leaf in leaves.items():
        expected = whole[name]
        assert (leaf.grad is None) == (name != wanted)
        assert leaf.grad is None or (expected is not None and torch.equal(leaf.grad, expected))


def test_scales_that_some_rows_share(gpu: torch.device) -> None:
    case = OnDevice("affine4:group16:asym", (2, 3, 40)).on(gpu)
    case.scale, case.zero_point = case.scale[:1], case.zero_point[:1]  # type: ignore[index]
    assert torch.equal(ops.fake_quantize(*case.operands, format=case.text), case.values())
    assert_gradients(case.backward(), case.gradients())


def test_sums_over_segments_are_those_of_doubles(gpu: torch.device) -> None:
    """Float32 would lose small terms beside large ones that cancel."""
    case = OnDevice("ternary:tensor", (40, 500)).on(gpu)
    case.input, case.scale = torch.ones(40, 500, device=gpu), torch.ones(1, 1, device=gpu)
    case.gradient = torch.zeros(40, 500, device=gpu)
    case.gradient[0, 0], case.gradient[-1, -1], case.gradient[20] = 2.0**30, -(2.0**30), 1.0
    to_scale = case.backward(scale_gradient=False)[1]
    assert to_scale is not None and float(to_scale) == 500


@pytest.mark.parametrize("text", ["affine4:row", "affine8:group16:asym", "ternary:tensor"])
@pytest.mark.parametrize("view", [lambda t: t.T.contiguous().T, lambda t: t.repeat(1, 2)[:, : t.shape[1]]])
def test_strides_do_not_matter(gpu: torch.device, text: str, view: Callable[[Tensor], Tensor]) -> None:
    case = OnDevice(text, (24, 40)).on(gpu)
    expected, gradients = case.values(), case.backward()
    codes = reference.quantize(*case.operands, case.format)
    case.input, case.gradient = view(case.input), view(case.gradient)
    found = ops.fake_quantize(*case.operands, format=text)
    assert torch.equal(found, expected) and found.stride() == torch.empty_like(case.input).stride()
    assert torch.equal(ops.quantize(*case.operands, format=text), codes)
    for one, other in zip(case.backward(), gradients, strict=True):
        assert one is None or other is None or torch.equal(one, other)


def test_other_types_are_the_references(gpu: torch.device) -> None:
    case = OnDevice("affine4:row", (3, 16)).on(gpu, torch.float64)
    with pytest.raises(AssertionError, match="the reference ran"):
        ops.fake_quantize(*case.operands, format=case.text)
    with pytest.raises(AssertionError, match="the reference ran"):
        ops.dynamic_scale(case.input, format="affine8:row")


@pytest.mark.parametrize("threshold", [0.7, 0.0, -1.0, float("nan")])
def test_ternary_thresholds(gpu: torch.device, threshold: float) -> None:
    input = torch.tensor([[*ODD[1:], 0.7, -0.7, 0.71]], device=gpu)
    operands = (input, torch.full((1, 1), 2.0, device=gpu), torch.full((1, 1), threshold, device=gpu))
    format = WeightFormat.ternary()
    assert torch.equal(ops.fake_quantize(*operands, format=str(format)), reference.fake_quantize(*operands, format))
    assert torch.equal(ops.quantize(*operands, format=str(format)), reference.quantize(*operands, format))


# ---- dynamic_scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SCALES)
def test_dynamic_scales(gpu: torch.device, text: str) -> None:
    format = WeightFormat.parse(text)
    for shape in [(7,), (2, 3, 33), (5, 3000), (3, 1)]:
        for dtype in (torch.float32, *TYPES):
            input = torch.randn(shape, device=gpu).to(dtype)
            found, expected = ops.dynamic_scale(input, format=text), reference.dynamic_scale(input, format)
            assert found.dtype is torch.float32 and found.shape == expected.shape and torch.equal(found, expected)


@pytest.mark.parametrize("text", SCALES)
def test_dynamic_scales_of_what_is_not_ordinary(gpu: torch.device, text: str) -> None:
    for odd in ODD[:8]:
        input = torch.zeros(3, 6000, device=gpu)
        input[1, 4500] = odd
        expected = reference.dynamic_scale(input, WeightFormat.parse(text))
        torch.testing.assert_close(ops.dynamic_scale(input, format=text), expected, rtol=0, atol=0, equal_nan=True)


# ---- quantize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", CODED, ids=str)
def test_codes_are_those_of_the_reference(gpu: torch.device, format: WeightFormat) -> None:
    for shape, shared in (((5, 23), False), ((2, 3, 33), True), ((1,), False)):
        case = OnDevice(str(format), shape, shared).on(gpu)
        case.scale.view(-1)[-1] = 0.0
        found = ops.quantize(*case.operands, format=str(format))
        assert torch.equal(found, reference.quantize(*case.operands, format))
    half = OnDevice(str(format), (4, 16)).on(gpu, torch.float16, torch.float16)
    assert torch.equal(ops.quantize(*half.operands, format=str(format)), reference.quantize(*half.operands, format))


@pytest.mark.parametrize("text", ["affine3:row", "affine8:tensor", "ternary:row:base3", "binary:row"])
def test_nan_has_no_code(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    input, scale = torch.ones(3, 700, device=gpu), torch.ones(WeightFormat.parse(text).scale_shape(3, 700), device=gpu)
    plain = ops.quantize(input, scale, None, format=text)
    input[2, 699] = float("nan")
    with pytest.raises(FormatError, match=f"the input of quantize holds what has no code in {text}: nan"):
        ops.quantize(input, scale, None, format=text)
    # A graph that is captured can't be waited for.
    monkeypatch.setattr(simulated.workspace, "capturing", lambda device: True)
    found = ops.quantize(input, scale, None, format=text)
    assert torch.equal(found[:2], plain[:2]) and torch.equal(found[2, :-1], plain[2, :-1])
