"""A call that repeats an earlier one skips the checks, and misses nothing that has changed since."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.runtime import (
    Backend,
    FormatError,
    native,
    native_repeat,
    ops,
    reference,
    register_backend,
    unregister_backend,
)

from .native_layers import Layer
from .test_native_linear import assert_linear, quantized


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Inputs of the calls that took the long way."""
    seen: list[Tensor] = []
    check = ops.checked_linear

    def noting(input: Tensor, *rest: object) -> tuple[object, ...]:
        seen.append(input)
        return check(input, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "checked_linear", noting)
    return seen


def layer_and_input() -> tuple[Layer, Tensor]:
    """A layer that was called, and another input for it."""
    layer = Layer("affine4:group32:asym", 32, 64, "add")
    layer(torch.randn(3, 64))
    return layer, torch.randn(3, 64)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_second_call_is_not_examined(isa: str, examined: list[Tensor], mode: Callable[[], torch.no_grad]) -> None:
    layer = Layer("affine4:group32:asym", 32, 64, "add")
    with mode():
        for shape in [(3, 64), (3, 64), (1, 64), (64,), (2, 5, 64), (0, 64), (70, 64)]:
            input, residual = torch.randn(shape), torch.randn(*shape[:-1], 32)
            assert_linear(layer(input), input, layer)
            torch.testing.assert_close(layer(input, residual=residual), layer(input) + residual, rtol=1e-5, atol=1e-5)
    assert len(examined) == 1


def test_a_quantized_input_is_part_of_the_call(isa: str, examined: list[Tensor]) -> None:
    layer, input = layer_and_input()
    for mode in ("static", "dynamic", "float"):
        seen, options = quantized(input, mode)
        assert_linear(layer(input, *options), seen, layer)
        assert_linear(layer(input, *options), seen, layer)
    assert len(examined) == 4


def change_scale(layer: Layer) -> None:
    layer.scale.data = layer.scale.data * 2


def change_zero_point(layer: Layer) -> None:
    assert layer.zero_point is not None
    layer.zero_point.data = layer.zero_point.data + 1


def change_codes(layer: Layer) -> None:
    layer.codes.data = layer.codes.data.flip(0)


def change_bias(layer: Layer) -> None:
    layer.bias.data = layer.bias.data.flip(0)


def change_outlier(layer: Layer) -> None:
    assert layer.outliers is not None
    layer.outliers.values.data = layer.outliers.values.data * 3


def write_bias(layer: Layer) -> None:
    layer.bias.add_(1)


def other_bias(layer: Layer) -> None:
    layer.bias = torch.randn(32)


def other_scale(layer: Layer) -> None:
    layer.scale = layer.scale * 2


def other_outliers(layer: Layer) -> None:
    assert layer.outliers is not None
    layer.outliers = layer.outliers._replace(values=layer.outliers.values + 1)


def replacing_outliers(layer: Layer) -> None:
    assert layer.outliers is not None
    layer.outliers = layer.outliers._replace(replace=True)


def no_outliers(layer: Layer) -> None:
    layer.outliers = None


CHANGES = [
    *(change_scale, change_zero_point, change_codes, change_bias, change_outlier),
    *(write_bias, other_bias, other_scale, other_outliers, replacing_outliers, no_outliers),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_seen(isa: str, change: Callable[[Layer], None]) -> None:
    layer, input = layer_and_input()
    before = layer(input)
    change(layer)
    after = layer(input)
    assert_linear(after, input, layer)
    assert not torch.equal(after, before)
    assert_linear(layer(input), input, layer)


@pytest.mark.parametrize("change", [change_scale, change_codes, other_bias])
def test_weights_of_inference_mode(isa: str, change: Callable[[Layer], None]) -> None:
    """They count no changes, but what is put in the place of one is another tensor, or lies elsewhere."""
    with torch.inference_mode():
        layer, input = layer_and_input()
        assert_linear(layer(input), input, layer)
        change(layer)
        assert_linear(layer(input), input, layer)


def test_inputs_that_differ_take_the_long_way(isa: str, examined: list[Tensor]) -> None:
    layer, input = layer_and_input()
    del examined[:]
    for other in (input.T.contiguous().T, input.bfloat16(), input.double()):
        torch.testing.assert_close(layer(other).float(), layer(input), rtol=0.02, atol=0.05)
    assert len(examined) >= 3


@pytest.mark.parametrize(
    ("input", "message"),
    [
        (torch.randn(3, 63), r"an input \[3, 63\] does not fit a weight with 64 columns"),
        (torch.randn(64, 3), r"an input \[64, 3\] does not fit"),
        (torch.tensor(1.0), r"an input \[\] does not fit"),
        (torch.ones(3, 64, dtype=torch.int64), "is of floats, not torch.int64"),
    ],
)
def test_a_bad_input_is_refused_at_any_call(isa: str, input: Tensor, message: str) -> None:
    layer, _ = layer_and_input()
    with pytest.raises(FormatError, match=message):
        layer(input)


def test_a_bad_operand_is_refused_at_any_call(isa: str) -> None:
    layer, input = layer_and_input()
    for residual in (torch.randn(3, 31), torch.randn(32), torch.randn(3, 32).double()):
        with pytest.raises(FormatError, match="a residual"):
            layer(input, residual=residual)
    with pytest.raises(FormatError, match="activation 'tanh' is none of"):
        layer(input, activation="tanh")
    bias, layer.bias = layer.bias, torch.randn(31)
    with pytest.raises(FormatError, match=r"a bias \[31\] does not fit"):
        layer(input)
    layer.bias = bias
    assert_linear(layer(input), input, layer)


def test_a_residual_of_any_strides(isa: str) -> None:
    layer, input = layer_and_input()
    residual = torch.randn(32, 3).T
    torch.testing.assert_close(layer(input, residual=residual), layer(input) + residual, rtol=1e-5, atol=1e-5)


def test_a_backend_that_comes_later_is_asked(isa: str) -> None:
    layer, input = layer_and_input()
    answer = torch.full((3, 32), 7.0)
    backend = Backend("later", "packed_linear", "cpu", lambda *_: True, lambda *_: answer)
    register_backend(backend)
    try:
        assert torch.equal(layer(input), answer)
    finally:
        unregister_backend(backend)
    assert_linear(layer(input), input, layer)


def test_a_backend_that_declines_is_asked_again(isa: str) -> None:
    layer, input = layer_and_input()
    asked: list[int] = []

    def accepts(format: object, input: Tensor, *_: object) -> bool:
        asked.append(len(input))
        return len(input) == 5

    backend = Backend("fives", "packed_linear", "cpu", accepts, lambda *_: torch.full((5, 32), 7.0))
    register_backend(backend)
    try:
        for _ in range(2):
            assert_linear(layer(input), input, layer)
        assert torch.equal(layer(torch.randn(5, 64)), torch.full((5, 32), 7.0))
        assert asked == [3, 3, 5]
    finally:
        unregister_backend(backend)


def test_another_instruction_set_and_the_reference(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, input = layer_and_input()
    ran: list[str] = []
    run = reference.packed_linear

    def noting(*arguments: Any) -> Tensor:
        ran.append("reference")
        return run(*arguments)

    monkeypatch.setattr(reference, "packed_linear", noting)
    monkeypatch.setenv("PREQUANT_ISA", "reference")
    native.chosen_isa.cache_clear()
    assert_linear(layer(input), input, layer)
    assert ran == ["reference"]
    monkeypatch.setenv("PREQUANT_ISA", "scalar")
    native.chosen_isa.cache_clear()
    assert_linear(layer(input), input, layer)
    assert ran == ["reference"]


def test_gradients_of_a_weight_are_recorded_at_any_call(isa: str) -> None:
    layer, input = layer_and_input()
    layer.scale.requires_grad_()
    layer(input).sum().backward()
    assert layer.scale.grad is not None and bool(layer.scale.grad.abs().sum() > 0)


def test_a_call_is_remembered_as_long_as_its_codes(isa: str) -> None:
    before = len(native_repeat._repeats)
    layer, _ = layer_and_input()
    assert len(native_repeat._repeats) == before + 1
    del layer
    assert len(native_repeat._repeats) == before


def test_threads_and_their_number_may_change(isa: str) -> None:
    layer, _ = layer_and_input()
    inputs = [torch.randn(tokens, 64) for tokens in (1, 40, 3, 200)]
    expected = [layer(input) for input in inputs]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda i: layer(inputs[i % 4]), range(80)))
        for i, result in enumerate(results):
            torch.testing.assert_close(result, expected[i % 4], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_goes_on(isa: str) -> None:
    torch.set_num_threads(1)  # libgomp's threads do not live on in the child
    layer, input = layer_and_input()
    expected = layer(input)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(input), expected) and len(layer(torch.randn(90, 64))) == 90 else 1)
    assert os.waitpid(child, 0)[1] == 0
