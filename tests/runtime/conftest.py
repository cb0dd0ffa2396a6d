"""Fixtures of the runtime's tests."""

from collections.abc import Iterator

import pytest
import torch

from prequant.runtime import native
from prequant.runtime.triton_kernels import backends

from .native_layers import ISAS


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("PREQUANT_ISA", request.param)
    native.chosen_isa.cache_clear()
    yield request.param
    monkeypatch.undo()
    native.chosen_isa.cache_clear()


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """Where Triton kernels run: on a GPU if there is one, else on the CPU, in the interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with backends.interpreted():
        yield torch.device("cpu")
