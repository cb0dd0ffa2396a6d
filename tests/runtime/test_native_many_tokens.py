"""The native kernels where many tokens come at once: blocks of tokens, quantizing them, and floats that stay exact."""

import pytest
import torch
from torch import Tensor

from prequant.runtime import reference
from prequant.runtime.packing import pack

from .native_layers import Layer
from .test_native_linear import assert_linear, quantized

pytestmark = pytest.mark.usefixtures("kernels_only")


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference must not step in."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(reference, "packed_linear", refuse)


# Groups: one, a multiple of four, and others; whole and half tiles; one term and several.
FORMATS = [
    "affine4:row",
    "affine4:group64",
    "affine8:group32:asym",
    "affine3:group128:asym",
    "bcq3:row",
    "bcq4:group96",
]


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
@pytest.mark.parametrize("text", FORMATS)
def test_blocks_of_tokens_and_panels(isa: str, text: str, mode: str) -> None:
    """Whole blocks and parts of them, after one another: what is left over from one must not reach the next."""
    for seed, (rows, columns, tokens) in enumerate(
        [(64, 512, 64), (48, 256, 65), (80, 130, 100), (33, 700, 33), (96, 384, 130), (16, 1024, 12), (50, 96, 48)]
    ):
        layer = Layer(text, rows, columns, ("", "add", "replace")[seed % 3], seed)
        input = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
        seen, options = quantized(input, mode)
        assert_linear(layer(input, *options), seen, layer)


def test_more_tokens_than_fit_beside_the_weight(isa: str) -> None:
    layer = Layer("affine4:group64", 40, 8192)
    for tokens in (140, 161):
        input = torch.randn(tokens, 8192, generator=torch.Generator().manual_seed(tokens))
        seen, options = quantized(input, "dynamic")
        assert_linear(layer(input, *options), seen, layer)
    assert_linear(layer(input[:70]), input[:70], layer)


def identity(size: int) -> Layer:
    """A weight that leaves its input as it is: what comes out is what went in, quantized."""
    layer = Layer("affine8:row", size, size)
    layer.codes = pack(torch.full((size, size), 128) + torch.eye(size, dtype=torch.int64), layer.format)
    layer.scale = torch.ones_like(layer.scale)
    return layer


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_quantized_as_by_the_reference(isa: str, mode: str, dtype: torch.dtype) -> None:
    """To the last bit, near the middle between two codes above all, at scales from the smallest to the largest."""
    size = 256
    layer, random = identity(size), torch.Generator().manual_seed(0)
    for tokens in (3, 40):
        largest = 2.0 ** (torch.rand(tokens, 1, generator=random) * 200 - 100)
        if mode == "static":
            largest = torch.full_like(largest, 127 * 0.03)
        scale = largest / 127
        middles = torch.randint(-127, 127, (tokens, size), generator=random) + 0.5
        input = middles * scale
        for _ in range(3):  # up to three floats away
            away = torch.rand(tokens, size, generator=random) < 0.5
            towards = torch.where(torch.rand(tokens, size, generator=random) < 0.5, torch.inf, -torch.inf)
            input = torch.where(away, torch.nextafter(input, towards), input)
        input[:, :1] = largest
        input = input.to(dtype)
        seen, options = quantized(input.float(), mode)
        result = layer(input, *options, bias=False)
        assert torch.equal(result, seen.to(dtype))


def test_static_inputs_far_outside_of_the_grid_are_cut_off(isa: str) -> None:
    layer = identity(64)
    input = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, 1e10, -1e10, 4.0, -4.0] * 8).expand(20, 64)
    seen, options = quantized(input, "static")
    assert torch.equal(layer(input, *options, bias=False), seen)


@pytest.mark.parametrize("text", ["binary:row", "affine4:row", "affine8:group64"])
def test_a_float32_keeps_all_of_its_bits(isa: str, text: str) -> None:
    """One column of a token is not 0: nothing hides what is lost of it."""
    layer = Layer(text, 48, 192)
    random = torch.Generator().manual_seed(0)
    for tokens in (2, 50):
        input = torch.zeros(tokens, 192)
        columns = torch.randint(0, 192, (tokens,), generator=random)
        values = 1 + torch.randint(0, 1 << 23, (tokens,), generator=random) / (1 << 23)
        input[torch.arange(tokens), columns] = values * 2.0 ** torch.randint(-80, 80, (tokens,), generator=random)
        expected = input.double() @ layer.weight().T
        torch.testing.assert_close(layer(input, bias=False).double(), expected, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("exponent", [-148, -130, -110, -70, 0, 70, 110, 120])
def test_floats_of_any_size(isa: str, exponent: int) -> None:
    """Tokens near the ends of what float32 holds, with ordinary ones beside them."""
    layer = Layer("binary:row", 48, 100, "add")
    for tokens in (3, 45):
        input = torch.randn(tokens, 100, generator=torch.Generator().manual_seed(0))
        input[::2] = (input[::2].double() * 2.0**exponent).float()
        result = layer(input, bias=False).double()
        weight = layer.weight()
        size = input.double().abs() @ weight.abs().T
        error = (result - input.double() @ weight.T).abs()
        assert bool((error <= 2e-6 * size + 2.0**-148).all())


@pytest.mark.parametrize("text", [f"affine{bits}:row" for bits in range(2, 9)] + ["affine8:group64:asym", "bcq2:row"])
def test_bfloat16_inputs_are_taken_as_they_are(isa: str, text: str) -> None:
    """In float32 throughout: only the result is rounded, once."""
    layer = Layer(text, 40, 300)
    input = torch.randn(37, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = input.double() @ layer.weight().T + layer.bias.double()
    size = input.double().abs() @ layer.weight().abs().T + layer.bias.double().abs()
    result = layer(input)
    assert result.dtype is torch.bfloat16
    assert bool(((result.double() - exact).abs() <= 2.0**-8 * exact.abs() + 4e-6 * size).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinity_and_nan_reach_the_results_of_their_token(isa: str, dtype: torch.dtype, bad: float) -> None:
    layer = Layer("binary:row", 40, 96)
    input = torch.randn(40, 96).to(dtype)
    input[7, 5] = bad
    result = layer(input, bias=False)
    expected = bad * layer.weight()[:, 5].sign().to(dtype)  # no weight is 0: infinity stays what it is
    torch.testing.assert_close(result[7], expected, equal_nan=True)
    assert bool(result[[i for i in range(40) if i != 7]].isfinite().all())
