"""Packed linears on the Triton kernels against float64: on a GPU, or in Triton's interpreter where there is none."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prequant.runtime import FormatError, WeightFormat, ops, reference

from ..native_layers import FORMATS, Layer
from ..test_native_linear import STEP, ZERO, assert_linear, quantized
from ..test_packed_linears import arguments, mixed_layers

pytest.importorskip("triton")
from prequant.runtime.triton_kernels import backends, linear, tables, workspace

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # what NumPy says

TOLERANCE = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
"""Of results, to their sums of magnitudes: a rounding. The interpreter cuts what bfloat16 has no place for."""

DTYPES = tuple(TOLERANCE)
ODD_GROUPS = ["affine4:group6", "affine8:group48:asym", "bcq2:group24", "ternary:group16:base3"]


@pytest.fixture(autouse=True)
def kernels_only(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not step in."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "packed_linear", refuse)


def check(
    layer: Layer, input: Tensor, mode: str, device: torch.device, offset: float = STEP * ZERO, **options: Any
) -> Tensor:
    """Run a layer on a device; its result has to be what float64 says."""
    seen, (format, *operands) = quantized(input.float(), mode)
    result = layer.to(device)(input.to(device), format, *(part.to(device) for part in operands), **options).cpu()
    assert result.dtype == input.dtype and result.shape == (*input.shape[:-1], layer.bias.shape[0])
    assert_linear(result, seen, layer, TOLERANCE[input.dtype], offset if mode == "static" else 0.0)
    return result


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
@pytest.mark.parametrize("text", FORMATS)
def test_every_format(gpu: torch.device, text: str, mode: str) -> None:
    """Each in all kinds of inputs, with one token and some, whole chunks of columns and not."""
    start = FORMATS.index(text) + len(mode)
    for seed, (rows, columns, tokens) in enumerate([(40, 256, 1), (70, 199, 3)]):
        dtype = DTYPES[(start + seed) % 3]
        layer = Layer(text, rows, columns, ("", "add", "replace")[(start + seed) % 3], seed)
        check(layer, torch.randn(tokens, columns).to(dtype), mode, gpu)


@pytest.mark.parametrize("tokens", [1, 8, 9, 17, 40, 70])
@pytest.mark.parametrize("text", ["affine4:group128", "affine3:group64:asym", "bcq2:group32", "binary:tensor"])
def test_every_size_of_tiles(gpu: torch.device, text: str, tokens: int) -> None:
    for dtype, mode in ((torch.float16, "float"), (torch.bfloat16, "float"), (torch.float16, "dynamic")):
        check(Layer(text, 150, 160, "add"), torch.randn(tokens, 160).to(dtype), mode, gpu)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.sampled_from([*FORMATS, *ODD_GROUPS]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    shape=st.sampled_from([(), (0,), (1,), (2, 3), (17,), (3, 0)]),
    mode=st.sampled_from(["float", "dynamic", "static"]),
    outliers=st.sampled_from(["", "add", "replace"]),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
)
def test_any_shape(
    gpu: torch.device,
    text: str,
    rows: int,
    columns: int,
    shape: tuple[int, ...],
    mode: str,
    outliers: str,
    dtype: torch.dtype,
    strided: bool,
) -> None:
    input = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    if strided:
        input = torch.stack([input, input], -1)[..., 0]
    check(Layer(text, rows, columns, outliers), input, mode, gpu)


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("mode", ["float", "static"])
def test_columns_cut_between_programs(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, split: int, mode: str
) -> None:
    """Five chunks, so that the shares are not equal and one may be empty; outliers are shared out, too."""
    monkeypatch.setattr(tables, "splits", lambda *_: split)
    for text in ("affine4:row", "affine3:group64:asym", "bcq2:group64"):
        layer, input = Layer(text, 70, 600, "replace"), torch.randn(3, 600).half()
        first = check(layer, input, mode, gpu, activation="", residual=None)
        assert torch.equal(check(layer, input, mode, gpu), first)
    assert workspace._counters and all(not counters.any() for counters in workspace._counters.values())


@pytest.mark.parametrize("text", ["affine4:row", "affine3:group64:asym", "bcq2:group64"])
def test_weights_unpacked_for_many_tokens(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(tables, "UNPACKED_FROM", 4)
    monkeypatch.setattr(tables, "UNPACKED_FROM_FLOAT32", 4)
    monkeypatch.setattr(linear, "launch", None)
    layer = Layer(text, 33, 200, "add")
    for dtype in DTYPES:
        for mode in ("float", "dynamic"):
            # The weight is rounded as well.
            input = torch.randn(5, 200).to(dtype)
            seen, (format, *_) = quantized(input.float(), mode)
            result = layer.to(gpu)(input.to(gpu), format).cpu()
            assert_linear(result, seen, layer, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_activations_and_residuals(gpu: torch.device, activation: str) -> None:
    layer = Layer("affine4:row", 40, 64, "add")
    layer.bias = torch.linspace(-9, 9, 40)  # results reach far to both sides of 0
    truth: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    }
    input, residual, layer = torch.randn(4, 64).to(gpu), torch.randn(4, 40).to(gpu), layer.to(gpu)
    before = layer(input).double()
    assert float(before.min()) < -8 and float(before.max()) > 8
    result = layer(input, activation=activation)
    torch.testing.assert_close(result.double(), truth[activation](before), rtol=1e-5, atol=1e-6)
    added = layer(input, activation=activation, residual=residual)
    torch.testing.assert_close(added, result + residual, rtol=1e-6, atol=1e-6)
    half = layer(input.half(), activation=activation, residual=residual.half())
    assert half.dtype is torch.float16
    torch.testing.assert_close(half.float(), added, rtol=0.005, atol=0.01)


def test_activations_of_what_is_not_ordinary(gpu: torch.device) -> None:
    layer = Layer("affine8:row", 6, 32)
    layer.codes = torch.full_like(layer.codes, 128)  # a weight of zeros: the result is the bias
    layer.bias = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e30, -1e30])
    expected = torch.tensor([float("nan"), float("inf"), 0.0, 0.0, 1e30, 0.0])
    for activation in ("relu", "gelu", "gelu_tanh"):
        result = layer.to(gpu)(torch.ones(1, 32).to(gpu), activation=activation)[0].cpu()
        torch.testing.assert_close(result, expected, equal_nan=True)


def test_integer_sums_are_exact(gpu: torch.device) -> None:
    """With scales that are powers of two, and inputs on the 8-bit grid, nothing is rounded at all."""
    for text in ("affine8:row", "affine5:row", "binary:row", "ternary:group64", "bcq1:group64"):
        layer = Layer(text, 32, 1024)
        layer.scale = torch.full_like(layer.scale, 2.0**-6)
        input = torch.randint(-127, 128, (2, 1024)).float()
        input[:, 0] = 127
        result = layer.to(gpu)(input.to(gpu), "affine8:row", bias=False).cpu()
        assert torch.equal(result.double(), input.double() @ layer.weight().T)


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token_and_visible(gpu: torch.device, mode: str, bad: float) -> None:
    layer = Layer("affine4:row", 40, 96).to(gpu)
    input = torch.randn(3, 96, device=gpu)
    input[1, 5] = bad
    format, *operands = quantized(input.cpu(), mode)[1]
    result = layer(input, format, *(part.to(gpu) for part in operands))
    assert bool(result[[0, 2]].isfinite().all())
    clipped = mode == "static" and bad == float("inf")  # to the largest level
    assert bool(result[1].isfinite().all()) == clipped and (clipped or not bool(result[1].isfinite().any()))


@pytest.mark.parametrize("input_format", ["affine4:row", "affine6:tensor", "affine8:group32", "ternary:row"])
def test_other_formats_of_inputs(gpu: torch.device, input_format: str) -> None:
    layer, input, format = Layer("affine4:row", 40, 96, "add"), torch.randn(5, 96), WeightFormat.parse(input_format)
    scale = None
    if format.group_size or format.scheme is not WeightFormat.affine(4).scheme:
        scale = torch.rand(format.scale_shape(5, 96)) + 0.1
    seen = reference.quantized_input(input, scale, None, format)
    operands = () if scale is None else (scale.to(gpu), None)
    result = layer.to(gpu)(input.to(gpu), input_format, *operands)
    assert_linear(result.cpu(), seen, layer, 4e-6)


def test_a_scale_for_each_token(gpu: torch.device) -> None:
    layer, input = Layer("affine4:row", 40, 96), torch.randn(2, 3, 96) * 3
    scale, zero = torch.rand(2, 3, 1) * 0.05 - 0.1, torch.rand(2, 3, 1) * 255
    seen = reference.quantized_input(input, scale, zero, WeightFormat.parse("affine8:row:asym"))
    result = layer.to(gpu)(input.to(gpu), "affine8:row:asym", scale.to(gpu), zero.to(gpu))
    assert_linear(result.cpu(), seen, layer, 4e-6, offset=0.1 * 255)


# ---- several linears -------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each launch was for."""
    seen: list[int] = []
    launch = linear.launch

    def noting(linears: list[Any], *rest: Any) -> None:
        seen.append(len(linears))
        launch(linears, *rest)

    monkeypatch.setattr(linear, "launch", noting)
    return seen


def assert_list_of_each(layers: list[Layer], input: Tensor, mode: str, activations: list[str]) -> None:
    """Tiles may be cut otherwise for several, so that sums are in another order."""
    format, *parts = quantized(input.cpu(), mode)[1]
    options = (format, *(part.to(input.device) for part in parts))
    results = ops.packed_linears(**arguments(layers, input, *options, activations=activations))
    assert len(results) == len(layers)
    for result, layer, name in zip(results, layers, activations, strict=True):
        expected = layer(input, *options, activation=name)
        tolerance = 1e-5 * float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=tolerance)
        assert result.is_contiguous()


@pytest.mark.parametrize(
    ("text", "mode"), [("affine4:row", "float"), ("affine3:group64:asym", "static"), ("bcq2:row", "dynamic")]
)
def test_linears_of_a_kind_are_one_launch(
    gpu: torch.device, launches: list[int], monkeypatch: pytest.MonkeyPatch, text: str, mode: str
) -> None:
    """Of different rows, which fill their tiles or not; with columns cut between programs and not."""
    for split, outliers in ((1, ""), (2, "replace")):
        monkeypatch.setattr(tables, "splits", lambda *_, split=split: split)
        layers = [Layer(text, rows, 300, outliers, rows).to(gpu) for rows in (70, 5, 64)]
        launches.clear()
        assert_list_of_each(layers, torch.randn(3, 300, device=gpu), mode, [""] * 3)
        assert launches == [3, 1, 1, 1]
    assert all(not counters.any() for counters in workspace._counters.values())


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
def test_others_are_a_launch_each(
    gpu: torch.device, launches: list[int], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    rounded: list[Tensor] = []

    def noting(input: Tensor, *rest: Any) -> Any:
        rounded.append(input)
        return rounded_tokens(input, *rest)

    rounded_tokens = linear.rounded_tokens
    monkeypatch.setattr(linear, "rounded_tokens", noting)
    layers = [layer.to(gpu) for layer in mixed_layers()]
    alike = Layer("affine4:row", 33, 96, "add", 5).to(gpu)
    assert_list_of_each([*layers, alike], torch.randn(2, 3, 96, device=gpu), mode, ["", "gelu", "relu", "", ""])
    assert sorted(launches[:4]) == [1, 1, 1, 2] and launches[4:] == [1] * 5
    assert len(rounded) == (0 if mode == "float" else 1 + 5)  # once for all of them


def test_many_linears_and_few(gpu: torch.device, launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [Layer("affine4:row", 10 + i, 64, seed=i).to(gpu) for i in range(linear.MOST_LINEARS + 2)]
    assert_list_of_each(layers, torch.randn(3, 64, device=gpu).T.contiguous().T, "float", [""] * len(layers))
    assert launches[:2] == [linear.MOST_LINEARS, 2]
    layers[0].bias = layers[0].bias.half()
    layers[1].codes, layers[1].scale, layers[1].bias = (
        t[:0] for t in (layers[1].codes, layers[1].scale, layers[1].bias)
    )
    launches.clear()
    assert_list_of_each(layers[:3], torch.randn(3, 64, device=gpu), "float", [""] * 3)
    assert launches == [1, 1, 1, 1]
    launches.clear()
    monkeypatch.setattr(tables, "UNPACKED_FROM_FLOAT32", 4)
    assert_list_of_each(layers[2:4], torch.randn(5, 64, device=gpu), "float", [""] * 2)
    assert_list_of_each(layers[2:4], torch.randn(0, 64, device=gpu), "float", [""] * 2)
    assert launches == []


# ---- training --------------------------------------------------------------------------------------------------------


def test_gradients_are_the_references(gpu: torch.device) -> None:
    layer = Layer("affine3:group64:asym", 24, 160, "replace").to(gpu)
    assert layer.outliers is not None
    input = torch.randn(5, 160, device=gpu)
    trained = [input, layer.scale, layer.zero_point, layer.outliers.values, layer.bias]
    for tensor in trained:
        tensor.requires_grad_()  # type: ignore[union-attr]
    layer(input, activation="gelu").square().sum().backward()
    dense = reference.packed_weight(layer.codes, layer.scale, layer.zero_point, layer.outliers, layer.format, 160)
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(input, dense, layer.bias)).square().sum()
    for tensor, gradient in zip(trained, torch.autograd.grad(expected, trained), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scale", "bias", "outliers"])
def test_operands_of_two_devices_are_refused(gpu: torch.device, name: str) -> None:
    layer = Layer("affine4:row", 8, 96, "add").to(gpu)
    assert layer.outliers is not None
    operands: dict[str, Any] = {"scale": layer.scale, "outliers": layer.outliers, "bias": layer.bias}
    meta = torch.empty(8, device="meta")
    operands[name] = layer.outliers._replace(values=meta) if name == "outliers" else meta
    scale, outliers, bias = operands.values()
    call = (torch.randn(2, 96, device=gpu), layer.codes, scale, None, outliers, bias, None, None, 96, None, "", None)
    with pytest.raises(FormatError, match=f"packed_linear: input on {call[0].device}, but {name} on meta"):
        backends.kernel_of("packed_linear")(layer.format, *call)


def test_types_that_no_kernel_takes_are_refused(gpu: torch.device) -> None:
    layer = Layer("affine4:row", 8, 96).to(gpu)
    with pytest.raises(FormatError, match=r"no kernel takes input of torch.float64 on .* PREQUANT_ISA=reference"):
        layer(torch.randn(2, 96, dtype=torch.float64, device=gpu))
    layer.scale = layer.scale.double()
    with pytest.raises(FormatError, match=r"packed_linear: no kernel takes scale of torch.float64"):
        layer(torch.randn(2, 96, device=gpu))
    with pytest.raises(FormatError, match=r"dequantize: no kernel takes scale of torch.float64"):
        ops.dequantize(layer.codes, layer.scale, None, format="affine4:row", columns=96)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_has_its_scales_in_it(gpu: torch.device, dtype: torch.dtype) -> None:
    layer = Layer("affine4:group64:asym", 33, 200, "add")
    assert layer.outliers is not None and layer.zero_point is not None
    layer.scale, layer.zero_point = layer.scale.to(dtype), layer.zero_point.to(dtype)
    layer.outliers = layer.outliers._replace(values=layer.outliers.values.to(dtype))
    layer.bias = layer.bias.to(dtype)
    input = torch.randn(3, 200).to(dtype)
    result = layer.to(gpu)(input.to(gpu))
    layer.scale, layer.zero_point, layer.bias = layer.scale.float(), layer.zero_point.float(), layer.bias.float()
    layer.outliers = layer.outliers._replace(values=layer.outliers.values.float())
    assert_linear(result.cpu(), input, layer, TOLERANCE[dtype])
