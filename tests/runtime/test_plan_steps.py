"""Each kind of step but attention, on every instruction set, against float64."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.runtime import native, native_layers, ops
from prequant.runtime import plan as p

from .native_layers import Layer
from .plan_steps import done, run, ulps, words

F = nn.functional
INF, NAN = torch.inf, torch.nan


# ---- normalize


def normalized(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, centered: bool, epsilon: float = 1e-5, threads: int = 1
) -> Tensor:
    out = torch.full(input.shape, NAN)
    step = words(p.NORMALIZE, input.shape, [input, out, weight, bias], int(centered), epsilon)
    done(step, [input, out, weight, bias], threads)
    return out


def exactly(input: Tensor, weight: Tensor | None, bias: Tensor | None, centered: bool, epsilon: float = 1e-5) -> Tensor:
    x = input.double()
    x = x - x.mean(-1, keepdim=True) if centered else x
    x = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return x * (1 if weight is None else weight.double()) + (0 if bias is None else bias.double())


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 100, 768, 1000])
@pytest.mark.parametrize("centered", [True, False])
def test_normalize(isa: str, columns: int, centered: bool) -> None:
    input = torch.randn(5, columns) * torch.tensor([1e-3, 1.0, 3.0, 1e4, 1e15])[:, None] + 0.5
    weight, bias = torch.randn(columns), torch.randn(columns)
    for scaled, shifted in ((None, None), (weight, None), (weight, bias)):
        expected = exactly(input, scaled, shifted, centered)
        largest = expected.abs().amax(-1, keepdim=True) + 1
        assert (((normalized(input, scaled, shifted, centered) - expected) / largest).abs() < 2e-6).all()


def test_normalize_of_rows_far_from_zero(isa: str) -> None:
    constant = torch.tensor([1e6 + 0.3, -12345.678, 3.4e7, 0.0])[:, None].expand(4, 768).contiguous()
    assert normalized(constant, None, None, True).abs().max() < 1e-4
    far = torch.randn(3, 768) + 1e4
    torch.testing.assert_close(
        normalized(far, None, None, True).double(), exactly(far, None, None, True), atol=1e-5, rtol=0
    )


def test_normalize_of_strided_rows_and_many_threads(isa: str) -> None:
    wide, weight = torch.randn(900, 200), torch.randn(90)
    out = torch.full((900, 100), NAN)
    done(words(p.NORMALIZE, (900, 90), [wide[:, :90], out[:, :90], weight], 1, 1e-5), [wide, out, weight], 4)
    assert out[:, 90:].isnan().all()
    assert (out[:, :90] - exactly(wide[:, :90], weight, None, True)).abs().max() < 1e-5


def test_normalize_does_not_hide_what_is_no_number(isa: str) -> None:
    input = torch.randn(3, 40)
    input[0, 39], input[1, 3] = NAN, INF
    for centered in (True, False):
        out = normalized(input, None, None, centered)
        assert out[0].isnan().all()
        assert out[1, 3].isnan()
        assert out[2].isfinite().all()


# ---- element by element


def extremes() -> Tensor:
    finite = [0.0, 1e-45, 1e-38, 1e-20, 1e-4, 0.1, 0.14999, 0.15, 0.15001, 0.5, 1, 5, 9, 20, 79, 80, 86, 87, 88, 100]
    finite += [1e4, 1e20, 3e38]
    return torch.tensor([*finite, *(-x for x in finite), INF, -INF, NAN])


UNARY: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (torch.relu, 0),
    "negate": (torch.neg, 0),
    "tanh": (torch.tanh, 4),
    "sigmoid": (torch.sigmoid, 4),
    "silu": (F.silu, 5),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
}


def mapped(function: str, a: Tensor, b: Tensor | None = None, number: float = 0.0, threads: int = 1) -> Tensor:
    assert a.dim() == 4
    out = torch.full(a.shape, NAN)
    done(words(p.ELEMENTWISE, a.shape, [a, b, out], p.FUNCTIONS[function], number), [a, b, out], threads)
    return out


@pytest.mark.parametrize("function", UNARY)
def test_functions_of_one(isa: str, function: str) -> None:
    exact, bound = UNARY[function]
    input = torch.cat([extremes(), torch.linspace(-100, 100, 20011), torch.linspace(-1, 1, 20011)])
    found, expected = mapped(function, input[None, None, None])[0, 0, 0], exact(input.double())
    finite = expected.isfinite()
    assert torch.equal(found[~finite].isnan(), expected[~finite].isnan())
    # Where the exponential would be no normal number, it may be 0.
    tiny = 200 * torch.finfo(torch.float32).tiny
    normal = finite & ((expected.abs() > tiny) | (bound == 0))
    assert ulps(found[normal], expected[normal]) <= bound
    assert (found[finite & ~normal].abs() <= tiny).all()


@pytest.mark.parametrize(("function", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu(isa: str, function: str, approximate: str) -> None:
    input = torch.cat([extremes()[:-3], torch.linspace(-12, 12, 20011)])
    found = mapped(function, input[None, None, None])[0, 0, 0]
    expected = F.gelu(input.double(), approximate=approximate)
    assert ((found - expected).abs() <= 5e-7 * expected.abs() + 1e-7).all()
    ends = mapped(function, torch.tensor([INF, NAN]).view(1, 1, 1, 2))[0, 0, 0]
    assert ends[0] == INF
    assert ends[1].isnan()


def same(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.equal(found.nan_to_num(nan=7e7), expected.nan_to_num(nan=7e7)))


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 15, 16, 17, 33])
@pytest.mark.parametrize("function", BINARY)
def test_functions_of_two(isa: str, function: str, count: int) -> None:
    exact = BINARY[function]
    a, b = torch.randn(2, 3, 2, count), torch.randn(2, 3, 2, count)
    b[0, 0, 0, 0], a[1, 0, 0, 0] = 0.0, INF
    wide = torch.randn(2, 3, 2, count, 3)
    others = {
        "same": b,
        "a row": b[:1, :1, :1].expand_as(a),
        "a column": b[..., :1].expand_as(a),
        "every third": wide[..., 1],
        "transposed": torch.randn(count, 2, 3, 2).permute(3, 2, 1, 0),
    }
    for name, other in others.items():
        assert same(mapped(function, a, other), exact(a, other)), name
        assert same(mapped(function, other, a), exact(other, a)), name
    assert same(mapped(function, a, None, 0.3), exact(a, torch.tensor(0.3)))


def test_results_may_be_strided(isa: str) -> None:
    a, out = torch.randn(1, 2, 3, 4), torch.zeros(1, 2, 3, 4, 2)
    places = out[..., 0]
    step = words(p.ELEMENTWISE, (*a.shape[:3], 4), [a, a, None])
    assert run([step], [a, a, None])[0] == 4  # without a result
    contiguous = torch.zeros(3, 1, 2, 4).permute(1, 2, 0, 3)
    done(words(p.ELEMENTWISE, a.shape, [a, a, contiguous]), [a, a, contiguous])
    assert torch.equal(contiguous, a + a)
    done(words(p.COPY, (*a.shape, 4), [a, places]), [a, places])
    assert torch.equal(out[..., 0], a)
    assert not out[..., 1].any()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_share_rows(isa: str, threads: int) -> None:
    a, b = torch.randn(1, 17, 31, 128), torch.randn(128).expand(1, 17, 31, 128)
    assert torch.equal(mapped("multiply", a, b, threads=threads), a * b)


# ---- copy


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.float64])
def test_copy(isa: str, dtype: torch.dtype) -> None:
    source = torch.randint(0, 2, (3, 5, 4, 7)).to(dtype)
    for view in (
        source,
        source.transpose(1, 2),
        source.permute(3, 2, 1, 0),
        source[:, 1:, ::2, 2:5],
        source[:1].expand(4, 5, 4, 7),
    ):
        out = torch.zeros(view.shape, dtype=dtype)
        done(words(p.COPY, (*view.shape, dtype.itemsize), [view, out]), [view, out])
        assert torch.equal(out, view)


# ---- layers


def layer_of(weight: Layer, activation: str = "", input_format: str = "", bias: bool = True) -> native_layers.Layer:
    outliers = weight.outliers
    linear = native_layers.linear(
        format=str(weight.format),
        columns=weight.columns,
        codes=weight.codes,
        scale=weight.scale,
        zero_point=weight.zero_point,
        outlier_values=None if outliers is None else outliers.values,
        outlier_columns=None if outliers is None else outliers.columns,
        outlier_row_offsets=None if outliers is None else outliers.row_offsets,
        outliers_replace=outliers is not None and outliers.replace,
        bias=weight.bias if bias else None,
        input_format=input_format,
        activation=activation,
    )
    return native_layers.together([linear])


@pytest.mark.parametrize("text", ["affine4:row", "affine3:group64:asym", "ternary:row", "binary:row", "bcq2:row"])
@pytest.mark.parametrize("input_format", ["", "affine8:row"])
@pytest.mark.parametrize("tokens", [0, 1, 9, 40])
def test_linear_is_the_op(isa: str, text: str, input_format: str, tokens: int) -> None:
    weight = Layer(text, rows=70, columns=130, outliers="add")
    input, residual = torch.randn(tokens, 130), torch.randn(tokens, 70)
    for added, activation in ((None, ""), (residual, "gelu")):
        layer = layer_of(weight, activation, input_format)
        expected = weight(input, input_format, activation=activation, residual=added)
        for threads in (1, 3):
            out = torch.full((tokens, 70), NAN)
            done(words(p.LINEAR, (tokens,), [input, added, out], layer=layer.address), [input, added, out], threads)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("outliers", ["", "add", "replace"])
@pytest.mark.parametrize("text", ["affine4:row", "affine2:group64", "ternary:row:base3", "bcq3:group64"])
def test_embedding_is_the_op(isa: str, text: str, outliers: str) -> None:
    weight = Layer(text, rows=33, columns=70, outliers=outliers)
    sparse: tuple[Any, ...] = (None, None, None, False) if weight.outliers is None else tuple(weight.outliers)
    layer = native_layers.embedding(
        format=str(weight.format),
        columns=70,
        codes=weight.codes,
        scale=weight.scale,
        zero_point=weight.zero_point,
        outlier_values=sparse[0],
        outlier_columns=sparse[1],
        outlier_row_offsets=sparse[2],
        outliers_replace=sparse[3],
    )
    for count in (0, 1, 500):
        ids = torch.randint(0, 33, (count,))
        expected = ops.packed_embedding(
            *(ids, weight.codes, weight.scale, weight.zero_point, *sparse),
            **{"format": str(weight.format), "columns": 70, "dtype": torch.float32, "padding_idx": -1},
        )
        for threads in (1, 4):
            out = torch.full((count, 70), NAN)
            done(words(p.EMBEDDING, (count,), [ids, out], layer=layer.address), [ids, out], threads)
            assert torch.equal(out, expected)


FIRST_BUFFER = p.HEAD_WORDS + p.SIZES
"""The word of a step that says where its first operand is."""

KEEP = words(p.COPY, (0, 0, 0, 0, 4), [torch.zeros(0), torch.zeros(0)])


@pytest.mark.parametrize("bad", [-1, 33, 2**40, -(2**62)])
def test_an_id_without_a_row_fails_and_stops_what_follows(isa: str, bad: int) -> None:
    weight = Layer("affine4:row", rows=33, columns=70)
    layer = native_layers.embedding(
        format=str(weight.format), columns=70, codes=weight.codes, scale=weight.scale, outliers_replace=False
    )
    ids, out, after = torch.randint(0, 33, (200,)), torch.zeros(200, 70), torch.zeros(200, 70)
    ids[137] = bad
    step = words(p.EMBEDDING, (200,), [ids, out], layer=layer.address)
    # As memory of a plan is used again: the error has to be told from the ids that were there.
    reuse = words(p.COPY, (1, 1, 1, 200, 8), [after[:, 0].view(1, 1, 1, 200), ids.view(1, 1, 1, 200)])
    reuse[FIRST_BUFFER], reuse[FIRST_BUFFER + p.OPERAND_WORDS] = 2, 0
    for threads in (1, 3):
        assert run([KEEP, step, reuse], [ids, out, after], threads) == (native.BAD_ROW, 1)
        assert ids[137] == bad


# ---- all


def test_steps_of_nothing(isa: str) -> None:
    empty = torch.zeros(0, 3, 4, 5)
    done(words(p.ELEMENTWISE, empty.shape, [empty, empty, empty]), [empty, empty, empty], 2)
    done(words(p.COPY, (2, 0, 0, 3, 4), [empty, empty]), [empty, empty], 2)
    done(words(p.NORMALIZE, (0, 8), [empty, empty]), [empty, empty])


GOOD = torch.zeros(1, 1, 1, 4)
BAD = {
    "no such kind": words(8, (1, 1, 1, 4), [GOOD, GOOD, GOOD]),
    "a negative kind": words(-1, (1, 1, 1, 4), [GOOD, GOOD, GOOD]),
    "no such function": words(p.ELEMENTWISE, (1, 1, 1, 4), [GOOD, GOOD, GOOD], option=11),
    "a negative size": words(p.ELEMENTWISE, (1, 1, 1, -4), [GOOD, GOOD, GOOD]),
    "no input": words(p.ELEMENTWISE, (1, 1, 1, 4), [None, GOOD, GOOD]),
    "no scales": words(p.QUANTIZE, (1, 1, 1, 4), [GOOD, GOOD, None]),
    "no output": words(p.NORMALIZE, (1, 4), [GOOD, None]),
    "elements of 3 bytes": words(p.COPY, (1, 1, 1, 4, 3), [GOOD, GOOD]),
    "a linear without a layer": words(p.LINEAR, (1,), [GOOD, None, GOOD]),
    "an embedding without a weight": words(p.EMBEDDING, (1,), [GOOD, GOOD]),
    "no heads of keys": words(p.ATTENTION, (1, 1, 1, 1, 4, 4, 0), [GOOD, GOOD, GOOD, None, GOOD]),
    "heads that keys don't divide": words(p.ATTENTION, (1, 3, 1, 1, 4, 4, 2), [GOOD, GOOD, GOOD, None, GOOD]),
    "a mask that is not there": words(p.ATTENTION, (1, 1, 1, 1, 4, 4, 1), [GOOD, GOOD, GOOD, None, GOOD], option=1),
    "no such mask": words(p.ATTENTION, (1, 1, 1, 1, 4, 4, 1), [GOOD, GOOD, GOOD, GOOD, GOOD], option=3),
}


@pytest.mark.parametrize("name", BAD)
def test_a_step_that_makes_no_sense_is_refused(isa: str, name: str) -> None:
    good = words(p.ELEMENTWISE, (1, 1, 1, 4), [GOOD, GOOD, GOOD])
    assert run([good, BAD[name]], [GOOD] * 5) == (4, 1)


def test_linears_without_panels_are_refused(isa: str) -> None:
    linears = p.Linears(5)
    step = words(p.LINEAR, (1,), [GOOD, None, GOOD], layer=ctypes.addressof(linears))
    assert run([step], [GOOD] * 3) == (4, 0)


def test_what_a_caller_owes_is_checked() -> None:
    step = words(p.ELEMENTWISE, (1, 1, 1, 4), [GOOD, GOOD, GOOD])
    assert run([step], [GOOD] * 3, isa="mmx")[0] == 3
    assert run([step], [GOOD] * 3, threads=0)[0] == 4
