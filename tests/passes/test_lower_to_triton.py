"""Whole lowered models on the Triton kernels: on a GPU, or in Triton's interpreter where there is none."""

import contextlib
import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prequant.passes import Pipeline
from prequant.runtime.triton_kernels import backends

from ..models import FAMILIES, traced

pytest.importorskip("triton")
from prequant.runtime.triton_kernels import linear, prepared, rows

PIPELINES = {
    "gpt2-causal-lm": "canonicalize,split-outliers{ratio=0.01},"
    "quantize-weights{bits=4,granularity=group,group_size=32},lower,fuse-epilogue",
    "bert-masked-lm": "canonicalize,quantize-weights{bits=3,symmetric=false},quantize-activations{bits=8},lower,"
    "fuse-parallel-linears",
}


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def running(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, the kernels take calls on ``device``."""
    return contextlib.nullcontext() if device.type == "cuda" else backends.interpreted()


def test_what_ran_there_comes_back_as_it_was(device: torch.device) -> None:
    """In half precision, as models are on a GPU; what was arranged for the kernels stays out of the Program."""
    name = "gpt2-causal-lm"
    program, inputs = Pipeline.parse(PIPELINES[name])(traced(name).copy()), FAMILIES[name]().make_inputs(1, 3, True)
    program = copy.deepcopy(program).half()
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    with running(device), torch.no_grad():
        program.to(device).planned = False
        arranged = len(prepared._kept)
        logits = program(**{key: value.to(device) for key, value in inputs.items()})["logits"]
        assert logits.dtype is torch.float16 and bool(logits.isfinite().all()) and len(prepared._kept) > arranged
    after = program.to("cpu").state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    del program, after
    gc.collect()
    assert len(prepared._kept) <= arranged


@pytest.mark.usefixtures("reference_kernels")  # on the CPU: no plan, and no native kernel
@pytest.mark.parametrize("name", PIPELINES)
def test_a_lowered_model_computes_what_the_reference_does(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, inputs = Pipeline.parse(PIPELINES[name])(traced(name).copy()), FAMILIES[name]().make_inputs(2, 7, True)
    expected = program(**inputs)
    monkeypatch.delenv("PREQUANT_ISA")  # GPUs would have the reference, too
    calls: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(linear, "packed_linear", noting("linear", linear.packed_linear))
    monkeypatch.setattr(linear, "packed_linears", noting("linears", linear.packed_linears))
    monkeypatch.setattr(rows, "packed_embedding", noting("embedding", rows.packed_embedding))
    on_device = {key: value.to(device) for key, value in inputs.items()}
    with running(device), torch.no_grad():  # while gradients are recorded, linears are called one by one
        found = program.to(device)(**on_device)
    assert calls.count("linear") + calls.count("linears") >= 8 and "embedding" in calls
    assert ("linears" in calls) == ("fuse-parallel-linears" in PIPELINES[name])
    torch.testing.assert_close(found["logits"].cpu(), expected["logits"], rtol=1e-4, atol=1e-4)
