"""Triton is imported when a kernel is wanted, not before; what happens where it is missing."""

import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch

from prequant.runtime import ops, registered_backends
from prequant.runtime.triton_kernels import availability, backends

CUDA = torch.device("cuda")


def test_the_import_needs_no_triton_and_no_gpu() -> None:
    """torch imports Triton by itself where it is there; here it is as if it were not."""
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import prequant, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print([name for name in sys.modules if name.startswith('prequant.runtime.triton_kernels.')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    folder = "prequant.runtime.triton_kernels"
    assert done.stdout.strip() == str([f"{folder}.availability", f"{folder}.backends"])


def test_the_kernels_are_registered_for_cuda_alone() -> None:
    for op in backends.MODULES:
        assert registered_backends(op, "cuda") == ("triton",)
        assert "triton" not in registered_backends(op, "cpu")


def test_a_machine_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    availability._installed_for_cuda.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"Triton is not installed: .* pip install 'prequant\[triton\]'"):
            assert not availability.run_on(CUDA)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not availability.run_on(CUDA)
        with (
            pytest.raises(availability.TritonError, match="Triton is not installed"),
            backends.interpreted(),
        ):
            pass
    finally:
        availability._installed_for_cuda.cache_clear()


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_installed_for_cuda", lambda: True)
    monkeypatch.delenv("PREQUANT_ISA", raising=False)
    assert availability.run_on(CUDA)
    monkeypatch.setenv("PREQUANT_ISA", "reference")
    assert not availability.run_on(CUDA)


def test_the_interpreter_has_to_be_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(availability.TritonError, match="set TRITON_INTERPRET=1"), backends.interpreted():
        pass
    assert "triton" not in registered_backends("packed_linear", "cpu")


def test_inside_the_switch_calls_on_the_cpu_are_the_kernels() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled on this machine")
    codes, scale = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1)
    nothing = (None, None, None, False, None, None, None)
    with backends.interpreted():
        assert registered_backends("packed_linear", "cpu")[0] == "triton"
        result = ops.packed_linear(torch.ones(1, 32), codes, scale, None, *nothing, format="affine4:row", columns=32)
    assert result.tolist() == [[-256.0] * 4]
    assert "triton" not in registered_backends("packed_linear", "cpu")
