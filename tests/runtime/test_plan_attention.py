"""Attention of plans, on every instruction set, against a softmax in float64 and PyTorch."""

import pytest
import torch
from torch import Tensor, nn

from prequant.runtime import plan as p

from .plan_steps import done, words

INF, NAN = torch.inf, torch.nan


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 0.3, threads: int = 1
) -> Tensor:
    batch, heads, queries, depth = query.shape
    rows = torch.full((batch, queries, heads, value.shape[3]), NAN)
    out = rows.permute(0, 2, 1, 3)
    kind = p.NO_MASK if mask is None else p.BOOL_MASK if mask.dtype is torch.bool else p.FLOAT_MASK
    mask = None if mask is None else mask.expand(batch, heads, queries, key.shape[2])
    sizes = (batch, heads, queries, key.shape[2], depth, value.shape[3], key.shape[1])
    tensors = [query, key, value, mask, out]
    done(words(p.ATTENTION, sizes, tensors, kind, scale), tensors, threads)
    return out


def exactly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float = 0.3) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(shared, 1) for x in (key, value))
    scores = scale * query.double() @ key.transpose(-1, -2)
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, -INF)
    elif mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1).nan_to_num(0.0) @ value


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 3e-6 * expected.abs().max())


SIZES = [
    # batch, heads, heads of keys, queries, keys, depth, value depth
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 2, 1, 37, 20, 20),
    (1, 2, 1, 3, 65, 16, 9),
    (2, 4, 2, 4, 5, 8, 3),
    (1, 3, 3, 5, 64, 33, 64),
    (2, 2, 1, 33, 70, 24, 31),
    (1, 2, 2, 70, 131, 64, 65),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_attention(isa: str, sizes: tuple[int, ...], threads: int) -> None:
    batch, heads, key_heads, queries, keys, depth, value_depth = sizes
    query = torch.randn(batch, heads, queries, depth)
    key, value = torch.randn(batch, key_heads, keys, depth), torch.randn(batch, key_heads, keys, value_depth)
    seen = torch.rand(batch, 1, queries, keys) < 0.7
    seen[..., 0] = True
    masks = [
        None,
        seen,
        seen[:, :, :1],
        seen[:1, 0, :1],
        torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if keys > queries else 0),
        torch.randn(batch, heads, queries, keys),
        torch.randn(1, 1, 1, keys).masked_fill(~seen[:1, :, :1], -INF),
        torch.randn(1, heads, 1, 1),
        torch.zeros(batch, 1, 1, keys).masked_fill(~seen[:, :, :1], torch.finfo(torch.float32).min),
    ]
    for mask in masks:
        found = attention(query, key, value, mask, threads=threads)
        assert close(found, exactly(query, key, value, mask)), mask


def test_strided_operands(isa: str) -> None:
    together = torch.randn(2, 40, 3 * 4 * 18)
    query, key, value = (part.view(2, 40, 4, 18).transpose(1, 2) for part in together.split(72, dim=-1))
    assert close(attention(query, key, value), exactly(query, key, value))
    for queries in (1, 2):
        few = query[:, :, -queries:]
        assert close(attention(few, key, value), exactly(few, key, value))
    one = key[:1, :1].expand(2, 4, 40, 18)
    assert close(attention(query, one, value), exactly(query, one, value))


def test_a_mask_may_be_strided(isa: str) -> None:
    query, key, value = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    seen = (torch.rand(7, 5) < 0.6).t()
    seen[:, 0] = True
    assert close(attention(query, key, value, seen), exactly(query, key, value, seen))
    added = torch.randn(1, 2, 5, 14)[..., ::2]
    assert close(attention(query, key, value, added), exactly(query, key, value, added))


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_query_that_sees_nothing_gives_0_as_in_pytorch(isa: str, queries: int, kind: torch.dtype) -> None:
    query, key, value = torch.randn(2, 2, queries, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.ones(2, 1, queries, 9, dtype=torch.bool)
    mask[1, 0, -1] = False
    if kind is torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -INF)
    found = attention(query, key, value, mask)
    assert torch.equal(found[1, :, -1], torch.zeros(2, 8))
    torch.testing.assert_close(
        found, nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3), atol=1e-5, rtol=1e-5
    )


def test_nothing_to_see_or_to_ask(isa: str) -> None:
    query, none = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    assert torch.equal(attention(query, none, none), torch.zeros(1, 2, 5, 8))
    assert attention(none, query, query).shape == (1, 2, 0, 8)


@pytest.mark.parametrize("queries", [1, 6])
def test_huge_scores(isa: str, queries: int) -> None:
    query = torch.randn(1, 2, queries, 16) * 1e4
    key, value = torch.randn(1, 2, 30, 16) * 1e4, torch.randn(1, 2, 30, 16)
    # Of two scores this large the smaller one has no weight left; equal ones share it.
    key[:, :, 7] = key[:, :, 3]
    assert close(attention(query, key, value), exactly(query, key, value))


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_what_is_no_number_comes_through(isa: str, queries: int, bad: float, operand: int) -> None:
    operands = [torch.randn(1, 2, queries, 8), torch.randn(1, 2, 21, 8), torch.randn(1, 2, 21, 8)]
    operands[operand][0, 0, -1, 3] = bad
    found = attention(operands[0], operands[1], operands[2])
    scores = 0.3 * operands[0].double() @ operands[1].double().transpose(-1, -2)
    # As of the formula: what is infinite beside itself is no number, but for keys that then have no weight.
    expected = scores.softmax(-1) @ operands[2].double()
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[0, 1].isfinite().all()


@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e18])
def test_numbers_that_bfloat16_tiles_do_not_take(isa: str, operand: int, size: float) -> None:
    """One head of two has them: others are computed as ever, beside it."""
    query, key, value = operands = [torch.randn(1, 2, 45, 24) for _ in range(3)]
    operands[operand][:, 1] *= size
    found, expected = attention(query, key, value), exactly(query, key, value)
    assert close(found[:, 0], expected[:, 0])
    assert close(found[:, 1], expected[:, 1])


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_may_be_0_or_negative(isa: str, scale: float) -> None:
    query, key, value = (torch.randn(1, 2, 19, 24) for _ in range(3))
    assert close(attention(query, key, value, scale=scale), exactly(query, key, value, scale=scale))
