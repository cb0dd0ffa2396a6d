"""The figures of a weight against ones worked by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import BinaryCode, Canonicalize, Pipeline, Program, QuantizeWeights, SplitOutliers, weights
from prequant.runtime import Granularity
from prequant.trace import trace
from prequant.view.record import WeightRecord
from prequant.view.weight_figures import BINS, weight_record

WEIGHT = torch.tensor([[-1.0, 0.0, 1.0, 1.0], [2.0, -2.0, 0.0, 10.0]])


def program() -> Program:
    model = nn.Linear(4, 2)
    model.weight.data = WEIGHT.clone()
    return Canonicalize()(trace(model.eval(), torch.zeros(3, 4)))


def figures(*passes: object, original: Tensor | None = WEIGHT) -> WeightRecord:
    (view,) = weights(Pipeline(passes)(program()))  # type: ignore[arg-type]
    return weight_record(view, original, None)


def test_a_float_weight_is_32_bits_and_exact() -> None:
    record = figures()
    assert (record.bits, record.bytes, record.float_bytes, record.outliers) == (32.0, 32, 32, 0)
    assert record.sqnr == math.inf and record.format == "float32"
    assert record.levels == record.codes == () and record.scales is None


def test_codes_levels_and_error_of_two_bits() -> None:
    record = figures(QuantizeWeights(bits=2, granularity=Granularity.TENSOR, strategy="minmax"))
    (view,) = weights(QuantizeWeights(bits=2, granularity=Granularity.TENSOR, strategy="minmax")(program()))
    value = view.value()
    noise = float((WEIGHT - value).square().sum())
    assert record.sqnr == pytest.approx(10 * math.log10(111 / noise))  # 1 + 1 + 1 + 4 + 4 + 100
    assert record.bytes == 2 * 1 + 4 and record.bits == 8 * 6 / 8  # a byte of codes a row, one scale
    assert sum(record.codes) == 8 and len(record.codes) == len(record.levels)
    assert record.scales is not None and record.scales[0] == record.scales[1] == record.scales[2]
    counted = {level: number for level, number in zip(record.levels, record.codes, strict=True) if number}
    found = {float(level): int((value == level).sum()) for level in value.unique()}
    assert counted == pytest.approx(found)


def test_outliers_are_counted_and_stand_in_the_histogram() -> None:
    record = figures(SplitOutliers(ratio=0.125))
    assert record.outliers == 1 and record.sqnr == math.inf
    histogram = record.histogram
    assert histogram is not None and histogram.outliers is not None and histogram.original is not None
    assert (histogram.low, histogram.high) == (-2.0, 10.0)
    assert sum(histogram.current) == sum(histogram.original) == 8 and len(histogram.current) == BINS
    assert histogram.outliers[-1] == 1 and sum(histogram.outliers) == 1


def test_levels_of_a_binary_code_are_the_sums_of_its_alphas() -> None:
    (view,) = weights(Pipeline([BinaryCode(bits=2)])(program()))
    record = weight_record(view, WEIGHT, None)
    first, second = (float(plane.median()) for plane in view.program.tensor(view.tensors["alphas"]).detach())
    assert record.levels == pytest.approx(sorted([first + second, first - second, second - first, -first - second]))


def test_without_an_original_the_error_is_what_was_recorded_or_nothing() -> None:
    (view,) = weights(QuantizeWeights(bits=4)(program()))
    unknown, known = weight_record(view, None, None), weight_record(view, None, 17.5)
    assert unknown.sqnr is None and not unknown.recorded
    assert known.sqnr == 17.5 and known.recorded
    assert unknown.histogram is not None and unknown.histogram.original is None


def test_a_weight_that_is_not_finite_has_no_histogram() -> None:
    broken = program()
    broken.set_tensor("weight", torch.tensor([[math.nan] * 4, [math.inf] * 4]))
    (view,) = weights(broken)
    assert weight_record(view, None, None).histogram is None
