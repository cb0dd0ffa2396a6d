"""Gradients of packed weights on the Triton kernels, and what training on packed codes keeps and makes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prequant.runtime import WeightFormat, gradients, ops, reference

from ..native_layers import Layer
from ..test_gradients import saved_by

pytest.importorskip("triton")
from prequant.runtime.triton_kernels import rows

FORMATS = [
    *(
        "affine2:row",
        "affine3:group64:asym",
        "affine4:group32",
        "affine5:tensor",
        "affine7:group6:asym",
        "affine8:row:asym",
    ),
    *("ternary:row", "ternary:tensor:base3", "ternary:group32:base3", "binary:row", "binary:group24"),
    *("bcq1:row", "bcq2:group64", "bcq3:group6"),
]
OPS = ("dequantize_gradients", "dequantize", "fake_quantize", "fake_quantize_gradients", "dynamic_scale")


@pytest.fixture(autouse=True)
def kernels_only(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not step in."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    for name in (*OPS, "add_outliers"):
        monkeypatch.setattr(ops, f"_reference_{name}", refuse)


def parts_of(layer: Layer) -> dict[str, Tensor]:
    """The tensors of a layer that train, by name."""
    found = {"scale": layer.scale, "bias": layer.bias}
    if layer.zero_point is not None:
        found["zero_point"] = layer.zero_point
    if layer.outliers is not None:
        found["values"] = layer.outliers.values
    return found


def assert_gradients(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().max()) + 1e-30
    )


# ---- dequantize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_gradients_of_dequantize(gpu: torch.device, text: str) -> None:
    for columns in (199, 128):
        layer = Layer(text, 19, columns).to(gpu)
        needs = (True, layer.zero_point is not None)
        for dtype in (torch.float32, torch.bfloat16):
            gradient = torch.randn(19, columns).to(gpu, dtype)
            operands = (layer.codes, layer.scale, layer.zero_point)
            found = ops.dequantize_gradients(gradient, *operands, format=text, needs=needs)
            exact = (layer.scale.double(), None if layer.zero_point is None else layer.zero_point.double())
            expected = reference.dequantize_gradients(gradient.double(), layer.codes, *exact, layer.format, needs)
            assert len(found) == sum(needs)
            for one, other in zip(found, expected, strict=False):
                assert other is not None and one.dtype is torch.float32
                assert_gradients(one, other)
            again = ops.dequantize_gradients(gradient, *operands, format=text, needs=needs)
            assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_scales_in_half_precision(gpu: torch.device) -> None:
    layer = Layer("affine4:group32:asym", 9, 64).to(gpu)
    assert layer.zero_point is not None
    scale, zero, gradient = layer.scale.half(), layer.zero_point.half(), torch.randn(9, 64, device=gpu).half()
    found = ops.dequantize_gradients(gradient, layer.codes, scale, zero, format=str(layer.format), needs=(True, True))
    exact = (scale.double(), zero.double(), layer.format)
    for one, other in zip(found, reference.dequantize_gradients(gradient, layer.codes, *exact), strict=True):
        assert other is not None and one.dtype is torch.float16
        assert_gradients(one, other, 2e-3)


def test_one_gradient_alone(gpu: torch.device) -> None:
    layer, gradient = Layer("affine4:group32:asym", 9, 64).to(gpu), torch.randn(9, 64, device=gpu)
    operands, format = (gradient, layer.codes, layer.scale, layer.zero_point), str(layer.format)
    both = ops.dequantize_gradients(*operands, format=format, needs=(True, True))
    for wanted in range(2):
        (found,) = ops.dequantize_gradients(*operands, format=format, needs=(wanted == 0, wanted == 1))
        assert torch.equal(found, both[wanted])


def test_activations_of_more_dimensions(gpu: torch.device) -> None:
    """What a quantized cache holds: rows in ``[batch, tokens]``."""
    format = WeightFormat.affine(4, "group", 16)
    input, scale = torch.randn(2, 3, 40, device=gpu), torch.rand(2, 3, 3, device=gpu).requires_grad_()
    codes, gradient = ops.quantize(input, scale.detach(), None, format=str(format)), torch.randn(2, 3, 40, device=gpu)
    ops.dequantize(codes, scale, None, format=str(format), columns=40).backward(gradient)
    expected = reference.dequantize_gradients(gradient.double(), codes, scale.detach().double(), None, format)[0]
    assert scale.grad is not None and expected is not None
    assert_gradients(scale.grad, expected)


@pytest.mark.parametrize("replace", [False, True])
def test_outliers_are_put_into_a_weight(gpu: torch.device, replace: bool) -> None:
    layer = Layer("affine4:row", 19, 130, "replace" if replace else "add").to(gpu)
    assert layer.outliers is not None
    for weight in (torch.randn(19, 130, device=gpu), torch.randn(130, 19, device=gpu).T):
        found = ops.add_outliers(weight, *layer.outliers[:3], replace=replace)
        assert torch.equal(found, reference.add_outliers(weight, layer.outliers))
        assert found.stride() == torch.empty_like(weight).stride()


# ---- packed ops ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", ["", "add", "replace"])
@pytest.mark.parametrize("text", ["affine4:group32:asym", "ternary:row:base3", "bcq2:group64", "binary:tensor"])
def test_packed_linears_train_like_float64(gpu: torch.device, text: str, outliers: str) -> None:
    layer, input = Layer(text, 19, 100, outliers).to(gpu), torch.randn(5, 100, device=gpu)
    trained = {"input": input, **parts_of(layer)}
    for tensor in trained.values():
        tensor.requires_grad_()
    output = layer(input, activation="relu")
    gradient = torch.randn(5, 19, device=gpu)
    found = torch.autograd.grad(output, list(trained.values()), gradient)

    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in trained.items()}
    sparse = None if layer.outliers is None else layer.outliers._replace(values=exact["values"])
    operands = (layer.codes, exact["scale"], exact.get("zero_point"), sparse, layer.format, 100)
    truth = torch.relu(torch.nn.functional.linear(exact["input"], reference.packed_weight(*operands), exact["bias"]))
    for one, other in zip(found, torch.autograd.grad(truth, list(exact.values()), gradient.double()), strict=True):
        assert_gradients(one, other)


@pytest.mark.parametrize("outliers", ["", "replace"])
@pytest.mark.parametrize("text", ["affine4:group32:asym", "bcq2:row"])
def test_packed_embeddings_train_like_float64(gpu: torch.device, text: str, outliers: str) -> None:
    layer, ids = Layer(text, 19, 70, outliers).to(gpu), torch.tensor([[3, 3, 0], [7, 3, 18]], device=gpu)
    sparse = (None, None, None, False) if layer.outliers is None else tuple(layer.outliers)
    trained = {name: tensor.requires_grad_() for name, tensor in parts_of(layer).items() if name != "bias"}
    options = {"format": text, "columns": 70}
    output = ops.packed_embedding(ids, layer.codes, layer.scale, layer.zero_point, *sparse, **options)
    gradient = torch.randn(2, 3, 70, device=gpu)
    found = torch.autograd.grad(output, list(trained.values()), gradient)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in trained.items()}
    positions = None if layer.outliers is None else layer.outliers._replace(values=exact["values"])
    operands = (layer.codes, exact["scale"], exact.get("zero_point"), positions, layer.format, 70)
    truth = reference.packed_weight(*operands)[ids]
    for one, other in zip(found, torch.autograd.grad(truth, list(exact.values()), gradient.double()), strict=True):
        assert_gradients(one, other)


def test_look_ups_of_one_row_add_up(gpu: torch.device) -> None:
    """On a GPU they are sorted first; here that way gives what the other does."""
    ids, gradient = torch.tensor([3, 3, 0, 7, 3], device=gpu), torch.randn(5, 12, device=gpu)
    slots, sums = gradients._summed_by_row(ids, gradient, 9)
    expected = torch.zeros(6, 12, device=gpu).index_put((slots[ids],), gradient, accumulate=True)
    torch.testing.assert_close(sums, expected)


# ---- memory ----------------------------------------------------------------------------------------------------------


def bytes_of(tensors: list[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("input_format", ["", "affine8:row"])
@pytest.mark.parametrize("outliers", ["", "add"])
def test_what_is_saved_for_backward_is_the_input_and_the_packed_operands(
    gpu: torch.device, outliers: str, input_format: str
) -> None:
    """Three layers on each other: not one float of a weight's size is kept, of any of them."""
    layers = [Layer("affine4:group64:asym", 128, 128, outliers, seed).to(gpu) for seed in range(3)]
    for layer in layers:
        layer.scale.requires_grad_()
    inputs = [torch.randn(2, 128, device=gpu)]

    def run() -> Tensor:
        for layer in layers:
            inputs.append(layer(inputs[-1], input_format, activation="gelu"))
        return inputs[-1]

    saved = saved_by(run)
    allowed = [*inputs[:3]]
    for layer in layers:
        allowed += [layer.codes, layer.scale, layer.bias]
        allowed += [] if layer.zero_point is None else [layer.zero_point]
        allowed += [] if layer.outliers is None else list(layer.outliers[:3])
    assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in allowed}
    assert bytes_of(saved) <= bytes_of(allowed) < 3 * 128 * 128 * 2  # a half-precision weight a layer would be as much


class Matrices(TorchDispatchMode):
    """Notes every float tensor of some shape, or its transpose, that comes into being."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape, self.found = sorted(shape), {}  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and sorted(tensor.shape) == self.shape:
                self.found[tensor.data_ptr()] = tensor  # which keeps the address taken
        return result


def test_the_weight_is_unpacked_once_and_in_the_type_of_the_gradient(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward makes two matrices of its size, both in half precision: its gradient, and itself for the input's."""
    layer, input = Layer("affine4:group32", 64, 96).to(gpu), torch.randn(5, 96, device=gpu).half().requires_grad_()
    layer.scale.requires_grad_()
    output = layer(input)
    made: list[Tensor] = []
    unpack: Callable[..., Tensor] = rows.unpacked

    def noting(*arguments: object) -> Tensor:
        made.append(unpack(*arguments))
        return made[-1]

    monkeypatch.setattr(rows, "unpacked", noting)
    with Matrices(64, 96) as seen:
        output.sum().backward()
    assert [(tensor.shape, tensor.dtype) for tensor in made] == [((64, 96), torch.float16)]
    assert [tensor.dtype for tensor in seen.found.values()] == [torch.float16] * 2
