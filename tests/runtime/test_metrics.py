import math

import pytest
import torch

from prequant.runtime import metrics, sqnr


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
