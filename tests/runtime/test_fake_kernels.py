"""What tracers see: schemas, shape functions and autograd registration agree with what the kernels do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.runtime import Quantizer, WeightFormat, binary_code, ops

ROWS, COLUMNS = 6, 20
FORMATS = ["affine8:row", "affine3:tensor", "affine4:group8:asym", "ternary:group8:base3", "binary:row", "bcq3:group8"]
ROUNDED = [text for text in FORMATS if not text.startswith("bcq")]


def packed(text: str, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor | None]:
    format = WeightFormat.parse(text)
    weight = torch.randn(rows, columns)
    return binary_code(weight, format) if text.startswith("bcq") else Quantizer(format, "minmax")(weight)


def outliers() -> tuple[Tensor, Tensor, Tensor]:
    values, columns = torch.randn(4), torch.tensor([0, 3, 3, 19], dtype=torch.uint16)
    return values, columns, torch.tensor([0, 2, 2, 3, 3, 4, 4], dtype=torch.int32)


def leaf(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone().requires_grad_()


def check(op: Any, *arguments: Any, **options: Any) -> None:
    """Schema, fake kernel, autograd registration, and AOT autograd with dynamic shapes (forward and backward)."""
    results = torch.library.opcheck(op, arguments, options)
    assert set(results.values()) == {"SUCCESS"}, results
    assert len(results) == 4


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("text", FORMATS)
def test_dequantize(text: str, trains: bool) -> None:
    codes, scale, zero_point = packed(text)
    if trains:
        scale, zero_point = leaf(scale), leaf(zero_point)  # type: ignore[assignment]
    check(ops.dequantize, codes, scale, zero_point, format=text, columns=COLUMNS)
    check(ops.dequantize, codes, scale, zero_point, format=text, columns=COLUMNS, dtype=torch.bfloat16)
    if text.startswith("bcq"):
        check(ops.dequantize_bcq, codes, scale, format=text, columns=COLUMNS)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("text", ["affine4:group8:asym", "bcq3:group8"])
def test_gradients_of_dequantize(text: str, trains: bool) -> None:
    codes, scale, zero_point = packed(text)
    gradient = torch.randn(ROWS, COLUMNS)
    if trains:
        gradient, scale, zero_point = leaf(gradient), leaf(scale), leaf(zero_point)  # type: ignore[assignment]
    needs = (True, zero_point is not None)
    for given in (gradient, gradient.detach()[:1].expand_as(gradient)):
        check(ops.dequantize_gradients, given, codes, scale, zero_point, format=text, needs=needs)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("text", ROUNDED)
def test_rounding(text: str, trains: bool) -> None:
    _, scale, zero_point = packed(text)
    input = torch.randn(ROWS, COLUMNS)
    check(ops.quantize, input, scale, zero_point, format=text)
    if trains:
        input, scale, zero_point = leaf(input), leaf(scale), leaf(zero_point)  # type: ignore[assignment]
    check(ops.fake_quantize, input, scale, zero_point, format=text)
    check(ops.fake_quantize, input.detach().T.contiguous().T, scale, zero_point, format=text, clipped=False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("text", ROUNDED)
def test_gradients_of_rounding(text: str, trains: bool) -> None:
    _, scale, zero_point = packed(text)
    affine = text.startswith("affine")
    some = [(False, True, False), (affine, True, affine and zero_point is not None)]
    input, gradient = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    if trains:
        floats = map(leaf, (input, gradient, scale, zero_point))
        input, gradient, scale, zero_point = floats  # type: ignore[assignment]
    for needs in some:
        for given in (gradient, gradient.detach().T.contiguous().T, gradient.detach()[:1].expand_as(gradient)):
            operands = (given, input, scale, zero_point)
            check(ops.fake_quantize_gradients, *operands, format=text, scale_gradient=True, needs=needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["affine8:row", "affine4:tensor"])
def test_dynamic_scale(text: str, dtype: torch.dtype) -> None:
    check(ops.dynamic_scale, torch.randn(2, 3, COLUMNS).to(dtype), format=text)
    check(ops.dynamic_scale, torch.randn(COLUMNS, dtype=dtype).requires_grad_(), format=text)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_add_outliers(trains: bool, replace: bool) -> None:
    values, columns, row_offsets = outliers()
    weight = torch.randn(ROWS, COLUMNS)
    if trains:
        weight, values = leaf(weight), leaf(values)  # type: ignore[assignment]
    check(ops.add_outliers, weight, values, columns, row_offsets, replace=replace)


@pytest.mark.parametrize("input_format", ["", "affine8:row", "affine8:tensor", "static"])
@pytest.mark.parametrize("text", FORMATS)
def test_packed_linear(text: str, input_format: str) -> None:
    codes, scale, zero_point = packed(text)
    values, columns, row_offsets = outliers()
    input, bias = torch.randn(2, 3, COLUMNS), torch.randn(ROWS)
    input_scale = torch.full((1, 1), 0.1) if input_format == "static" else None
    options = {
        "format": text,
        "columns": COLUMNS,
        "input_format": "affine8:tensor" if input_scale is not None else input_format,
    }
    if text == FORMATS[0]:
        check(
            ops.packed_linear,
            input,
            codes,
            scale,
            zero_point,
            None,
            None,
            None,
            False,
            None,
            input_scale,
            None,
            **options,
        )
    floats = map(leaf, (scale, zero_point, input, bias, values, input_scale))
    scale, zero_point, input, bias, values, input_scale = floats  # type: ignore[assignment]
    sparse = values, columns, row_offsets
    check(ops.packed_linear, input, codes, scale, zero_point, *sparse, True, bias, input_scale, None, **options)


@pytest.mark.parametrize("text", FORMATS)
def test_packed_embedding(text: str) -> None:
    codes, scale, zero_point = packed(text)
    values, columns, row_offsets = outliers()
    ids = torch.tensor([[0, 5, 0], [2, 2, 1]])
    options: dict[str, Any] = {"format": text, "columns": COLUMNS}
    check(ops.packed_embedding, ids, codes, scale, zero_point, None, None, None, False, **options, dtype=torch.float16)
    scale, zero_point, values = map(leaf, (scale, zero_point, values))  # type: ignore[assignment]
    check(
        ops.packed_embedding,
        ids,
        codes,
        scale,
        zero_point,
        values,
        columns,
        row_offsets,
        True,
        **options,
        padding_idx=2,
    )


@pytest.mark.parametrize("shape", [(COLUMNS,), (0, COLUMNS), (2, 3, COLUMNS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_linear_has_the_real_ones_metadata(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    codes, scale, _ = packed("affine4:row")
    inputs = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).transpose(0, -1).contiguous().transpose(0, -1)]
    for input in inputs:
        arguments = (input, codes, scale, None, None, None, None, False, None, None, None)
        real = ops.packed_linear(*arguments, format="affine4:row", columns=COLUMNS, input_format="affine8:row")
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = ops.packed_linear(*arguments, format="affine4:row", columns=COLUMNS, input_format="affine8:row")
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# ---- whole modules ---------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """An embedding, a linear with every operand, and a simulated linear."""

    def __init__(self) -> None:
        super().__init__()
        for name, text in (("table", "affine4:group8:asym"), ("first", "affine3:row"), ("second", "bcq2:row")):
            rows = COLUMNS if name == "first" else ROWS
            codes, scale, zero_point = packed(text, rows)
            self.register_buffer(f"{name}_codes", codes)
            setattr(self, f"{name}_scale", nn.Parameter(scale))
            if zero_point is not None:
                setattr(self, f"{name}_zero_point", nn.Parameter(zero_point))
        values, columns, row_offsets = outliers()
        self.values = nn.Parameter(values)
        self.register_buffer("columns", columns)
        self.register_buffer("row_offsets", row_offsets)
        self.bias = nn.Parameter(torch.randn(COLUMNS))
        self.latent = nn.Parameter(torch.randn(ROWS, COLUMNS))
        self.latent_scale = nn.Parameter(torch.full((ROWS, 1), 0.3))

    def forward(self, ids: Tensor) -> Tensor:
        sparse = (self.values, self.columns, self.row_offsets, False)
        hidden = ops.packed_embedding(
            *(ids, self.table_codes, self.table_scale, self.table_zero_point, *sparse),
            format="affine4:group8:asym",
            columns=COLUMNS,
            padding_idx=0,
        )
        hidden = ops.packed_linear(
            *(hidden, self.first_codes, self.first_scale, None, None, None, None, False, self.bias, None, None),
            format="affine3:row",
            columns=COLUMNS,
            input_format="affine8:row",
        )
        second = ops.dequantize_bcq(self.second_codes, self.second_scale, format="bcq2:row", columns=COLUMNS)
        second = ops.add_outliers(second, *sparse[:3], replace=True)
        third = ops.fake_quantize(self.latent, self.latent_scale, None, format="affine4:row")
        scale = ops.dynamic_scale(hidden, format="affine8:tensor")
        hidden = ops.fake_quantize(hidden, scale, None, format="affine8:tensor")
        return torch.nn.functional.linear(hidden.tanh(), second + third)


def test_torch_export_with_dynamic_shapes() -> None:
    model = Model()
    length = torch.export.Dim("length", min=2, max=64)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        model, (torch.tensor([[0, 1, 2], [3, 4, 5]]),), dynamic_shapes=({0: batch, 1: length},)
    )
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert {ops.packed_embedding, ops.packed_linear, ops.dequantize_bcq, ops.add_outliers, ops.fake_quantize} <= set(
        targets
    )
    for shape in ((2, 3), (5, 9), (4, 2)):
        ids = torch.randint(0, ROWS, shape)
        assert torch.equal(exported.module()(ids), model(ids))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_in_training(backend: str, dynamic: bool) -> None:
    """One graph, forward and backward, with the gradients of the uncompiled module."""
    torch.compiler.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in ((2, 3), (3, 4)):
        ids = torch.randint(0, ROWS, shape)
        results = []
        for function in (model, compiled):
            model.zero_grad()
            output = function(ids)
            output.square().sum().backward()
            results.append((output.detach(), [p.grad for p in model.parameters()]))
        assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
        for name, one, other in zip(dict(model.named_parameters()), results[0][1], results[1][1], strict=True):
            assert one is not None and other is not None, name
            assert torch.allclose(one, other, atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_torch_compile_without_gradients(mode: Callable[[], Any]) -> None:
    torch.compiler.reset()
    model = Model().eval()
    ids = torch.randint(0, ROWS, (3, 4))
    with mode():
        expected = model(ids)
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(ids), expected, atol=1e-6)


def test_an_uncalibrated_activation_can_be_traced() -> None:
    with torch._subclasses.FakeTensorMode():
        input = torch.empty(2, 3)
        assert ops.uncalibrated(input, format="affine8:tensor", observer="minmax", name="x").shape == (2, 3)


def test_scale_gradient() -> None:
    check(ops.scale_gradient, torch.randn(3, 4), factor=0.5)
    input = torch.randn(3, 4, requires_grad=True)
    check(ops.scale_gradient, input, factor=-2.0)
    result = ops.scale_gradient(input, factor=0.25)
    assert torch.equal(result, input) and result.data_ptr() != input.data_ptr()
    (result * torch.arange(12.0).reshape(3, 4)).sum().backward()
    assert input.grad is not None and torch.equal(input.grad, torch.arange(12.0).reshape(3, 4) / 4)
