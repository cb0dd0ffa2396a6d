import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prequant.passes import BinaryCode, Freeze, PassError, Pipeline, Program, QuantizeWeights, readable, weight_sites
from prequant.passes.lower import Lower
from prequant.passes.split_outliers import SplitOutliers
from prequant.runtime import Granularity, PrequantError
from prequant.trace import trace

from . import truth
from .support import (
    assert_golden,
    embedding_inputs,
    mlp_inputs,
    tiny_embedding,
    tiny_embedding_program,
    tiny_mlp,
    tiny_mlp_program,
)
from .test_quantize_weights import changed, kept

SPLIT = [{"mode": "delta"}, {"mode": "replace"}]


def extremes(weight: Tensor, count: int) -> set[tuple[int, int]]:
    """Positions of the ``count`` weights furthest from the mean in standard deviations."""
    exact = weight.detach().double().numpy()
    standardised = np.abs(exact - exact.mean()) / exact.std()
    order = np.argsort(-standardised, axis=None)[:count]
    return {(int(row), int(column)) for row, column in zip(*np.unravel_index(order, exact.shape), strict=True)}


def one_weight(weight: Tensor, **options: Any) -> Program:
    """Split the outliers of a linear that has this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    layer.weight.data = weight.clone()
    program = trace(layer.eval(), {"input": torch.zeros(2, weight.shape[1], dtype=weight.dtype)})
    return SplitOutliers(**options)(program)


def test_golden() -> None:
    assert_golden(
        SplitOutliers(ratio=0.05, dtype="float16", exclude=("second",))(tiny_mlp_program()),
        """
        program(x: f32[batch, length, 8])
          %add_outliers_default = add_outliers(first.weight.dense [16×8 f32], first.weight.outliers.values [6 f16], first.weight.outliers.columns [6 u16], first.weight.outliers.row_offsets [17 i32], replace=False)
          %linear = linear(%x, %add_outliers_default, first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %linear_1 = linear(%dropout, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
        """,  # noqa: E501
    )


def test_golden_with_quantized_weights() -> None:
    steps = [SplitOutliers(ratio=0.03, mode="replace"), QuantizeWeights(bits=3)]
    assert_golden(
        Pipeline(steps)(tiny_embedding_program()),
        """
        program(input_ids: i64[batch, length])
          tokens.weight is tied to head.weight
          %dequantize_default = dequantize<affine3:row>(tokens.weight.codes [12×3 u8], tokens.weight.scale [12×1 f32], columns=8, dtype=f32)
          %add_outliers_default = add_outliers(%dequantize_default, tokens.weight.outliers.values [3 f32], tokens.weight.outliers.columns [3 u16], tokens.weight.outliers.row_offsets [13 i32], replace=True)
          %embedding = embedding(%add_outliers_default, %input_ids)
          %dequantize_default_1 = dequantize<affine3:row>(mix.weight.codes [8×3 u8], mix.weight.scale [8×1 f32], columns=8, dtype=f32)
          %add_outliers_default_1 = add_outliers(%dequantize_default_1, mix.weight.outliers.values [2 f32], mix.weight.outliers.columns [2 u16], mix.weight.outliers.row_offsets [9 i32], replace=True)
          %linear = linear(%embedding, %add_outliers_default_1, mix.bias [8 f32])
          %tanh = tanh(%linear)
          %layer_norm = layer_norm(%tanh, [8], norm.weight [8 f32], norm.bias [8 f32], 1e-05, False)
          %linear_1 = linear(%layer_norm, %add_outliers_default)
          return {logits: %linear_1}
        """,  # noqa: E501
    )


# ---- which weights


@pytest.mark.parametrize("ratio", [0.004, 0.01, 0.035, 0.5, 0.999])
def test_a_ratio_takes_the_furthest_from_the_mean(ratio: float) -> None:
    weight = torch.randn(20, 31) + 0.3
    program = one_weight(weight, ratio=ratio)
    assert set(truth.outliers_of(program, "weight")) == extremes(weight, round(ratio * 620))
    (change,) = program.reports[-1].changes
    assert change.figures == {"outliers": round(ratio * 620), "share": round(ratio * 620) / 620}
    assert program.reports[-1].totals == {"outliers": round(ratio * 620), "weights": 620}


@pytest.mark.parametrize("threshold", [1.0, 2.5])
def test_a_threshold_takes_what_is_beyond_it(threshold: float) -> None:
    weight = torch.randn(20, 31) * 0.1 - 2
    exact = weight.double().numpy()
    beyond = np.argwhere(np.abs(exact - exact.mean()) > threshold * exact.std())
    found = truth.outliers_of(one_weight(weight, threshold=threshold), "weight")
    assert set(found) == {(int(row), int(column)) for row, column in beyond} and found


def test_a_random_choice_is_of_any_size_and_the_same_for_a_seed() -> None:
    weight = torch.randn(40, 50)

    def positions(**options: Any) -> Tensor:
        (site,) = weight_sites(one_weight(weight, ratio=0.1, choice="random", **options))
        parts = (site.tensors[f"outliers.{part}"] for part in ("columns", "row_offsets"))
        columns, offsets = map(site.program.tensor, parts)
        rows = torch.repeat_interleave(torch.arange(40), offsets.diff())
        return rows * 50 + columns.to(torch.int64)

    first = positions()
    assert first.numel() == 200 and bool((first.diff() > 0).all())
    assert torch.equal(first, positions(seed=0)) and not torch.equal(first, positions(seed=1))
    drawn = weight.flatten()[first]
    assert abs(float(drawn.std()) - 1) < 0.15  # extremes deviate by more than 1.6


def test_each_matrix_has_its_own_statistics() -> None:
    model = tiny_mlp()
    model.second.weight.data *= 1000
    program = SplitOutliers(ratio=0.1)(tiny_mlp_program(model))
    assert set(truth.outliers_of(program, "first.weight")) == extremes(model.first.weight, 13)
    assert set(truth.outliers_of(program, "second.weight")) == extremes(model.second.weight, 6)
    assert program.reports[-1].totals == {"outliers": 19, "weights": 192}


def test_of_equals_the_first_are_taken() -> None:
    weight = torch.ones(4, 5)
    weight[:, ::2] = -1  # a mean of -0.2: the ones are further from it, all equally
    assert set(truth.outliers_of(one_weight(weight, ratio=0.2), "weight")) == {(0, 1), (0, 3), (1, 1), (1, 3)}


def test_positions_by_hand() -> None:
    weight = torch.zeros(4, 6)
    weight[2, 5], weight[0, 3], weight[2, 0] = 7.0, -5.0, 6.0
    program = one_weight(weight, ratio=3 / 24, mode="replace")
    assert program.tensor("weight.outliers.values").tolist() == [-5, 6, 7]
    assert program.tensor("weight.outliers.columns").tolist() == [3, 0, 5]
    assert program.tensor("weight.outliers.row_offsets").tolist() == [0, 1, 1, 3, 3]


@pytest.mark.parametrize(("columns", "dtype"), [(65_536, torch.uint16), (65_537, torch.int32)])
def test_columns_take_two_bytes_where_they_can(columns: int, dtype: torch.dtype) -> None:
    weight = torch.zeros(2, columns)
    weight[0, 1], weight[1, -1] = 1.0, -1.0
    program = one_weight(weight, threshold=3.0)
    assert program.tensor("weight.outliers.columns").dtype is dtype
    assert set(truth.outliers_of(program, "weight")) == {(0, 1), (1, columns - 1)}


# ---- what it leaves alone


@pytest.mark.parametrize(
    ("weight", "options", "why"),
    [
        (torch.randn(4, 5), {"ratio": 0.02}, "no outliers"),
        (torch.randn(4, 5), {"threshold": 9.0}, "no outliers"),
        (torch.full((30, 30), 0.1), {"threshold": 0.5}, "no outliers"),
        (torch.tensor([[1.0, float("nan")]]), {"ratio": 0.5}, "not a matrix of finite numbers"),
    ],
)
def test_reasons(weight: Tensor, options: dict[str, Any], why: str) -> None:
    program = one_weight(weight, **options)
    assert kept(program) == [("weight", why)] and not changed(program)
    assert sorted(program.state_dict()) == ["weight"]


def test_codes_and_latent_weights_have_none() -> None:
    steps = [QuantizeWeights(include=("first",)), QuantizeWeights(latent=True, bits=2), SplitOutliers(ratio=0.1)]
    assert kept(Pipeline(steps)(tiny_mlp_program())) == [
        ("first.weight", "already affine4:row: outliers are chosen on the float weight"),
        ("second.weight", "already affine2:row: outliers are chosen on the float weight"),
    ]


def test_twice_changes_nothing() -> None:
    once = SplitOutliers(ratio=0.1)(tiny_mlp_program())
    twice = SplitOutliers(ratio=0.2, mode="replace")(once)
    assert {why for _, why in kept(twice)} == {"its outliers are split already"}
    assert readable(twice) == readable(once)
    quantized = Pipeline([QuantizeWeights(), SplitOutliers(ratio=0.2)])(once)
    assert {why for _, why in kept(quantized)} == {"already affine4:row: outliers are chosen on the float weight"}


def test_scope() -> None:
    program = SplitOutliers(ratio=0.1, include=("head",))(tiny_embedding_program())
    assert changed(program) == ["tokens.weight"] and kept(program) == [("mix.weight", "out of scope")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either ratio or threshold, not ratio=None, threshold=None"),
        ({"ratio": 0.1, "threshold": 3.0}, "either ratio or threshold"),
        ({"ratio": 0.0}, "ratio=0.0 is not between 0 and 1"),
        ({"ratio": 1}, "ratio=1.0"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": "many"}, "'ratio'.*'many'"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": float("inf")}, "threshold=inf"),
        ({"threshold": 3.0, "choice": "random"}, "choice=random takes a ratio, not a threshold"),
        ({"ratio": 0.1, "mode": "add"}, "'mode'.*'add' is not one of 'delta', 'replace'"),
        ({"ratio": 0.1, "dtype": "int8"}, "'dtype'.*'int8' is not one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        SplitOutliers(**options)


def test_text_form() -> None:
    pass_ = SplitOutliers(ratio=0.005, mode="replace", dtype="float16", include=("type:Linear",))
    text = "split-outliers{ratio=0.005,mode=replace,dtype=float16,include=[type:Linear]}"
    assert str(pass_) == text and Pipeline.parse(text).passes == (pass_,)


# ---- numbers


@pytest.mark.parametrize("options", SPLIT)
def test_nothing_changes_before_a_quantizer_comes(options: dict[str, Any]) -> None:
    program = tiny_embedding_program()
    split = SplitOutliers(ratio=0.1, **options)(program)
    assert torch.equal(split(**embedding_inputs())["logits"], program(**embedding_inputs())["logits"])
    assert split.tensor("tokens.weight.dense").data_ptr() == program.tensor("tokens.weight").data_ptr()
    assert all(torch.equal(site.value(), program.tensor(site.name)) for site in weight_sites(split))


@pytest.mark.parametrize(
    "quantize", [QuantizeWeights(bits=2), QuantizeWeights(bits=2, latent=True), BinaryCode(bits=1)]
)
@pytest.mark.parametrize("options", SPLIT)
def test_outliers_are_exact_whatever_lies_under_them(options: dict[str, Any], quantize: Any) -> None:
    program = Pipeline([SplitOutliers(ratio=0.1, **options), quantize])(tiny_mlp_program())
    for site, count in zip(weight_sites(program), (13, 6), strict=True):
        exact, value = tiny_mlp().get_parameter(site.name).detach(), site.value()
        positions = truth.outliers_of(program, site.name)
        assert len(positions) == count
        rows, columns = torch.tensor(list(positions)).unbind(1)
        if options["mode"] == "replace":
            assert torch.equal(value[rows, columns], exact[rows, columns])
        assert torch.allclose(value[rows, columns], exact[rows, columns], rtol=0, atol=1e-7)
        value[rows, columns] = exact[rows, columns]
        assert not torch.allclose(value, exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("options", SPLIT)
def test_the_program_computes_with_codes_and_outliers(options: dict[str, Any]) -> None:
    steps = [SplitOutliers(ratio=0.1, **options), QuantizeWeights(bits=3)]
    program = Pipeline(steps)(tiny_embedding_program())
    replace = options["mode"] == "replace"
    names = ("tokens.weight", "mix.weight")
    weights = {name: truth.weight(program, name, "affine3:row", 8, replace) for name in names}
    expected = truth.with_weights(tiny_embedding(), weights)(**embedding_inputs())["logits"]
    assert torch.allclose(program(**embedding_inputs())["logits"].double(), expected, atol=1e-5)


def test_outliers_do_not_widen_the_range() -> None:
    weight = torch.linspace(-1, 1, 64).reshape(8, 8).clone()
    weight[1, 2], weight[5, 0] = 100.0, -40.0
    split = one_weight(weight, ratio=2 / 64)
    (site,) = weight_sites(split)
    assert torch.equal(site.bulk, weight.clamp(-1, 1))
    quantized = QuantizeWeights(strategy="minmax", granularity=Granularity.TENSOR)(split)
    assert quantized.tensor("weight.scale").item() == pytest.approx(1 / 7)
    (site,) = weight_sites(quantized)
    assert site.value()[1, 2].item() == pytest.approx(100, abs=1e-5)
    latent = QuantizeWeights(latent=True, bits=2)(split)
    assert torch.equal(latent.tensor("weight.latent"), weight.clamp(-1, 1))


def test_where_everything_is_an_outlier() -> None:
    program = QuantizeWeights(bits=2)(one_weight(torch.randn(2, 2), ratio=0.99))
    assert program.reports[-1].changes[0].figures["sqnr"] > 100


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 2**-11), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("options", SPLIT)
def test_values_in_half_precision(options: dict[str, Any], dtype: Any, digits: float) -> None:
    program = Pipeline([SplitOutliers(ratio=0.1, dtype=dtype, **options), QuantizeWeights(bits=2)])(tiny_mlp_program())
    values = program.tensor("first.weight.outliers.values")
    assert values.dtype is getattr(torch, dtype) and values.requires_grad
    (site, _) = weight_sites(program)
    rows, columns = torch.tensor(list(truth.outliers_of(program, site.name))).unbind(1)
    error = (site.value() - tiny_mlp().first.weight)[rows, columns].abs()
    assert bool((error <= digits * values.float().abs() + 1e-7).all()) and float(error.detach().max()) > 1e-6


def test_values_that_do_not_fit_their_dtype() -> None:
    model = tiny_mlp()
    model.second.weight.data[2, 7] = 1e5
    program = tiny_mlp_program(model)
    with pytest.raises(PassError, match=r"an outlier of 1e\+05 does not fit into float16 \(at second\.weight\)"):
        SplitOutliers(ratio=0.02, mode="replace", dtype="float16")(program)
    # A delta is small until a quantizer comes, which sees the outlier clipped.
    split = SplitOutliers(ratio=0.02, dtype="float16")(program)
    with pytest.raises(PassError, match=r"second\.weight: its outliers are too large for float16"):
        QuantizeWeights()(split)
    assert Pipeline([SplitOutliers(ratio=0.02, dtype="bfloat16"), QuantizeWeights()])(program).reports


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", SPLIT)
def test_models_in_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_mlp().to(dtype)
    program = trace(copy.deepcopy(model), {"x": mlp_inputs()["x"].to(dtype)})
    split = SplitOutliers(ratio=0.1, **options)(program)
    assert split.tensor("first.weight.outliers.values").dtype is torch.float32
    inputs = {"x": mlp_inputs(2, 9)["x"].to(dtype)}
    assert torch.equal(split(**inputs)["logits"], model(**inputs)["logits"])
    (site, _) = weight_sites(QuantizeWeights(bits=2)(split))
    assert site.value().dtype is dtype
    positions = truth.outliers_of(site.program, site.name)
    rows, columns = torch.tensor(list(positions)).unbind(1)
    expected = model.first.weight[rows, columns].float()
    assert torch.allclose(site.value()[rows, columns].float(), expected, rtol=float(torch.finfo(dtype).eps))


def test_trained_values_survive_freezing() -> None:
    program = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights(bits=2, latent=True)])(tiny_mlp_program())
    values = program.tensor("first.weight.outliers.values").detach() + torch.randn(13)
    program.set_tensor("first.weight.outliers.values", values)
    frozen = Freeze()(program)
    assert torch.allclose(frozen.tensor("first.weight.outliers.values"), values, atol=1e-6)
    assert torch.allclose(frozen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"], atol=1e-6)


def test_a_tied_matrix_has_one_set() -> None:
    program = Pipeline([SplitOutliers(ratio=0.1), QuantizeWeights(), Lower(strict=True)])(tiny_embedding_program())
    names = [name for name, _ in program.named_parameters() if name.endswith("outliers.values")]
    assert sorted(names) == ["mix.weight.outliers.values", "tokens.weight.outliers.values"]


# ---- memory


@pytest.mark.parametrize(
    ("pass_", "limit"), [(SplitOutliers(ratio=0.005), 2), (QuantizeWeights(strategy="minmax"), 3.5)], ids=str
)
def test_memory_is_a_few_copies_of_one_weight(pass_: Any, limit: float) -> None:
    program = trace(nn.Embedding(8000, 1000).eval(), {"input": torch.zeros(2, 3, dtype=torch.int64)})
    if isinstance(pass_, QuantizeWeights):
        program = SplitOutliers(ratio=0.005)(program)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        pass_(program)
    held = peak = 0
    assert profile.profiler is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 0.5 < peak / (8000 * 1000 * 4) < limit
