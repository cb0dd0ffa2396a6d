"""How scales are chosen: each strategy against what it promises, found independently."""

import numpy as np
import pytest
import torch
from torch import Tensor

from prequant.runtime import (
    FormatError,
    Granularity,
    PrequantError,
    QuantizedWeight,
    Quantizer,
    WeightFormat,
    ops,
    register_strategy,
    strategy_names,
)
from prequant.runtime import strategies as module
from prequant.runtime.strategies import strategy

NAMES = ["hqq", "lsq", "minmax", "mse", "percentile", "sigma"]
FORMATS = [f"affine{bits}:{rest}" for bits in (2, 3, 4, 8) for rest in ("row", "row:asym")]
FORMATS += ["affine4:tensor", "affine4:group32", "affine3:tensor:asym", "affine4:group32:asym"]


def weights(kind: str) -> Tensor:
    rows, columns = 6, 200
    if kind == "gauss":
        return torch.randn(rows, columns) * 0.05
    if kind == "heavy":
        return torch.distributions.StudentT(torch.tensor(3.0)).sample((rows, columns)) * 0.05
    if kind == "skewed":
        return torch.randn(rows, columns).exp() * 0.05
    if kind == "shifted":
        return torch.randn(rows, columns) * 0.05 + 0.075
    one_sided = torch.randn(rows, columns) * 0.05
    one_sided[:, 7] = 1.5
    return one_sided


def values(quantized: QuantizedWeight, format: WeightFormat, columns: int) -> Tensor:
    return ops.dequantize(*quantized, format=str(format), columns=columns)


def error(weight: Tensor, text: str, name: str) -> float:
    format = WeightFormat.parse(text)
    return float((values(Quantizer(format, name)(weight), format, weight.shape[1]) - weight).square().mean())


def test_the_strategies_that_exist() -> None:
    assert list(strategy_names()) == NAMES


# ---- mse -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gauss", "heavy", "skewed", "one-sided"])
@pytest.mark.parametrize("text", FORMATS)
def test_mse_has_the_least_error(text: str, kind: str) -> None:
    weight = weights(kind)
    # With a real-valued zero point, hqq has more freedom than the other strategies.
    others = [name for name in NAMES if name != "mse" and not (name == "hqq" and text.endswith("asym"))]
    least = min(error(weight, text, name) for name in others)
    assert error(weight, text, "mse") <= least * 1.001


@pytest.mark.parametrize("kind", ["gauss", "heavy", "skewed", "one-sided"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mse_is_close_to_a_scan_of_all_scales(bits: int, kind: str) -> None:
    weight = weights(kind).double().numpy()
    largest = 2 ** (bits - 1) - 1
    extent = np.abs(weight).max(1)
    best = np.full(len(weight), np.inf)
    for factor in np.linspace(0.01, 1.4, 2000):
        scale = (extent * factor / largest)[:, None]
        levels = np.clip(np.rint(weight / scale), -largest - 1, largest)
        best = np.minimum(best, ((weight - levels * scale) ** 2).sum(1))
    format = WeightFormat.affine(bits)
    found = values(Quantizer(format, "mse")(torch.from_numpy(weight).float()), format, weight.shape[1]).double().numpy()
    errors = ((found - weight) ** 2).sum(1)
    # With many levels and few weights the error is jagged: a dense scan finds the odd lucky scale.
    assert (errors <= best * (1.1 if bits == 8 else 1.03)).all()
    assert errors.sum() <= best.sum() * (1.05 if bits == 8 else 1.01)


@pytest.mark.parametrize("kind", ["gauss", "skewed", "one-sided", "shifted"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_mse_is_close_to_a_scan_of_all_ranges(bits: int, kind: str) -> None:
    weight = weights(kind)[:3].double().numpy()
    levels = 2**bits - 1
    best = np.full(len(weight), np.inf)
    for zero in range(levels + 1):
        for scale in np.geomspace(1e-3, 1.5, 1500):
            codes = np.clip(np.rint(weight / scale + zero), 0, levels)
            best = np.minimum(best, ((weight - (codes - zero) * scale) ** 2).sum(1))
    format = WeightFormat.affine(bits, symmetric=False)
    found = values(Quantizer(format, "mse")(torch.from_numpy(weight).float()), format, weight.shape[1]).double().numpy()
    errors = ((found - weight) ** 2).sum(1)
    assert (errors <= best * 1.1).all()  # the search moves one end at a time, so it may miss a corner
    assert errors.sum() <= best.sum() * 1.05


def test_mse_of_a_large_tensor_is_that_of_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = torch.randn(4, 500), WeightFormat.affine(4, "tensor")
    whole = Quantizer(format, "mse")(weight)
    monkeypatch.setattr(module, "TILE", 300)
    tiled = Quantizer(format, "mse")(weight)
    assert torch.allclose(whole.scale, tiled.scale)


# ---- the others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minmax_covers_the_range(bits: int) -> None:
    weight = weights("heavy")
    scale, zero_point = strategy("minmax")(weight, WeightFormat.affine(bits))
    assert zero_point is None
    expected = np.abs(weight.numpy()).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-6)
    scale, zero_point = strategy("minmax")(weight, WeightFormat.affine(bits, symmetric=False))
    assert zero_point is not None
    low, high = weight.numpy().min(1, keepdims=True), weight.numpy().max(1, keepdims=True)
    np.testing.assert_allclose(scale.numpy(), (high - low) / (2**bits - 1), rtol=1e-6)
    assert np.array_equal(zero_point.numpy(), np.rint(-low / scale.numpy()))


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_representable_when_all_weights_have_one_sign(sign: int) -> None:
    weight, format = sign * (torch.rand(3, 50) + 5), WeightFormat.affine(4, symmetric=False)
    for name in NAMES[1:]:
        quantized = Quantizer(format, name)(weight)
        assert quantized.zero_point is not None
        zero = ops.fake_quantize(torch.zeros(3, 1), quantized.scale, quantized.zero_point, format=str(format))
        assert zero.tolist() == [[0.0]] * 3


@pytest.mark.parametrize("percent", [60.0, 90.0, 99.0, 100.0])
def test_percentile_leaves_out_that_share(percent: float) -> None:
    weight = torch.randn(5, 1000)
    scale, _ = strategy(f"percentile:{percent}")(weight, WeightFormat.affine(4))
    covered = (weight.abs() <= scale * 7 * (1 + 1e-6)).float().mean(1)
    assert torch.allclose(covered, torch.full((5,), percent / 100), atol=1e-3)
    scale, _ = strategy(f"percentile:{percent}")(weight, WeightFormat.affine(8, symmetric=False))
    low, high = np.percentile(weight.numpy(), [100 - percent, percent], axis=1)
    np.testing.assert_allclose(scale.numpy()[:, 0], (high - low) / 255, rtol=0.05)


def test_percentile_defaults_to_99_9() -> None:
    weight, format = torch.randn(3, 5000), WeightFormat.affine(4)
    assert torch.equal(strategy("percentile")(weight, format)[0], strategy("percentile:99.9")(weight, format)[0])


@pytest.mark.parametrize("multiple", [1.0, 2.5, 3.0, 6.0])
def test_sigma_clips_at_a_multiple_of_the_standard_deviation(multiple: float) -> None:
    weight = weights("gauss")
    scale, _ = strategy(f"sigma:{multiple:g}")(weight, WeightFormat.affine(4))
    np.testing.assert_allclose(scale.numpy()[:, 0], multiple * weight.double().numpy().std(1) / 7, rtol=1e-5)
    if multiple == 3:
        assert torch.equal(strategy("sigma")(weight, WeightFormat.affine(4))[0], scale)


def test_asymmetric_sigma_is_around_the_mean() -> None:
    weight = torch.randn(3, 4000) * 0.1 + 0.2
    scale, zero_point = strategy("sigma")(weight, WeightFormat.affine(8, symmetric=False))
    assert zero_point is not None
    np.testing.assert_allclose(scale.numpy(), 0.6 / 255, rtol=0.05)
    np.testing.assert_allclose((-zero_point * scale).numpy(), -0.1, atol=0.02)


def test_sigma_reaches_weights_that_are_far_from_zero() -> None:
    weight = torch.randn(3, 400) * 0.01 + 0.5
    assert error(weight, "affine4:row", "sigma") < 0.04**2  # half a step; clipped at 3 sigma it would be 0.47 ** 2


def test_lsq_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 4.0, -1.0], [-3.0, -1.0, 5.0, 3.0]])
    scale, zero_point = strategy("lsq")(weight, WeightFormat.affine(2))
    assert zero_point is None
    np.testing.assert_allclose(scale.numpy(), [[2 * 2.0 / 1], [2 * 3.0 / 1]], rtol=1e-6)  # the largest level is 1
    scale, zero_point = strategy("lsq")(weight, WeightFormat.affine(4, symmetric=False))
    assert zero_point is not None
    # The rows minus their minima: 3, 0, 6, 1 and 0, 2, 8, 6, so 2.5 and 4 on average.
    np.testing.assert_allclose(scale.numpy(), [[4 * 2.5 / 15**0.5], [4 * 4 / 15**0.5]], rtol=1e-6)
    assert zero_point.tolist() == [[1.0], [1.0]]  # 2 / 2.58 and 3 / 4.13: the first level is the nearest to the minimum


@pytest.mark.parametrize("kind", ["gauss", "heavy", "skewed", "shifted"])
@pytest.mark.parametrize("text", FORMATS)
def test_lsq_starts_at_the_published_step_of_each_scale(text: str, kind: str) -> None:
    weight, format = weights(kind), WeightFormat.parse(text)
    columns = weight.shape[1]
    size = {"tensor": weight.numel(), "row": columns, "group": format.group_size}[format.granularity.value]
    parts = weight.double().numpy().reshape(1, -1) if size == weight.numel() else weight.double().numpy()
    groups = [parts[:, at : at + size] for at in range(0, parts.shape[1], size)]
    lowest = [np.minimum(part.min(1), 0) for part in groups]
    if format.symmetric:
        steps = [2 * np.abs(part).mean(1) / np.sqrt(2 ** (format.bits - 1) - 1) for part in groups]
    else:
        pairs = zip(groups, lowest, strict=True)
        steps = [4 * (part - low[:, None]).mean(1) / np.sqrt(2**format.bits - 1) for part, low in pairs]
    scale, zero_point = Quantizer(format, "lsq").scales(weight)
    np.testing.assert_allclose(scale.numpy(), np.stack(steps, 1), rtol=1e-5)
    if zero_point is not None:
        np.testing.assert_array_equal(zero_point.numpy(), np.rint(-np.stack(lowest, 1) / scale.double().numpy()))


def test_lsq_of_weights_that_lie_far_below_zero_reaches_zero() -> None:
    weight = torch.linspace(-5.1, -5.0, 50)[None]
    scale, zero_point = strategy("lsq")(weight, WeightFormat.affine(4, symmetric=False))
    np.testing.assert_allclose(scale.numpy(), [[5.1 / 15]], rtol=1e-6)  # by the formula 0.05, with 0 far beyond
    assert zero_point is not None and zero_point.tolist() == [[15.0]]


@pytest.mark.parametrize("kind", ["gauss", "heavy", "skewed", "one-sided"])
@pytest.mark.parametrize("text", FORMATS)
def test_hqq_lowers_the_lp_norm_of_minmax(text: str, kind: str) -> None:
    weight, format = weights(kind), WeightFormat.parse(text)
    norms = {}
    for name in ("hqq", "hqq:0.5", "minmax"):
        power = 0.5 if name.endswith("5") else 0.7
        difference = values(Quantizer(format, name)(weight), format, weight.shape[1]) - weight
        norms[name] = float(difference.abs().pow(power).mean())
        norms[f"minmax {power}"] = float(
            (values(Quantizer(format, "minmax")(weight), format, weight.shape[1]) - weight).abs().pow(power).mean()
        )
    assert norms["hqq"] <= norms["minmax 0.7"] * (1 + 1e-5)
    assert norms["hqq:0.5"] <= norms["minmax 0.5"] * (1 + 1e-5)
    if kind == "gauss":
        assert norms["hqq"] < norms["minmax 0.7"]


def test_hqq_moves_the_zero_point_and_not_the_scale_of_asymmetric_formats() -> None:
    weight, format = weights("skewed"), WeightFormat.affine(3, symmetric=False)
    hqq, minmax = Quantizer(format, "hqq")(weight), Quantizer(format, "minmax")(weight)
    assert torch.equal(hqq.scale, minmax.scale)
    assert hqq.zero_point is not None and minmax.zero_point is not None
    assert bool((hqq.zero_point != minmax.zero_point).all())


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gauss", "heavy", "skewed", "one-sided"])
@pytest.mark.parametrize("text", [text for text in FORMATS if text.endswith("asym")])
@pytest.mark.parametrize("name", NAMES)
def test_zero_points_are_codes(name: str, text: str, kind: str) -> None:
    format = WeightFormat.parse(text)
    zero_point = Quantizer(format, name)(weights(kind)).zero_point
    assert zero_point is not None
    assert zero_point.shape == format.scale_shape(6, 200)
    if name != "hqq":
        assert torch.equal(zero_point, zero_point.round())
        assert float(zero_point.min()) >= 0 and float(zero_point.max()) < format.levels


@pytest.mark.parametrize("text", ["ternary:row", "ternary:group32", "ternary:tensor", "binary:row"])
def test_rows_of_zeros_without_a_strategy(text: str) -> None:
    weight, format = torch.zeros(2, 40), WeightFormat.parse(text)
    quantized = Quantizer(format)(weight)
    assert quantized.scale.tolist() == torch.zeros(format.scale_shape(2, 40)).tolist()
    assert values(quantized, format, 40).abs().max() == 0


def test_ternary_by_hand() -> None:
    """Ternary weight networks: 0 up to 0.7 of the mean magnitude, the mean of what is larger above."""
    weight = torch.tensor([[0.1, -0.2, 1.0, -2.0, 0.2, 0.1]])  # mean magnitude 0.6, threshold 0.42
    quantized = Quantizer(WeightFormat.ternary())(weight)
    assert quantized.zero_point is None
    assert values(quantized, WeightFormat.ternary(), 6).tolist() == [[0.0, 0.0, 1.5, -1.5, 0.0, 0.0]]


def test_binary_by_hand() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.0, -0.5]])
    assert torch.allclose(
        values(Quantizer(WeightFormat.binary())(weight), WeightFormat.binary(), 4),
        0.2 * torch.tensor([[1.0, -1, 1, -1]]),
    )


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_and_constants(name: str, text: str) -> None:
    weight = torch.zeros(4, 40)
    weight[1], weight[2] = 0.37, -2.5
    format = WeightFormat.parse(text)
    quantized = Quantizer(format, name)(weight)
    result = values(quantized, format, 40)
    assert bool(torch.isfinite(result).all()) and bool((quantized.scale > 0).all())
    assert result[0].abs().max() == 0 and result[3].abs().max() == 0
    if format.granularity is not Granularity.TENSOR and name != "lsq":  # whose step is no part of a constant
        tolerance = 0.2 if name == "sigma" else 0.05
        assert torch.allclose(result[1:3], weight[1:3], rtol=tolerance)


@pytest.mark.parametrize(
    "text", ["affine4:row", "affine4:row:asym", "affine4:group32", "affine4:tensor", "ternary:row", "binary:row"]
)
@pytest.mark.parametrize("name", NAMES)
def test_results_scale_with_the_weights(name: str, text: str) -> None:
    """However large or small they are, as long as a scale is a normal number: nothing overflows, nothing vanishes."""
    weight, format = weights("heavy"), WeightFormat.parse(text)
    expected = Quantizer(format, name)(weight)
    for exponent in (-118, -60, 60, 122):
        result = Quantizer(format, name)(weight * 2.0**exponent)
        assert torch.equal(result.codes, expected.codes), exponent
        assert torch.equal(result.scale, expected.scale * 2.0**exponent)


@pytest.mark.parametrize("text", ["affine2:row", "affine8:row", "affine4:row:asym", "ternary:row", "binary:row"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extreme", [2e38, 1e-38, 1e-45])
def test_extreme_weights_give_finite_values(extreme: float, name: str, text: str) -> None:
    weight, format = (
        torch.tensor([[extreme, -extreme, 0.0, extreme / 2], [1.0, -1.0, 0.5, 0.0]]),
        WeightFormat.parse(text),
    )
    quantized = Quantizer(format, name)(weight)
    assert bool(torch.isfinite(quantized.scale).all())
    result = values(quantized, format, 4)
    assert bool(torch.isfinite(result).all())
    assert float(result[0].abs().max()) <= 2 * max(extreme, 1e-37)
    alone = Quantizer(format, name)(weight[1:])
    assert torch.equal(result[1:], values(alone, format, 4))


@pytest.mark.parametrize("text", ["affine4:row", "affine4:group32", "affine4:row:asym"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_chosen_apart(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows don't see each other, however many are handled at once."""
    weight, format = weights("heavy"), WeightFormat.parse(text)
    together = Quantizer(format, name)(weight)
    monkeypatch.setattr("prequant.runtime.quantizer.TILE", 1)
    for row in range(len(weight)):
        alone = Quantizer(format, name)(weight[row : row + 1])
        assert torch.equal(alone.codes, together.codes[row : row + 1])
        assert torch.equal(alone.scale, together.scale[row : row + 1])


@pytest.mark.parametrize(
    "text", ["affine4:row:asym", "affine3:group32", "affine4:tensor:asym", "ternary:group32", "binary:row"]
)
@pytest.mark.parametrize("rows", [1, 5])
def test_rounding_a_few_rows_at_a_time_changes_nothing(text: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, quantizer = torch.randn(rows, 70), Quantizer(WeightFormat.parse(text))
    whole = quantizer(weight)
    monkeypatch.setattr("prequant.runtime.quantizer.ROUNDED_AT_ONCE", 140)
    assert torch.equal(quantizer(weight).codes, whole.codes)


# ---- by name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("minmx", r"strategy 'minmx' is unknown; did you mean 'minmax'\? known are \['hqq', 'lsq'"),
        ("MSE", "strategy 'MSE' is unknown; known are"),
        ("percentiles:99", "did you mean 'percentile'"),
        ("", "strategy '' is unknown"),
        ("minmax:3", "strategy 'minmax' takes no number"),
        ("mse:1", "strategy 'mse' takes no number"),
        ("sigma:", "'' is not a number"),
        ("sigma:three", "'three' is not a number"),
    ],
)
def test_other_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        strategy(text)
    with pytest.raises(PrequantError, match=message):
        Quantizer(WeightFormat.affine(4), text)


@pytest.mark.parametrize(
    "text",
    [
        *("sigma:0", "sigma:-1", "sigma:nan", "sigma:inf", "percentile:50", "percentile:101", "percentile:nan"),
        *("hqq:0", "hqq:1", "hqq:nan"),
    ],
)
def test_numbers_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(PrequantError, match=text.partition(":")[0]):
        Quantizer(WeightFormat.affine(4), text)(torch.randn(2, 8))


def test_a_strategy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_strategies", dict(module._strategies))

    @register_strategy("fixed")
    def fixed(weights: Tensor, format: WeightFormat, step: float = 0.25) -> tuple[Tensor, None]:
        return torch.full((weights.shape[0], 1), step), None

    assert "fixed" in strategy_names()
    weight = torch.tensor([[1.0, -0.75, 0.5, 0.25]])
    assert torch.equal(
        values(Quantizer(WeightFormat.affine(4), "fixed:0.125")(weight), WeightFormat.affine(4), 4), weight
    )
    with pytest.raises(PrequantError, match="'fixed' is already registered"):
        register_strategy("fixed")(fixed)


def test_a_quantizer_refuses_what_it_cannot_code() -> None:
    quantizer = Quantizer(WeightFormat.affine(4))
    for weight, reason in (
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
        (torch.tensor([[1.0, float("-inf")]]), "NaN or infinity"),
        (torch.tensor([[1e300]], dtype=torch.float64), "NaN or infinity"),
        (torch.ones(3), "1 dimensions"),
        (torch.ones(2, 3, 4), "3 dimensions"),
        (torch.ones(2, 3, dtype=torch.int32), "torch.int32"),
        (torch.ones(0, 3), "empty"),
        (torch.ones(3, 0), "empty"),
    ):
        assert reason in quantizer.refuses(weight)
        with pytest.raises(FormatError, match=reason):
            quantizer(weight)
    assert quantizer.refuses(torch.ones(2, 3)) == ""
