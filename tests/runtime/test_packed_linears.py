"""Several packed linears on one input: the list of what each of them gives, and one call of the native library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.runtime import (
    Backend,
    FormatError,
    Outliers,
    native_repeat,
    ops,
    reference,
    register_backend,
    unregister_backend,
)

from .native_layers import FORMATS, Layer
from .test_native_linear import quantized

COLUMNS = 96


def arguments(layers: list[Layer], input: Tensor, *input_quantization: Any, **changes: Any) -> dict[str, Any]:
    """Those of ``packed_linears``, by name."""
    input_format, *operands = input_quantization or ("",)
    scale, zero_point = operands or (None, None)
    outliers = [layer.outliers or Outliers(None, None, None, False) for layer in layers]  # type: ignore[arg-type]
    return {
        "input": input,
        "codes": [layer.codes for layer in layers],
        "scales": [layer.scale for layer in layers],
        "zero_points": [layer.zero_point for layer in layers],
        "outlier_values": [each.values for each in outliers],
        "outlier_columns": [each.columns for each in outliers],
        "outlier_row_offsets": [each.row_offsets for each in outliers],
        "outliers_replace": [each.replace for each in outliers],
        "biases": [layer.bias for layer in layers],
        "input_scale": scale,
        "input_zero_point": zero_point,
        "formats": [str(layer.format) for layer in layers],
        "activations": [""] * len(layers),
        "columns": layers[0].columns,
        "input_format": input_format,
        **changes,
    }


def mixed_layers() -> list[Layer]:
    """Of different formats and sizes, some with outliers: two share what is read of the input, the others do not."""
    texts = [("affine4:row", "add"), ("affine8:group32:asym", ""), ("affine4:row", ""), ("bcq2:group64", "replace")]
    return [Layer(text, 40 - 9 * i, COLUMNS, outliers, i) for i, (text, outliers) in enumerate(texts)]


def apart(layers: list[Layer], input: Tensor, options: tuple[Any, ...], activations: list[str]) -> list[Tensor]:
    return [layer(input, *options, activation=name) for layer, name in zip(layers, activations, strict=True)]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each native call was for."""
    seen: list[int] = []
    run = native_repeat.run_all

    def noting(linears: list[int], *rest: Any) -> None:
        seen.append(len(linears))
        run(linears, *rest)

    monkeypatch.setattr(native_repeat, "run_all", noting)
    return seen


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
def test_it_is_the_list_of_the_linears(isa: str, joined: list[int], mode: str) -> None:
    layers, activations = mixed_layers(), ["", "gelu", "relu", ""]
    shapes = [(1, COLUMNS), (3, COLUMNS), (3, COLUMNS), (COLUMNS,), (2, 0, COLUMNS), (5, 9, COLUMNS)]
    for shape in shapes:
        input = torch.randn(shape)
        options = quantized(input, mode)[1]
        expected = apart(layers, input, options, activations)
        results = ops.packed_linears(**arguments(layers, input, *options, activations=activations))
        assert len(results) == 4
        for result, one in zip(results, expected, strict=True):
            assert torch.equal(result, one) and result.shape == one.shape
    assert joined == [4] * len(shapes)


@pytest.mark.parametrize("text", FORMATS)
def test_every_format(isa: str, joined: list[int], text: str) -> None:
    layers = [Layer(text, rows, COLUMNS, "add", rows) for rows in (33, 16, 7)]
    for tokens in (1, 20):
        input = torch.randn(tokens, COLUMNS)
        results = ops.packed_linears(**arguments(layers, input, "affine8:row"))
        for result, one in zip(results, apart(layers, input, ("affine8:row",), [""] * 3), strict=True):
            assert torch.equal(result, one)
    assert joined == [3, 3]


def test_more_linears_than_the_library_takes_at_once(isa: str) -> None:
    layers = [Layer("affine4:row", 10 + i, COLUMNS, seed=i) for i in range(37)]
    input = torch.randn(3, COLUMNS).T.contiguous().T
    results = ops.packed_linears(**arguments(layers, input))
    for result, one in zip(results, apart(layers, input, ("",), [""] * 37), strict=True):
        assert torch.equal(result, one)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows_of_all(isa: str, threads: int) -> None:
    """Weights large enough for several threads, whose bounds fall inside of linears and between them."""
    sizes = [("affine4:row", 700), ("affine8:group64", 33), ("binary:row", 1), ("affine2:row", 900)]
    layers = [Layer(text, rows, 512, "add" if rows > 800 else "", rows) for text, rows in sizes]
    for tokens in (1, 5, 40):
        input = torch.randn(tokens, 512)
        torch.set_num_threads(1)
        expected = apart(layers, input, ("affine8:row",), [""] * 4)
        torch.set_num_threads(threads)
        for result, one in zip(ops.packed_linears(**arguments(layers, input, "affine8:row")), expected, strict=True):
            assert torch.equal(result, one)


def test_without_kernels_it_is_the_reference(monkeypatch: pytest.MonkeyPatch, joined: list[int]) -> None:
    layers, input = mixed_layers(), torch.randn(3, COLUMNS, dtype=torch.float64)  # a type that kernels don't take
    results = ops.packed_linears(**arguments(layers, input, "affine8:row"))
    for result, layer in zip(results, layers, strict=True):
        call = ops.checked_linears(**arguments([layer], input, "affine8:row"))[0]
        assert torch.equal(result, reference.packed_linear(*call))
    assert joined == []


def test_one_weight_twice_and_changed_in_between(isa: str) -> None:
    layer, input = Layer("affine4:row", 40, COLUMNS), torch.randn(3, COLUMNS)
    for _ in range(2):
        for result in ops.packed_linears(**arguments([layer, layer], input)):
            assert torch.equal(result, layer(input))
        layer.scale.mul_(2)


def test_a_backend_of_the_linear_takes_its_part(isa: str, joined: list[int]) -> None:
    layers, input = mixed_layers(), torch.randn(3, COLUMNS)
    ops.packed_linears(**arguments(layers, input))
    backend = Backend(
        *("eights", "packed_linear", "cpu", lambda format, *_: format.bits == 8, lambda *_: torch.full((3, 31), 7.0))
    )
    register_backend(backend)
    try:
        results = ops.packed_linears(**arguments(layers, input))
    finally:
        unregister_backend(backend)
    assert torch.equal(results[1], torch.full((3, 31), 7.0)) and torch.equal(results[0], layers[0](input))
    assert joined == [4]


# ---- training --------------------------------------------------------------------------------------------------------


def gradients(call: Callable[[], list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        tensor.grad = None
        tensor.requires_grad_()
    sum((result * (i + 1)).square().sum() for i, result in enumerate(call())).backward()  # type: ignore[union-attr]
    return [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
def test_gradients_are_those_of_each(isa: str, mode: str) -> None:
    layers, input, activations = mixed_layers(), torch.randn(3, COLUMNS), ["", "gelu", "", "relu"]
    options = quantized(input, mode)[1]
    trained = [input, *options[1:]]
    for layer in layers:
        trained += [layer.scale, layer.bias]
        trained += [] if layer.zero_point is None else [layer.zero_point]
        trained += [] if layer.outliers is None else [layer.outliers.values]
    expected = gradients(lambda: apart(layers, input, options, activations), trained)
    found = gradients(
        lambda: ops.packed_linears(**arguments(layers, input, *options, activations=activations)), trained
    )
    assert len(found) == len(trained)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("input_format", ["", "affine8:row"])
def test_what_tracers_see(trains: bool, input_format: str) -> None:
    layers, input = mixed_layers()[:2], torch.randn(3, COLUMNS)
    if trains:
        for tensor in (input, layers[0].scale, layers[1].bias):
            tensor.requires_grad_()
    results = torch.library.opcheck(ops.packed_linears, (), arguments(layers, input, input_format))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_it_compiles_and_exports() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = ops.packed_linears(**arguments(layers, x))
            return first.sum(-1) + second.sum(-1)

    layers, input = mixed_layers()[:2], torch.randn(3, COLUMNS)
    expected = Model()(input)
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), expected)
    exported = torch.export.export(Model(), (input,)).module()
    torch.testing.assert_close(exported(input), expected)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": []}, "4 codes go with as many scales, not 0"),
        ({"biases": [None]}, "4 codes go with as many biases, not 1"),
        ({"activations": ["", ""]}, "4 codes go with as many activations, not 2"),
        ({"activations": ["", "", "", "tanh"]}, "activation 'tanh' is none of"),
        ({"formats": ["affine4:row"] * 4}, "codes of affine4:row with 96 columns have a shape like"),
        ({"columns": 95}, r"an input \[3, 96\] does not fit a weight with 95 columns"),
        ({"input": torch.randn(3, 95)}, r"an input \[3, 95\] does not fit a weight with 96 columns"),
        ({"input_scale": torch.ones(1, 1)}, "needs an input format"),
    ],
)
def test_what_does_not_fit_is_refused(isa: str, changes: dict[str, Any], message: str) -> None:
    layers, input = mixed_layers(), torch.randn(3, COLUMNS)
    ops.packed_linears(**arguments(layers, input))
    with pytest.raises(FormatError, match=message):
        ops.packed_linears(**{**arguments(layers, input), **changes})


def test_no_linear_at_all_is_refused() -> None:
    given = arguments(mixed_layers(), torch.randn(3, COLUMNS))
    nothing = {name: [] if isinstance(value, list) else value for name, value in given.items()}
    with pytest.raises(FormatError, match="at least one linear"):
        ops.packed_linears(**nothing)
