import math

import pytest
import torch

from prequant.runtime import metrics, sqnr
from prequant.runtime.metrics import all_finite


def test_decibels_by_hand() -> None:
    original = torch.tensor([[3.0, 4.0]])  # energy 25
    assert sqnr(original, torch.tensor([[3.0, 4.5]])) == pytest.approx(10 * math.log10(25 / 0.25))
    assert sqnr(original, torch.zeros(1, 2)) == pytest.approx(0.0)


def test_one_more_bit_is_six_decibels() -> None:
    signal = torch.rand(100_000) * 2 - 1
    levels = [sqnr(signal, torch.round(signal * 2**bits) / 2**bits) for bits in (6, 7, 8)]
    assert levels[1] - levels[0] == pytest.approx(6.02, abs=0.1)
    assert levels[2] - levels[1] == pytest.approx(6.02, abs=0.1)


def test_the_ends() -> None:
    assert sqnr(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr(torch.zeros(3), torch.zeros(3)) == math.inf
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_squares_are_summed_in_double_precision() -> None:
    original = torch.full((1000,), 1e25)
    assert sqnr(original, original * 0.9) == pytest.approx(20.0, abs=1e-4)


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    original, approximation = torch.randn(7, 11), torch.randn(7, 11)
    whole = sqnr(original, approximation)
    monkeypatch.setattr(metrics, "CHUNK", 10)
    assert sqnr(original.T.contiguous().T, approximation) == pytest.approx(whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_finite_is_all_but_nan_and_infinity(dtype: torch.dtype) -> None:
    values = torch.tensor([[-3.0, 0.0], [2.0, 5.0]], dtype=dtype)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(values[0, 0])
    for bad in (math.nan, math.inf, -math.inf) if dtype.is_floating_point else ():
        for place in ((0, 0), (1, 1)):
            changed = values.clone().requires_grad_()
            with torch.no_grad():
                changed[place] = bad
            assert not all_finite(changed)


def test_finite_in_a_type_of_fewer_values() -> None:
    large = torch.tensor([1.0, -7e4])
    assert all_finite(large) and not all_finite(large, torch.float16)
    assert not all_finite(torch.tensor([1e300], dtype=torch.float64), torch.float32)
