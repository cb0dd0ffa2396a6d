"""Rows as 8-bit codes in plans, on every instruction set: against the ops' reference, and sums in float64."""

import pytest
import torch
from torch import Tensor

from prequant.runtime import WeightFormat, reference
from prequant.runtime import plan as p

from .plan_steps import done, run, words

NAN = torch.nan
FORMAT = WeightFormat.affine(8)


def quantized(rows: Tensor, threads: int = 1) -> tuple[Tensor, Tensor]:
    codes, scales = torch.zeros(rows.shape, dtype=torch.uint8), torch.full((*rows.shape[:3], 1), NAN)
    tensors = [rows, codes, scales]
    done(words(p.QUANTIZE, rows.shape, tensors), tensors, threads)
    return codes, scales


def dequantized(codes: Tensor, scales: Tensor, threads: int = 1) -> Tensor:
    out = torch.full(codes.shape, NAN)
    tensors = [codes, scales, out]
    done(words(p.DEQUANTIZE, codes.shape, tensors), tensors, threads)
    return out


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 5, 64), (1, 2, 300, 37), (2, 2, 0, 16), (1, 2, 3, 0)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_and_scales_are_the_references(isa: str, sizes: tuple[int, ...], threads: int) -> None:
    rows = torch.randn(sizes) * torch.logspace(-20, 20, sizes[2])[None, None, :, None]
    if rows.numel() > 1:
        rows[0, -1, 0] = 0.0
        rows[-1, 0, -1] = 1e-42  # a scale would be subnormal
    codes, scales = quantized(rows, threads)
    if sizes[3] == 0:  # of which the reference has no largest number
        assert torch.equal(scales, torch.ones_like(scales))
        return
    expected = reference.dynamic_scale(rows, FORMAT)
    assert torch.equal(scales, expected)
    assert torch.equal(codes, reference.quantize(rows, expected, None, FORMAT))
    assert torch.equal(dequantized(codes, scales, threads), (codes.float() - 128) * scales)


def test_halves_are_rounded_to_even(isa: str) -> None:
    rows = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]).reshape(1, 1, 1, 8)
    codes, scales = quantized(rows)
    assert scales.item() == 1.0
    assert (codes.flatten().int() - 128).tolist() == [127, 0, 2, 2, 0, -2, -127, 126]


def test_rows_may_be_strided(isa: str) -> None:
    together = torch.randn(2, 9, 3, 40)
    rows = together.transpose(1, 2)[..., ::2]
    codes, scales = quantized(rows)
    again = quantized(rows.contiguous())
    assert torch.equal(codes, again[0]) and torch.equal(scales, again[1])
    wide = torch.full((2, 3, 9, 40), NAN)
    tensors = [codes, scales, wide[..., ::2]]
    done(words(p.DEQUANTIZE, codes.shape, tensors), tensors)
    assert torch.equal(wide[..., ::2], dequantized(codes, scales)) and bool(wide[..., 1::2].isnan().all())


@pytest.mark.parametrize("bad", [NAN, torch.inf, -torch.inf])
def test_what_is_no_number_comes_through_in_its_row_alone(isa: str, bad: float) -> None:
    rows = torch.randn(1, 2, 3, 20)
    rows[0, 1, 2, 19] = bad
    found = dequantized(*quantized(rows))
    assert bool(found[0, 1, 2].isnan().all())
    assert int(found.isnan().sum()) == 20


SIZES = [
    # batch, heads, heads of keys, queries, keys, depth, value depth
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2, 1, 37, 20, 20),
    (1, 2, 1, 3, 65, 16, 9),
    (2, 4, 2, 4, 5, 8, 3),
    (1, 3, 3, 1, 64, 33, 64),
    (1, 2, 2, 40, 131, 64, 65),
    (1, 2, 2, 2, 0, 8, 8),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_attention_to_codes(isa: str, sizes: tuple[int, ...], threads: int) -> None:
    batch, heads, key_heads, queries, keys, depth, value_depth = sizes
    query = torch.randn(batch, heads, queries, depth)
    key, value = (quantized(torch.randn(batch, key_heads, keys, size)) for size in (depth, value_depth))
    mask = torch.rand(batch, 1, 1, keys) < 0.7
    mask[..., :1] = True
    out = torch.full((batch, heads, queries, value_depth), NAN)
    shown = mask.expand(batch, heads, queries, keys)
    for seen, kind in ((None, p.NO_MASK), (shown, p.BOOL_MASK)):
        tensors = [query, key[0], value[0], seen, out, key[1], value[1]]
        step = words(p.ATTENTION, (batch, heads, queries, keys, depth, value_depth, key_heads), tensors, kind, 0.3)
        done(step, tensors, threads)
        keys_, values = (dequantized(*part).double().repeat_interleave(heads // key_heads, 1) for part in (key, value))
        scores = 0.3 * query.double() @ keys_.transpose(-1, -2)
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        exact = scores.softmax(-1).nan_to_num(0.0) @ values
        assert not keys or (out - exact).abs().max() <= 3e-6 * exact.abs().max()
        assert keys or torch.equal(out, torch.zeros_like(out))


def test_scales_of_keys_without_those_of_values_are_refused(isa: str) -> None:
    query = torch.randn(1, 1, 1, 8)
    codes, scales = quantized(torch.randn(1, 1, 4, 8))
    tensors = [query, codes, codes, None, torch.empty(1, 1, 1, 8), scales]
    assert run([words(p.ATTENTION, (1, 1, 1, 4, 8, 8, 1), tensors, p.NO_MASK, 1.0)], tensors)[0] != 0
