"""quantize_cache on one head's step: what becomes of it, and what is refused."""

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import ExposeOutputs, Input, PassError, Program, Signature, propagate_shapes
from prequant.passes.plan import compile_plan
from prequant.passes.quantize_cache import quantize_cache
from prequant.runtime import WeightFormat
from prequant.trace import trace

from .support import assert_golden

F32 = torch.float32
EIGHT = WeightFormat.affine(8)
SHAPES = {"new": (2, 3, 4, 8), "past": (2, 3, 5, 8), "cross": (2, 3, 6, 8)}


class Step(nn.Module):
    """New positions join those of the past, and see them and others; which are results, too."""

    def forward(self, new: Tensor, past: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = torch.cat([past, new], dim=-2)
        seen = nn.functional.scaled_dot_product_attention(new, keys, keys)
        other = torch.relu(cross)
        return nn.functional.scaled_dot_product_attention(seen, other, other), keys, other


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def step(model: nn.Module | None = None) -> Program:
    program = trace(model or Step(), values())
    axes = {"new": "query", "past": "past", "cross": "source"}
    inputs = tuple(Input(name, F32, ("batch", 3, axes[name], 8)) for name in SHAPES)
    program.update_info(signature=Signature(inputs, tuple(range(3))))
    return program


def rounded(rows: Tensor) -> Tensor:
    unit = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / unit).round() * unit


def coded(rows: Tensor) -> tuple[Tensor, Tensor]:
    unit = rows.abs().amax(-1, keepdim=True) / 127
    return ((rows / unit).round() + 128).to(torch.uint8), unit


def test_golden() -> None:
    program = quantize_cache(step(), ["past"], [1, 2], EIGHT)
    propagate_shapes(program)
    assert_golden(
        program,
        """
        program(new: f32[batch, 3, query, 8], past: u8[batch, 3, past, 8], past_scale: f32[batch, 3, past, 1], cross: f32[batch, 3, source, 8])
          %dynamic_scale_default = dynamic_scale<affine8:row>(%new)
          %quantize_default = quantize<affine8:row>(%new, %dynamic_scale_default)
          %cat_default = cat([%past, %quantize_default], 2)
          %cat_default_1 = cat([%past_scale, %dynamic_scale_default], 2)
          %dequantize_default = dequantize<affine8:row>(%cat_default, %cat_default_1, columns=8, dtype=f32)
          %scaled_dot_product_attention = scaled_dot_product_attention(%new, %dequantize_default, %dequantize_default)
          %relu = relu(%cross)
          %dynamic_scale_default_1 = dynamic_scale<affine8:row>(%relu)
          %quantize_default_1 = quantize<affine8:row>(%relu, %dynamic_scale_default_1)
          %dequantize_default_1 = dequantize<affine8:row>(%quantize_default_1, %dynamic_scale_default_1, columns=8, dtype=f32)
          %scaled_dot_product_attention_1 = scaled_dot_product_attention(%scaled_dot_product_attention, %dequantize_default_1, %dequantize_default_1)
          return (%scaled_dot_product_attention_1, %cat_default, %cat_default_1, %quantize_default_1, %dynamic_scale_default_1)
        """,  # noqa: E501
    )


@pytest.mark.parametrize("planned", [False, True])
def test_it_computes_on_what_the_codes_stand_for(planned: bool) -> None:
    program, given = step(), values()
    past, cross = rounded(given["past"]), rounded(given["cross"].relu())
    keys = torch.cat([past, rounded(given["new"])], dim=2)
    attend = nn.functional.scaled_dot_product_attention
    expected = attend(attend(given["new"], keys, keys), cross, cross)

    quantized = quantize_cache(program, ["past"], [1, 2], EIGHT)
    assert quantized.signature.names == ("new", "past", "past_scale", "cross")
    run = compile_plan(quantized) if planned else quantized.forward
    found, *cache = run(given["new"], *coded(given["past"]), given["cross"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for part, exact in zip(cache, [*coded(keys), *coded(given["cross"].relu())], strict=True):
        torch.testing.assert_close(part, exact, rtol=1e-6, atol=0)
    assert program.signature.names == tuple(SHAPES), "the one that it was made of is as it was"


def test_what_is_only_read_is_an_input_of_codes() -> None:
    given = values()
    quantized = quantize_cache(step(), ["past", "cross"], [1], EIGHT)
    assert quantized.signature.names == ("new", "past", "past_scale", "cross", "cross_scale")
    found = quantized(given["new"], *coded(given["past"]), *coded(given["cross"]))
    expected = step()(given["new"], given["past"], rounded(given["cross"]))
    torch.testing.assert_close(found[-1], expected[-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_widths_are_packed(bits: int) -> None:
    quantized = quantize_cache(step(), ["past"], [1], WeightFormat.affine(bits))
    (past,) = (item for item in quantized.signature.inputs if item.name == "past")
    assert (past.dtype, past.shape) == (torch.uint8, ("batch", 3, "past", bits))
    empty = torch.empty(2, 3, 0, bits, dtype=torch.uint8), torch.empty(2, 3, 0, 1)
    _, codes, scales, _ = quantized(values()["new"], *empty, values()["cross"])
    assert codes.shape == (2, 3, 4, bits) and scales.shape == (2, 3, 4, 1)


class InFront(nn.Module):
    def forward(self, new: Tensor, past: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return new, torch.cat([new, past], dim=-2), cross


class Alone(nn.Module):
    def forward(self, new: Tensor, past: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return new + past.sum(), torch.cat([past, new], dim=-2), cross


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (InFront(), "what is new is not put behind the input 'past'"),
        (Alone(), "the input 'past' is read by itself"),
    ],
)
def test_another_use_of_the_past_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(PassError, match=message):
        quantize_cache(step(model), ["past"], [1], EIGHT)


def test_an_input_that_is_no_cache_is_refused() -> None:
    program = trace(nn.Linear(8, 8), {"input": torch.randn(2, 8)})
    with pytest.raises(PassError, match=r"the input 'input' is no cache \[batch, heads, length, depth\] of floats"):
        quantize_cache(program, ["input"], [], EIGHT)


def test_exposed_values_are_refused() -> None:
    program = ExposeOutputs(include=("*",))(step())
    with pytest.raises(PassError, match=r"has exposed values, .*: hide-outputs comes first"):
        quantize_cache(program, ["past"], [1, 2], EIGHT)
