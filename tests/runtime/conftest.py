"""Fixtures of the runtime's tests."""

from collections.abc import Iterator

import pytest

from prequant.runtime import native

from .native_layers import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PREQUANT_ISA", request.param)
    native.chosen_isa.cache_clear()
    yield request.param
    monkeypatch.undo()
    native.chosen_isa.cache_clear()
