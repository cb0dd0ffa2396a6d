"""What a program sets as PyTorch's default dtype or device is no business of the kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import Pipeline, Program
from prequant.runtime import FormatError, ops
from prequant.trace import trace

COLUMNS = 48
OPTIONS: dict[str, Any] = {"format": "affine8:row", "columns": COLUMNS}


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def weight() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randint(0, 256, (40, COLUMNS), dtype=torch.uint8), torch.rand(40, 1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(40, COLUMNS), nn.Linear(COLUMNS, 64), nn.Linear(64, COLUMNS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(self.words(ids))))


def planned() -> Program:
    torch.manual_seed(0)
    passes = "canonicalize,split-outliers{ratio=0.05},quantize-weights{bits=8},lower,plan"
    return Pipeline.parse(passes)(trace(Small().eval(), (torch.zeros(3, 5, dtype=torch.int64),)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_results_are_float32_under_any_default_type(dtype: torch.dtype) -> None:
    codes, scale = weight()
    ids = torch.arange(7)
    expected = ops.dequantize(codes, scale, None, **OPTIONS)
    torch.set_default_dtype(dtype)
    unpacked = ops.dequantize(codes, scale, None, **OPTIONS)
    looked_up = ops.packed_embedding(ids, codes, scale, None, None, None, None, False, **OPTIONS)
    assert unpacked.dtype is torch.float32 and torch.equal(unpacked, expected)
    assert torch.equal(looked_up, expected[:7])


def test_a_plan_computes_in_float32_under_any_default_type() -> None:
    program, ids = planned(), torch.arange(12).reshape(3, 4)
    with torch.no_grad():
        expected = program(ids)
        other = planned()
        torch.set_default_dtype(torch.bfloat16)
        found = other(ids)
    assert other.runner is not None and not other.runner.obstacle
    assert torch.equal(found, expected)


def test_results_are_on_the_cpu_under_any_default_device() -> None:
    codes, scale = weight()
    expected = ops.dequantize(codes, scale, None, **OPTIONS)
    with torch.device("meta"):
        assert torch.equal(ops.dequantize(codes, scale, None, **OPTIONS), expected)


def test_kernels_of_the_cpu_get_nothing_of_another_device() -> None:
    """By the way that calls take whose tensors are not all on the CPU."""
    codes, scale = weight()
    elsewhere, inputs = scale.to("meta"), torch.rand(3, COLUMNS)
    with pytest.raises(FormatError, match="packed_linear: input on cpu, but scale on meta"):
        ops.KERNELS["packed_linear"](inputs, codes, elsewhere, *(None,) * 4, False, *(None,) * 4, **OPTIONS)
    with pytest.raises(FormatError, match="dequantize: codes on cpu, but scale on meta"):
        ops.KERNELS["dequantize"](codes, elsewhere, None, **OPTIONS)


def test_outliers_outside_of_an_embedding_are_refused_by_a_plan() -> None:
    program, ids = planned(), torch.arange(12).reshape(3, 4)
    with torch.no_grad():
        program(ids)
        program.tensor("words.weight.outliers.columns").fill_(COLUMNS)
        with pytest.raises(FormatError, match=f"not all within its rows of {COLUMNS} columns"):
            program(ids)
