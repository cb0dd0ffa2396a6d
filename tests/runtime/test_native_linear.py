"""The native kernels against float64, on every instruction set that this processor has."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prequant.runtime import WeightFormat, native, native_linear, reference

from .native_layers import FORMATS, ISAS, Layer


def assert_linear(result: Tensor, input: Tensor, layer: Layer, tolerance: float = 2e-6, offset: float = 0.0) -> None:
    """Against float64, relative to the sum of magnitudes, which is what rounding is relative to.

    A weight near 0 may be the difference of two numbers of a step or more of its grid: its zero point, and the parts
    that its code is in. So may an input, of numbers that are ``offset`` larger.
    """
    input, weight = input.double().reshape(-1, layer.columns), layer.weight()
    expected = (input @ weight.T + layer.bias.double()).reshape(result.shape)
    magnitudes = layer.magnitude() + layer.scale.double().amax()
    size = ((input.abs() + offset) @ magnitudes.T + layer.bias.double().abs()).reshape(result.shape)
    error = (result.double() - expected).abs() / size
    assert float(error.amax() if error.numel() else 0) < tolerance


STATIC, STEP, ZERO = "affine8:tensor:asym", 0.03, 100.0


def quantized(input: Tensor, mode: str) -> tuple[Tensor, tuple[Any, ...]]:
    """The input as the layer is to see it, and how a call says so."""
    if mode == "float":
        return input, ("",)
    if mode == "dynamic":
        format = WeightFormat.affine(8)
        return reference.quantized_input(input, None, None, format), (str(format),)
    scale, zero_point = torch.full((1,) * input.dim(), STEP), torch.full((1,) * input.dim(), ZERO)
    seen = reference.quantized_input(input, scale, zero_point, WeightFormat.parse(STATIC))
    return seen, (STATIC, scale, zero_point)


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not step in."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "packed_linear", refuse)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.usefixtures("kernels_only")
def test_every_format(isa: str, text: str, mode: str) -> None:
    for seed, (rows, columns) in enumerate([(40, 100), (7, 33), (33, 257), (16, 64), (1, 1)]):
        layer = Layer(text, rows, columns, ("", "add", "replace")[seed % 3], seed)
        for tokens in (1, 3, 9, 35):
            input = torch.randn(tokens, columns)
            seen, options = quantized(input, mode)
            assert_linear(layer(input, *options), seen, layer)


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(FORMATS),
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    shape=st.sampled_from([(), (0,), (1,), (2, 3), (17,), (5, 13), (3, 0)]),
    mode=st.sampled_from(["float", "dynamic", "static"]),
    outliers=st.sampled_from(["", "add", "replace"]),
    exponent=st.sampled_from([-42, -30, 0, 12, 30]),
    threads=st.integers(1, 4),
    strided=st.booleans(),
)
def test_any_shape_and_size(
    text: str,
    rows: int,
    columns: int,
    shape: tuple[int, ...],
    mode: str,
    outliers: str,
    exponent: int,
    threads: int,
    strided: bool,
) -> None:
    layer = Layer(text, rows, columns, outliers)
    input = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(1))
    if mode != "static":
        input = input * 10.0**exponent
    if strided:
        input = torch.stack([input, input], -1)[..., 0]
    seen, options = quantized(input, mode)
    torch.set_num_threads(threads)
    for name in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREQUANT_ISA", name)
            native.chosen_isa.cache_clear()
            result = layer(input, *options)
        native.chosen_isa.cache_clear()
        assert result.shape == (*shape, rows) and result.is_contiguous()
        # With subnormal inputs the bias is all there is.
        assert_linear(result, seen, layer, 4e-6, offset=STEP * ZERO if mode == "static" else 0.0)


@pytest.mark.parametrize("mode", ["float", "dynamic"])
@pytest.mark.usefixtures("kernels_only")
def test_bfloat16_in_and_out(isa: str, mode: str) -> None:
    layer = Layer("affine4:group64", 48, 192, "add")
    for tokens in (1, 20):
        input = torch.randn(tokens, 192).bfloat16()
        result = layer(input, *quantized(input, mode)[1])
        assert result.dtype is torch.bfloat16
        seen = quantized(input.float(), mode)[0]  # the kernels round the result alone
        assert_linear(result, seen, layer, 0.004)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.usefixtures("kernels_only")
def test_activations_and_residuals(isa: str, activation: str) -> None:
    layer = Layer("affine4:row", 40, 64, "add")
    layer.bias = torch.linspace(-9, 9, 40)  # results reach far to both sides of 0
    truth: Any = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    }[activation]
    for tokens in (1, 40):
        input, residual = torch.randn(tokens, 64), torch.randn(tokens, 40)
        before = layer(input).double()
        assert float(before.min()) < -8 and float(before.max()) > 8
        expected = truth(before)
        result = layer(input, activation=activation)
        torch.testing.assert_close(result.double(), expected, rtol=5e-6, atol=1e-9)
        added = layer(input, activation=activation, residual=residual)
        torch.testing.assert_close(added, result + residual, rtol=1e-6, atol=1e-6)
        half = layer(input.bfloat16(), activation=activation, residual=residual.bfloat16())
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), added, rtol=0.02, atol=0.05)


@pytest.mark.usefixtures("kernels_only")
def test_activations_of_what_is_not_ordinary(isa: str) -> None:
    layer = Layer("affine8:row", 6, 32)
    layer.codes = torch.full_like(layer.codes, 128)  # a weight of zeros: the result is the bias
    layer.bias = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e30, -1e30])
    expected = torch.tensor([float("nan"), float("inf"), 0.0, 0.0, 1e30, 0.0])  # torch's gelu says NaN for infinity
    for activation in ("relu", "gelu", "gelu_tanh"):
        result = layer(torch.ones(1, 32), activation=activation)[0]
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.usefixtures("kernels_only")
def test_integer_sums_are_exact(isa: str) -> None:
    """With scales that are powers of two, and inputs on the 8-bit grid, nothing is rounded at all."""
    for text in ("affine8:row", "affine4:row", "binary:row", "ternary:row", "affine3:row"):
        layer = Layer(text, 32, 2048)
        layer.scale = torch.full_like(layer.scale, 2.0**-6)
        for tokens in (1, 2, 40):
            input = torch.randint(-127, 128, (tokens, 2048)).float()
            input[:, 0] = 127
            assert torch.equal(layer(input, "affine8:row", bias=False).double(), input.double() @ layer.weight().T)


@pytest.mark.parametrize("mode", ["float", "dynamic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("kernels_only")
def test_what_is_not_finite_stays_in_its_token_and_visible(isa: str, mode: str, bad: float) -> None:
    layer = Layer("affine4:row", 40, 96)
    for tokens in (2, 20):
        input = torch.randn(tokens, 96)
        input[1, 5] = bad
        result = layer(input, *quantized(input, mode)[1])
        others = [token for token in range(tokens) if token != 1]
        assert not bool(result[1].isfinite().any()) and bool(result[others].isfinite().all())
        assert bool(result[1].isnan().all()) or mode == "float"


def test_instruction_sets_agree() -> None:
    layer, input, results = Layer("affine4:group64:asym", 64, 512, "add"), torch.randn(33, 512), []
    for name in ISAS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREQUANT_ISA", name)
            native.chosen_isa.cache_clear()
            results.append(layer(input, "affine8:row"))
    native.chosen_isa.cache_clear()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


# ---- when the kernels run --------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what ran: ``codes`` and ``scales`` for what was packed anew, ``reference`` for the reference."""
    seen: list[str] = []
    pack_codes, pack_scales = native_linear._pack_codes, native_linear._pack_scales
    run_reference = reference.packed_linear

    def noting(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            seen.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(native_linear, "_pack_codes", noting("codes", pack_codes))
    monkeypatch.setattr(native_linear, "_pack_scales", noting("scales", pack_scales))
    monkeypatch.setattr(reference, "packed_linear", noting("reference", run_reference))
    return seen


def test_a_weight_is_packed_once_and_again_when_it_changes(isa: str, calls: list[str]) -> None:
    layer, input = Layer("affine4:row", 32, 64, "add"), torch.randn(3, 64)
    layer(input)
    layer(input)
    assert calls == ["codes", "scales"]
    assert layer.outliers is not None
    for tensor in (layer.scale, layer.outliers.values):
        tensor.mul_(2)
        calls.clear()
        assert_linear(layer(input), input, layer)
        assert calls == ["scales"]
    calls.clear()
    layer.codes.mul_(2)
    assert_linear(layer(input), input, layer)
    assert calls == ["codes", "scales"]
    layer.scale = layer.scale * 0.5
    assert_linear(layer(input), input, layer)
    assert calls == ["codes", "scales", "scales"]


@pytest.mark.parametrize("text", ["affine4:row", "affine3:group64:asym", "ternary:row", "bcq3:row", "bcq2:group64"])
def test_weights_of_several_tasks_share_their_codes(isa: str, calls: list[str], text: str) -> None:
    layer, input = Layer(text, 40, 192, "replace"), torch.randn(3, 192)
    assert layer.outliers is not None
    first = (layer.scale, layer.outliers)
    tasks = [
        (layer.scale * factor, layer.outliers._replace(values=layer.outliers.values * factor)) for factor in (1, 2)
    ]
    tasks.append((tasks[0][0], tasks[1][1]))  # what two tasks hold does not tell which of them it is alone
    for _ in range(2):
        for layer.scale, layer.outliers in tasks:
            assert_linear(layer(input), input, layer)
            seen, options = quantized(input, "static")  # an input with a zero point: the sums of rows count
            assert_linear(layer(seen, *options), seen, layer)
    assert calls == ["codes", *["scales"] * 3]
    packed = native_linear._packed[layer.codes]
    assert len(packed.weights) == 3
    del tasks
    layer.scale, layer.outliers = first  # the last call's are let go of by the next one
    assert_linear(layer(input), input, layer)
    assert len(packed.weights) == 1


def test_what_is_not_the_weights_does_not_pack_it_again(isa: str, calls: list[str]) -> None:
    layer, input = Layer("affine4:row", 32, 64, "add"), torch.randn(3, 64)
    for bias in (layer.bias, torch.randn(32), layer.bias.mul_(2)):
        layer.bias = bias
        assert_linear(layer(input), input, layer)
        seen, options = quantized(input, "static")
        assert_linear(layer(seen, *options), seen, layer)
        expected = torch.relu(layer(input))
        torch.testing.assert_close(layer(input, activation="relu"), expected)
    assert calls == ["codes", "scales"]


@pytest.mark.parametrize("format", [STATIC, "affine8:tensor"])
def test_an_input_scale_that_crossed_zero_works_by_its_magnitude(isa: str, kernels_only: None, format: str) -> None:
    layer, input = Layer("affine4:row", 40, 64), torch.randn(5, 64) * 3
    scale = torch.full((1, 1), 0.02)
    zero_point = (torch.full((1, 1), 100.3),) if format == STATIC else ()
    seen = reference.quantized_input(input, scale, zero_point[0] if zero_point else None, WeightFormat.parse(format))
    for crossed in (scale, -scale):
        for _ in range(3):
            assert_linear(layer(input, format, crossed, *zero_point), seen, layer)
            crossed.neg_()
    assert not torch.allclose(layer(seen), layer(input), rtol=0.01)


def test_a_tensor_in_the_place_of_another_is_another(isa: str, calls: list[str]) -> None:
    """Memory that is given back is soon used again: at the same address, for a tensor of the same version."""
    layer, input = Layer("affine4:row", 4096, 32), torch.randn(1, 32)
    for i in range(40):
        layer.scale = torch.empty(0)  # the old one is gone before there is a new one
        layer.scale = torch.full((4096, 1), 0.01 * (i + 1))
        assert_linear(layer(input), input, layer)
    assert calls == ["codes", *["scales"] * 40]


def test_what_is_packed_lives_as_long_as_the_codes(isa: str) -> None:
    before, layer = len(native_linear._packed), Layer("affine4:row", 32, 64)
    layer(torch.randn(1, 64))
    assert len(native_linear._packed) == before + 1
    del layer
    assert len(native_linear._packed) == before


def test_weights_that_train_are_not_packed_at_every_step(isa: str, calls: list[str]) -> None:
    layer, input = Layer("affine4:row", 32, 64), torch.randn(3, 64, requires_grad=True)
    layer(input).sum().backward()
    assert calls == ["codes", "scales"] and input.grad is not None
    torch.testing.assert_close(input.grad, layer.weight().sum(0).float().expand(3, 64), rtol=1e-4, atol=1e-5)
    layer.scale.requires_grad_()
    calls.clear()
    layer(input)
    assert calls == []
    with torch.no_grad():
        layer(input)
    with torch.inference_mode():
        layer(input)
    assert calls == []


@pytest.mark.parametrize(
    ("text", "input_format", "dtype"),
    [
        ("affine4:group48", "", torch.float32),
        ("affine4:row", "", torch.float64),
        ("affine4:row", "", torch.float16),
        ("affine4:row", "affine8:tensor", torch.float32),
    ],
)
def test_what_the_kernels_do_not_take_goes_to_the_reference(
    isa: str, calls: list[str], text: str, input_format: str, dtype: torch.dtype
) -> None:
    layer = Layer(text, 8, 96)
    layer(torch.randn(2, 96).to(dtype), input_format)
    assert calls == ["reference"]


def test_two_threads_call_at_once(isa: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    layers = [Layer(text, 256, 512) for text in ("affine4:row", "affine2:group64")]
    inputs = [torch.randn(tokens, 512) for tokens in (1, 3, 40, 70)]
    torch.set_num_threads(2)

    def call(i: int) -> Tensor:
        return layers[i % 2](inputs[i // 2 % 4], "affine8:row")

    expected = [call(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, [i % 8 for i in range(160)]))
    for i, result in enumerate(results):
        assert torch.equal(result, expected[i % 8])


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_an_instruction_set_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "detected_isa", lambda: "avx2")
    monkeypatch.setattr(native, "available", lambda: True)
    for wanted, message in (
        ("sse9", "'sse9': expected one of scalar"),
        ("amx", "amx: this processor has nothing wider"),
    ):
        monkeypatch.setenv("PREQUANT_ISA", wanted)
        native.chosen_isa.cache_clear()
        with pytest.raises(native.NativeLibraryError, match=f"PREQUANT_ISA={message}"):
            native.chosen_isa()
    native.chosen_isa.cache_clear()


def test_without_a_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, calls: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.delenv("PREQUANT_ISA", raising=False)
    monkeypatch.setattr(native, "available", lambda: False)
    native.chosen_isa.cache_clear()
    layer, input = Layer("affine4:row", 32, 64), torch.randn(3, 64)
    for _ in range(3):
        assert_linear(layer(input), input, layer)
    native.chosen_isa.cache_clear()
    assert calls == ["reference"] * 3
    (warning,) = [str(item.message) for item in recwarn if "reference implementation" in str(item.message)]
    assert warning.startswith("libprequant_native.so is not installed")


def test_memory_that_the_library_did_not_pack_is_refused(isa: str) -> None:
    layer, input = Layer("affine4:row", 32, 64), torch.randn(3, 64)
    layer(input)
    packed = native_linear._packed[layer.codes]
    (weight,) = packed.weights.values()
    # The magic words, the versions, the number of rows of either: behind 16 and 64 bytes of a header.
    for memory, byte in ((packed.memory, 0), (packed.memory, 8), (packed.memory, 40), (weight.scales, 24)):
        kept = int(memory[byte])
        memory[byte] = kept ^ 1
        with pytest.raises(native.NativeLibraryError, match="not packed by this"):
            layer(input)
        memory[byte] = kept
    assert_linear(layer(input), input, layer)


def test_outliers_outside_the_weight_are_refused(isa: str) -> None:
    layer, input = Layer("affine4:row", 32, 64, "add"), torch.randn(3, 64)
    assert layer.outliers is not None
    for bad in (
        layer.outliers._replace(columns=layer.outliers.columns.to(torch.int32) + 64),
        layer.outliers._replace(columns=layer.outliers.columns.to(torch.int32) - 64),
        layer.outliers._replace(row_offsets=layer.outliers.row_offsets.flip(0).contiguous()),
    ):
        layer.outliers = bad
        with pytest.raises(native.NativeLibraryError, match="a weight that makes no sense"):
            layer(input)


class Outputs(torch.utils.data.Dataset[Tensor]):
    """The outputs of a layer for a few inputs, computed where they are asked for."""

    def __init__(self) -> None:
        self.layer = Layer("affine4:row", 256, 512)
        self.inputs = torch.randn(4, 40, 512)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> Tensor:
        return self.layer(self.inputs[i], "affine8:row")


def test_a_forked_worker_computes_after_its_parent_has_used_threads(isa: str) -> None:
    torch.set_num_threads(2)
    outputs = Outputs()
    expected = [outputs[i] for i in range(len(outputs))]
    loader = torch.utils.data.DataLoader(
        outputs, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for result, wanted in zip(loader, expected, strict=True):
        assert torch.equal(result, wanted)
