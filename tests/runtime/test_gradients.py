"""Gradients against finite differences in float64, and those of packed ops against those of simulated ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prequant.runtime import Outliers, WeightFormat, ops, reference
from prequant.runtime.packing import pack

ROWS, COLUMNS = 4, 7
FEW = ["affine4:row", "affine2:group4:asym", "bcq3:group4"]
FORMATS = [
    *(
        "affine4:row",
        "affine3:tensor",
        "affine8:group4",
        "affine4:row:asym",
        "affine5:tensor:asym",
        "affine2:group4:asym",
    ),
    *("ternary:row", "ternary:group4:base3", "binary:row", "binary:tensor", "bcq1:row", "bcq3:group4"),
]
ROUNDED = [text for text in FORMATS if not text.startswith("bcq")]


class Weight:
    """A packed weight whose floats are float64 leaves."""

    def __init__(self, text: str, replace: bool = False, dtype: torch.dtype = torch.float64) -> None:
        self.format = WeightFormat.parse(text)
        planes = (self.format.bits,) if text.startswith("bcq") else ()
        self.codes = pack(torch.randint(0, self.format.levels, (*planes, ROWS, COLUMNS)), self.format)
        shape = self.format.scale_shape(ROWS, COLUMNS)
        self.scale = (torch.rand(shape, dtype=dtype) + 0.2).requires_grad_()
        self.zero_point = None
        if not self.format.symmetric:
            self.zero_point = (torch.rand(shape, dtype=dtype) * 3).requires_grad_()
        self.values = torch.randn(5, dtype=dtype, requires_grad=True)
        self.columns = torch.tensor([1, 6, 0, 3, 4], dtype=torch.uint16)
        self.row_offsets = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
        self.replace = replace
        self.options: dict[str, Any] = {"format": text, "columns": COLUMNS}

    def floats(self) -> list[Tensor]:
        return [t for t in (self.scale, self.zero_point, self.values) if t is not None]

    def operands(self) -> tuple[Any, ...]:
        return self.codes, self.scale, self.zero_point, self.values, self.columns, self.row_offsets, self.replace

    def linear(self, input: Tensor, *rest: Tensor | None, **options: Any) -> Tensor:
        return ops.packed_linear(input, *self.operands(), *(*rest, None, None, None)[:3], **self.options, **options)

    def embedding(self, ids: Tensor, **options: Any) -> Tensor:
        return ops.packed_embedding(ids, *self.operands(), **self.options, **options)

    def simulated(self) -> Tensor:
        dense = ops.dequantize(self.codes, self.scale, self.zero_point, **self.options)
        return ops.add_outliers(dense, self.values, self.columns, self.row_offsets, replace=self.replace)


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor | None) -> None:
    """``inputs`` are leaves that ``function`` closes over."""
    assert torch.autograd.gradcheck(lambda *_: function(), [t for t in inputs if t is not None], atol=1e-6, rtol=1e-6)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# ---- finite differences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_dequantize(text: str) -> None:
    weight = Weight(text)
    gradcheck(
        lambda: ops.dequantize(weight.codes, weight.scale, weight.zero_point, **weight.options),
        weight.scale,
        weight.zero_point,
    )
    if text.startswith("bcq"):
        gradcheck(lambda: ops.dequantize_bcq(weight.codes, weight.scale, **weight.options), weight.scale)


@pytest.mark.parametrize("replace", [False, True])
def test_add_outliers(replace: bool) -> None:
    weight, dense = Weight("affine4:row", replace), leaf(ROWS, COLUMNS)
    gradcheck(
        lambda: ops.add_outliers(dense, weight.values, weight.columns, weight.row_offsets, replace=replace),
        dense,
        weight.values,
    )


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("text", FORMATS)
def test_packed_linear(text: str, replace: bool) -> None:
    weight, input, bias = Weight(text, replace), leaf(2, COLUMNS), leaf(ROWS)
    gradcheck(lambda: weight.linear(input, bias), input, bias, *weight.floats())


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("text", FORMATS)
def test_packed_embedding(text: str, replace: bool) -> None:
    weight, ids = Weight(text, replace), torch.tensor([[1, 0], [1, 2]])  # row 1 twice, row 3 never
    gradcheck(lambda: weight.embedding(ids), *weight.floats())


@pytest.mark.parametrize("text", ["affine4:row:asym", "bcq2:row"])
def test_second_derivatives(text: str) -> None:
    weight, input = Weight(text), leaf(2, COLUMNS)
    leaves = [input, *weight.floats()]
    assert torch.autograd.gradgradcheck(lambda *_: weight.linear(input), leaves, atol=1e-6)


# ---- packed against simulated ----------------------------------------------------------------------------------------


def gradients(output: Tensor, leaves: list[Tensor], gradient: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(output, leaves, gradient)
    assert all(g.shape == t.shape and g.dtype == t.dtype for g, t in zip(found, leaves, strict=True))
    return list(found)


CASES = [(text, (2, 3)) for text in FORMATS] + [(text, shape) for text in FEW for shape in ((), (3,), (0,))]


@pytest.mark.parametrize("activation", ["", "affine8:row", "affine4:tensor", "static", "static asym"])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_packed_linear_trains_like_the_simulated_expression(
    text: str, replace: bool, activation: str, shape: tuple[int, ...]
) -> None:
    weight, input, bias = Weight(text, replace), leaf(*shape, COLUMNS), leaf(ROWS)
    leaves = [input, bias, *weight.floats()]
    scale = zero_point = None
    input_format, seen = activation, input
    if activation.startswith("static"):
        scale = torch.full((1, 1), 0.05, dtype=torch.float64, requires_grad=True)
        input_format = "affine6:tensor" if activation == "static" else "affine6:tensor:asym"
        leaves.append(scale)
        if activation.endswith("asym"):
            zero_point = torch.full((1, 1), 20.0, dtype=torch.float64, requires_grad=True)
            leaves.append(zero_point)
    if input_format:
        used = ops.dynamic_scale(input, format=input_format) if scale is None else scale
        seen = ops.fake_quantize(input, used, zero_point, format=input_format)
    simulated = nn.functional.linear(seen, weight.simulated(), bias)
    packed = weight.linear(input, bias, scale, zero_point, input_format=input_format)
    assert torch.allclose(packed, simulated, atol=1e-12)
    gradient = torch.randn_like(packed)
    for one, other in zip(gradients(packed, leaves, gradient), gradients(simulated, leaves, gradient), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding_idx", [-1, 1])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("text", "shape"), CASES)
def test_packed_embedding_trains_like_the_simulated_expression(
    text: str, replace: bool, shape: tuple[int, ...], padding_idx: int
) -> None:
    weight, ids = Weight(text, replace), torch.randint(0, ROWS, shape)
    simulated = torch.ops.aten.embedding(weight.simulated(), ids, padding_idx)
    packed = weight.embedding(ids, padding_idx=padding_idx)
    assert torch.equal(packed, simulated)
    gradient = torch.randn_like(packed)
    leaves = weight.floats()
    for one, other in zip(gradients(packed, leaves, gradient), gradients(simulated, leaves, gradient), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_train_float32_scales(dtype: torch.dtype) -> None:
    weight = Weight("affine4:row", dtype=torch.float32)
    input, bias = torch.randn(3, COLUMNS).to(dtype).requires_grad_(), torch.randn(ROWS, requires_grad=True)
    leaves = [input, bias, *weight.floats()]
    output = weight.linear(input, bias, input_format="affine8:row")
    assert output.dtype == dtype
    gradient = torch.randn(3, ROWS).to(dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = Weight("affine4:row")
    truth.codes, truth.scale, truth.values = weight.codes, exact[2], exact[3]
    expected = gradients(truth.linear(exact[0], exact[1], input_format="affine8:row"), exact, gradient.double())
    for one, other in zip(gradients(output, leaves, gradient), expected, strict=True):
        assert torch.allclose(one.double(), other, rtol=0, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize(
    "make", [lambda g: g.T.contiguous().T, lambda g: g[:1].expand_as(g), lambda g: g.sum().expand_as(g)]
)
def test_gradients_of_any_strides(make: Callable[[Tensor], Tensor]) -> None:
    weight, input = Weight("affine4:group4:asym", replace=True), leaf(3, COLUMNS)
    leaves = [input, *weight.floats()]
    gradient = make(torch.randn(3, ROWS, dtype=torch.float64))
    for one, other in zip(
        gradients(weight.linear(input), leaves, gradient),
        gradients(weight.linear(input), leaves, gradient.contiguous()),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-12)
    rows = make(torch.randn(3, COLUMNS, dtype=torch.float64))
    ids = torch.tensor([2, 0, 2])
    for one, other in zip(
        gradients(weight.embedding(ids), leaves[1:], rows),
        gradients(weight.embedding(ids), leaves[1:], rows.contiguous()),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-12)


# ---- what is kept and computed ---------------------------------------------------------------------------------------


def saved_by(run: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert run().requires_grad
    return saved


def test_the_backward_of_packed_ops_keeps_no_float_weight() -> None:
    weight, input = Weight("affine4:row"), leaf(2, COLUMNS)
    for run in (lambda: weight.linear(input), lambda: weight.embedding(torch.tensor([0, 1]))):
        saved = saved_by(run)
        assert any(
            tensor is weight.codes or torch.equal(tensor, weight.codes)
            for tensor in saved
            if tensor.dtype == torch.uint8
        )
        assert all(tensor.numel() < ROWS * COLUMNS for tensor in saved if tensor.is_floating_point())
    simulated = saved_by(lambda: nn.functional.linear(input, weight.simulated()))
    assert any(
        tensor.numel() == ROWS * COLUMNS for tensor in simulated if tensor.is_floating_point()
    )  # the test can tell


def test_an_input_is_kept_only_for_gradients_that_read_it() -> None:
    weight, input, bias = Weight("affine4:row"), leaf(2, COLUMNS), leaf(ROWS)
    assert any(tensor.shape == input.shape for tensor in saved_by(lambda: weight.linear(input, bias)))
    for tensor in weight.floats():
        tensor.requires_grad_(False)
    assert not any(tensor.shape == input.shape for tensor in saved_by(lambda: weight.linear(input, bias)))


@pytest.mark.parametrize(
    ("trained", "computed"),
    [
        ("input", {"weight"}),
        ("bias", set()),
        ("values", set()),
        ("scale", {"scale"}),
    ],
)
def test_only_what_trains_is_computed(monkeypatch: pytest.MonkeyPatch, trained: str, computed: set[str]) -> None:
    weight, input, bias = Weight("affine4:row"), leaf(2, COLUMNS), leaf(ROWS)
    leaves = {"input": input, "bias": bias, "values": weight.values, "scale": weight.scale}
    for name, tensor in leaves.items():
        tensor.requires_grad_(name == trained)
    output = weight.linear(input, bias)
    calls: set[str] = set()
    unpack, to_scale = ops.dequantize, reference.dequantize_gradients

    def seen(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.add(name)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(ops, "dequantize", seen("weight", unpack))
    monkeypatch.setattr(reference, "dequantize_gradients", seen("scale", to_scale))
    output.sum().backward()
    assert leaves[trained].grad is not None
    assert calls == computed


def test_replaced_weights_take_no_gradient() -> None:
    """A row whose every element is an outlier leaves its scale alone; the same row with added ones does not."""
    weight = Weight("affine4:row", replace=True)
    weight.values = torch.randn(COLUMNS, dtype=torch.float64, requires_grad=True)
    weight.columns = torch.arange(COLUMNS, dtype=torch.int32)
    weight.row_offsets = torch.tensor([0, COLUMNS, COLUMNS, COLUMNS, COLUMNS], dtype=torch.int32)
    for replace in (True, False):
        weight.replace = replace
        gradient = torch.autograd.grad(weight.linear(leaf(3, COLUMNS)).sum(), weight.scale)[0]
        assert (float(gradient[0]) == 0.0) == replace
        assert float(gradient[1]) != 0.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_none_is_wanted(mode: Callable[[], Any]) -> None:
    weight = Weight("affine4:row")
    expected = weight.linear(torch.ones(1, COLUMNS).double()).detach()
    with mode():
        result = weight.linear(torch.ones(1, COLUMNS).double())
    assert not result.requires_grad
    assert torch.equal(result, expected)


@pytest.mark.parametrize("trains", [True, False])
def test_dispatch_modes_see_the_op_itself(trains: bool) -> None:
    """The short way past the dispatcher is for plain tensors alone: tracers and counters still see one packed op."""
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    weight = Weight("affine4:row")
    for tensor in weight.floats():
        tensor.requires_grad_(trains)
    with Watch():
        weight.linear(torch.ones(1, COLUMNS).double())
    assert ops.packed_linear in seen


def test_outlier_positions_by_hand() -> None:
    outliers = Outliers(
        torch.ones(4),
        torch.tensor([2, 0, 1, 5], dtype=torch.uint16),
        torch.tensor([0, 1, 1, 4, 4], dtype=torch.int32),
        False,
    )
    rows, columns = outliers.positions()
    assert rows.tolist() == [0, 2, 2, 2]
    assert columns.tolist() == [2, 0, 1, 5]
