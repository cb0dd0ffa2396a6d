"""Programs in another floating-point type, and on other devices: what the eager model computes, on the same codes."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from prequant.passes import Input, Pipeline, Program, QuantizeActivations
from prequant.passes.moving import move
from prequant.runtime import PrequantError
from prequant.trace import trace

from ..models import FAMILIES, traced
from .support import tiny_embedding, tiny_embedding_program

LOWERED = "canonicalize,split-outliers{ratio=0.01},quantize-weights{bits=8},lower"


def spread(found: Tensor, exact: Tensor) -> float:
    """How far logits are off, in standard deviations."""
    return float((found.double() - exact).abs().max() / exact.std())


@pytest.mark.parametrize(
    ("name", "text", "dtype"),
    [
        ("gpt2-causal-lm", "canonicalize", torch.float16),
        ("t5-seq2seq-lm", "canonicalize", torch.bfloat16),
        ("t5-seq2seq-lm", LOWERED, torch.float16),
        ("llama-causal-lm", LOWERED, torch.bfloat16),
        ("bert-masked-lm", LOWERED, torch.float16),
    ],
    ids=str,
)
def test_it_is_as_exact_as_the_eager_model_in_that_type(name: str, text: str, dtype: torch.dtype) -> None:
    """Rotary angles, relative positions and masks included; inputs are padded."""
    family = FAMILIES[name]()
    inputs, model = family.make_inputs(2, 7, True), family.model
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**inputs).logits
        theirs = spread(cast(nn.Module, copy.deepcopy(model)).to(dtype)(**inputs).logits, exact)
        program: Any = Pipeline.parse(text)(traced(name).copy())
        simulated = spread(program(**inputs).logits, exact)
        found = copy.deepcopy(program).to(dtype)(**inputs).logits
        assert found.dtype is dtype and spread(found, exact) <= simulated + 2 * theirs


def test_codes_and_constants_stay_and_scales_go_along() -> None:
    program = Pipeline.parse(LOWERED)(traced("llama-causal-lm").copy())
    half = copy.deepcopy(program).to(torch.bfloat16)
    (constant,) = program.info.constants
    for name, tensor in program.state_dict().items():
        found = half.tensor(name)
        if tensor.is_floating_point() and name != constant:
            assert torch.equal(found, tensor.bfloat16())
        else:
            assert torch.equal(found, tensor) and found.dtype is tensor.dtype
    assert constant.endswith("inv_freq") and torch.equal(half.tensor(constant), program.tensor(constant))
    inputs = FAMILIES["llama-causal-lm"]().make_inputs(2, 7, True)
    with torch.no_grad():
        assert spread(half.float()(**inputs)["logits"], program(**inputs)["logits"].double()) < 0.1


def test_inputs_of_floats_are_of_the_type() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x @ self.weight + torch.where(mask, 0.0, torch.finfo(torch.float32).min)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 0, 0] = False
    program = trace(Shifted(), {"x": x, "mask": mask}).half()
    assert program.signature.inputs[0] == Input("x", torch.float16, program.signature.inputs[0].shape)
    assert program.signature.inputs[1].dtype is torch.bool
    result = program(x.half(), mask)
    assert bool(result.isfinite().all()), "the least number of float32 is no number of float16"
    assert torch.equal(result[1], x.half()[1])


def test_quantized_inputs() -> None:
    program = QuantizeActivations(bits=8)(
        Pipeline.parse("canonicalize,quantize-weights{bits=8}")(tiny_embedding_program())
    )
    ids = torch.arange(12).reshape(2, 6)
    exact = tiny_embedding()(ids)["logits"].double()
    for text in ("canonicalize", "lower"):
        half = copy.deepcopy(Pipeline.parse(text)(program)).bfloat16()
        with torch.no_grad():
            assert spread(half(ids)["logits"], exact) < 0.1


def test_a_type_that_no_graph_computes_in_is_refused_and_nothing_changes() -> None:
    program = tiny_embedding_program()
    with pytest.raises(PrequantError, match=r"can't compute in torch.float8_e4m3fn; it takes torch.float16, "):
        program.to(torch.float8_e4m3fn)
    assert {tensor.dtype for tensor in program.parameters()} == {torch.float32}
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(program(ids)["logits"], tiny_embedding()(ids)["logits"])


class Positions(nn.Module):
    """Adds to each row a number for its place, made as it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.arange(x.shape[1], dtype=torch.float32)[:, None].cos()


def test_the_graph_of_a_program_on_a_gpu_makes_its_tensors_there() -> None:
    """Without a GPU: on tensors that have no numbers, but say that they are on one."""
    program = Pipeline.parse("canonicalize,quantize-weights{bits=4},lower,plan")(
        trace(Positions(), {"x": torch.randn(2, 5, 8)})
    )
    with FakeTensorMode(allow_non_fake_inputs=True):

        def change(tensor: Tensor) -> Tensor:
            dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
            return torch.empty(tensor.shape, dtype=dtype, device="cuda:0")

        def apply() -> None:
            for name, tensor in (*program.named_parameters(), *program.named_buffers()):
                program.set_tensor(name, change(tensor), trainable=False)

        move(program, change, apply)
        result = program(torch.empty(3, 7, 8, dtype=torch.bfloat16, device="cuda:0"))
        assert result.device == torch.device("cuda:0") and result.dtype is torch.bfloat16
        assert program.runner is not None and program.runner.obstacle.endswith("is no plain tensor of the CPU")


def test_a_plan_is_for_the_cpu_and_comes_back_with_it() -> None:
    program = Pipeline.parse(f"{LOWERED},plan")(tiny_embedding_program())
    assert isinstance(program, Program) and program.runner is not None and not program.runner.obstacle
    away = copy.deepcopy(program).to("meta")
    assert away.planned and away.runner is not None and away.runner.obstacle.endswith("is no plain tensor of the CPU")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert away(ids.to("meta"))["logits"].is_meta
        expected = program(ids)["logits"]
        there_and_back = copy.deepcopy(program).bfloat16().float()
        runner = there_and_back.runner
        assert runner is not None and runner.plan(there_and_back, (ids,)) is not None
        torch.testing.assert_close(there_and_back(ids)["logits"], expected, rtol=0.05, atol=0.05)
