import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy as kullback_leibler

from prequant.runtime import FormatError, PrequantError, WeightFormat, calibrator, calibrator_names
from prequant.runtime.calibrators import SEARCH_BINS, Entropy

SYMMETRIC = WeightFormat.parse("affine8:tensor")
ASYMMETRIC = WeightFormat.parse("affine8:tensor:asym")


def gelu_like(count: int = 4000) -> torch.Tensor:
    return torch.nn.functional.gelu(torch.randn(count) * 2)


def observed(text: str, batches: list[torch.Tensor]) -> Any:
    made = calibrator(text)
    for batch in batches:
        made.observe(batch)
    return made


def test_minmax_covers_all_that_was_seen() -> None:
    data = torch.randn(7, 11, 3)
    made = observed("minmax", list(data))
    assert made.range(SYMMETRIC) == (float(data.min()), float(data.max()))
    scale, zero_point = made.scale(SYMMETRIC)
    assert zero_point is None and scale.shape == (1, 1) and scale.dtype is torch.float32
    assert float(scale) == pytest.approx(float(data.abs().max()) / 127, rel=1e-6)


def test_asymmetric_scales_reach_from_the_lowest_to_the_highest() -> None:
    data = gelu_like()
    scale, zero_point = observed("minmax", [data]).scale(ASYMMETRIC)
    assert zero_point is not None and zero_point.shape == (1, 1)
    assert float(scale) == pytest.approx(float(data.max() - data.min()) / 255, rel=1e-6)
    assert float(zero_point) == round(-float(data.min()) / float(scale))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_moving_average_is_the_recursion_over_batches(momentum: float) -> None:
    batches = [torch.randn(50) * (i + 1) for i in range(5)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low = momentum * low + (1 - momentum) * float(batch.min())
        high = momentum * high + (1 - momentum) * float(batch.max())
    assert observed(f"moving-average:{momentum}", batches).range(SYMMETRIC) == pytest.approx((low, high), rel=1e-6)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
def test_percentile_leaves_that_share_inside(percent: float) -> None:
    data = torch.cat([torch.randn(9990), torch.randn(10) * 50])
    made = observed(f"percentile:{percent}", list(data.split(700)))
    bin_width = made.histogram.width
    rank = round(percent / 100 * data.numel())
    low, high = made.range(ASYMMETRIC)
    assert abs(high - float(data.kthvalue(rank).values)) <= bin_width
    assert abs(low + float((-data).kthvalue(rank).values)) <= bin_width
    low, high = made.range(SYMMETRIC)
    assert low == -high
    assert abs(high - float(data.abs().kthvalue(rank).values)) <= bin_width


def written_out_entropy_threshold(magnitudes: np.ndarray, width: float, levels: int) -> float:
    """The search element by element: the number of bins to keep with the least divergence, times their width."""
    counts = np.bincount(np.floor(magnitudes / width).astype(int)).astype(float)
    if counts[0]:
        counts[0] = counts[1]
    best, threshold = math.inf, 0.0
    for kept in range(levels, counts.size + 1):
        reference = counts[:kept].copy()
        reference[-1] += counts[kept:].sum()
        candidate = np.zeros(kept)
        for level in range(levels):
            inside = [i for i in range(kept) if i * levels // kept == level and counts[i] > 0]
            for i in inside:
                candidate[i] = counts[inside].sum() / len(inside)
        if candidate.sum():
            divergence = kullback_leibler(
                np.where(reference > 0, reference, 1e-4), np.where(candidate > 0, candidate, 1e-4)
            )
            if divergence <= best:
                best, threshold = divergence, kept * width
    return min(threshold, float(magnitudes.max()))


@pytest.mark.parametrize("text", ["affine3:tensor", "affine4:tensor"])
def test_entropy_finds_the_threshold_of_the_written_out_search(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prequant.runtime.calibrators.SEARCH_BINS", 128)
    data = torch.cat([torch.randn(3000), torch.randn(20) * 10, torch.zeros(400)])
    made = observed("entropy", list(data.split(333)))
    format = WeightFormat.parse(text)
    width = made.histogram.magnitudes().coarsened(128).width
    expected = written_out_entropy_threshold(data.abs().numpy().astype(float), width, 2 ** (format.bits - 1))
    assert made.range(format) == pytest.approx((-expected, expected), rel=1e-6)


def test_entropy_clips_far_outliers_and_minmax_does_not() -> None:
    data = torch.cat([torch.randn(20_000), torch.tensor([-60.0, 80.0])])
    low, high = observed("entropy", [data]).range(SYMMETRIC)
    assert 2 < high < 20 and low == -high
    assert observed("minmax", [data]).range(SYMMETRIC) == (-60.0, 80.0)


def test_entropy_keeps_a_uniform_range_whole() -> None:
    data = torch.linspace(-1, 1, 100_001)
    width = 1 / SEARCH_BINS
    assert observed("entropy", [data]).range(SYMMETRIC) == pytest.approx((-1, 1), abs=2 * width)


def test_asymmetric_entropy_never_goes_beyond_what_was_seen() -> None:
    data = torch.cat([gelu_like(), torch.tensor([90.0])])
    low, high = observed("entropy", [data]).range(ASYMMETRIC)
    assert low == pytest.approx(float(data.min())) and 3 < high < 40


def test_lsq_by_hand() -> None:
    made = observed("lsq", [torch.tensor([1.0, -2.0, 4.0]), torch.tensor([[-3.0, 0.0, 6.0]])])
    scale, zero_point = made.scale(WeightFormat.parse("affine3:tensor"))
    assert zero_point is None
    assert float(scale) == pytest.approx(2 * (16 / 6) / math.sqrt(3), rel=1e-6)
    scale, zero_point = made.scale(WeightFormat.parse("affine2:tensor:asym"))
    assert zero_point is not None
    assert float(scale) == pytest.approx(4 * (4 + 1 + 7 + 0 + 3 + 9) / 6 / math.sqrt(3), rel=1e-6)
    assert float(zero_point) == 0.0  # 3 / 9.2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_is_the_published_step_of_all_that_was_seen(bits: int) -> None:
    data = gelu_like()
    batches = [data[:7], data[7:2002].reshape(3, -1), data[2002:]]
    exact = data.double().numpy()
    scale, _ = observed("lsq", batches).scale(WeightFormat.affine(bits, "tensor"))
    assert float(scale) == pytest.approx(2 * np.abs(exact).mean() / math.sqrt(2 ** (bits - 1) - 1), rel=1e-6)
    scale, zero_point = observed("lsq", batches).scale(WeightFormat.affine(bits, "tensor", symmetric=False))
    step = 4 * (exact - exact.min()).mean() / math.sqrt(2**bits - 1)
    assert float(scale) == pytest.approx(step, rel=1e-6)
    assert zero_point is not None and float(zero_point) == round(-exact.min() / step)


def test_lsq_levels_start_at_zero_where_nothing_is_below_and_reach_it_where_all_is() -> None:
    probabilities = torch.softmax(torch.randn(50, 20), -1) + 0.01
    scale, zero_point = observed("lsq", [probabilities]).scale(ASYMMETRIC)
    assert zero_point is not None and float(zero_point) == 0.0
    assert float(scale) == pytest.approx(4 * float(probabilities.double().mean()) / math.sqrt(255), rel=1e-6)
    scale, zero_point = observed("lsq", [torch.linspace(-5.1, -5.0, 9)]).scale(ASYMMETRIC)
    assert float(scale) == pytest.approx(5.1 / 255, rel=1e-6)
    assert zero_point is not None and float(zero_point) == 255.0


def test_lsq_keeps_count_where_float32_would_not() -> None:
    made = observed("lsq", [torch.full((1000,), 3e4), *[torch.full((10,), 1e-3)] * 1000])
    expected = (1000 * 3e4 + 10_000 * 1e-3) / 11_000
    assert made.magnitudes / made.seen == pytest.approx(expected, rel=1e-9)
    assert {type(value) for value in vars(made).values()} == {int, float}  # a few numbers, whatever was seen


@pytest.mark.parametrize("name", calibrator_names())
def test_all_zero_activations_get_scale_one(name: str) -> None:
    scale, _ = observed(name, [torch.zeros(5, 5)]).scale(SYMMETRIC)
    assert float(scale) == 1.0


@pytest.mark.parametrize("name", calibrator_names())
def test_half_precision_and_empty_batches_are_taken(name: str) -> None:
    data = torch.randn(64, 8)
    made = observed(name, [torch.empty(0, 8), data.bfloat16()])
    assert made.seen == data.numel()
    high, seen = made.range(SYMMETRIC)[1], data.bfloat16().float().abs()
    # A learned step starts at a multiple of the mean, wherever the highest value is.
    assert 0 < high <= (float(seen.max()) + 1e-6 if name != "lsq" else 2 * math.sqrt(127) * float(seen.mean()) * 1.001)


@pytest.mark.parametrize("name", calibrator_names())
def test_values_that_are_not_finite_are_refused(name: str) -> None:
    made = calibrator(name)
    with pytest.raises(PrequantError, match="2 of 4 values are NaN or infinite"):
        made.observe(torch.tensor([1.0, math.nan, math.inf, 0.0]))
    with pytest.raises(PrequantError, match="no values were observed"):
        made.range(SYMMETRIC)


def test_memory_stays_the_same() -> None:
    made = Entropy()
    for i in range(20):
        made.observe(torch.randn(1000) * 1.5**i)
    assert made.histogram.counts.numel() == 8192


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("median", "'median' is unknown"),
        ("minmax:3", "takes no number"),
        ("percentile:much", "'much' is not a number"),
        ("percentile:30", r"30.0 is outside \(50, 100\]"),
        ("moving-average:1", r"momentum 1.0 is outside \[0, 1\)"),
    ],
)
def test_a_text_that_is_no_observer_says_why(text: str, message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        calibrator(text)


@pytest.mark.parametrize("text", ["affine8:row", "ternary:tensor"])
def test_only_affine_per_tensor_formats_have_static_scales(text: str) -> None:
    made = observed("minmax", [torch.randn(4)])
    with pytest.raises(FormatError, match="affine and per tensor"):
        made.scale(WeightFormat.parse(text))
