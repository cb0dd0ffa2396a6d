"""That a plan sees everything that changes, and that copies of a Program plan for themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prequant.passes import Pipeline, Program
from prequant.passes.compose_ops import ComposeOps

from .small import by_graph, inputs_of, planned

# ---- what changes


def weight_of(program: Program, name: str) -> nn.Parameter:
    return program.get_parameter(name)


def gone_and_back(program: Program, *names: str) -> None:
    for name in names:
        program.delete_tensor(name)
    for name in names:
        program.set_tensor(name, torch.randn(8))


CHANGES: dict[str, Callable[[Program], Any]] = {
    "written to": lambda p: torch.no_grad()(lambda: weight_of(p, "norm.weight").copy_(torch.randn(8)))(),
    "a scale is written to": lambda p: torch.no_grad()(lambda: weight_of(p, "first.weight.scale").mul_(2))(),
    "a scale of the embedding": lambda p: torch.no_grad()(lambda: weight_of(p, "tokens.weight.scale").mul_(2))(),
    "a bias is written to": lambda p: torch.no_grad()(lambda: weight_of(p, "second.bias").add_(1))(),
    "codes are written to": lambda p: p.get_buffer("first.weight.codes").fill_(0x31),
    "a buffer is written to": lambda p: p.get_buffer("shift").zero_(),
    "other data": lambda p: setattr(weight_of(p, "norm.bias"), "data", torch.randn(8)),
    "data of another order": lambda p: setattr(weight_of(p, "norm.bias"), "data", torch.randn(16)[::2]),
    "a tensor is set": lambda p: p.set_tensor("second.weight.scale", torch.rand(8, 1)),
    "a buffer becomes a parameter": lambda p: p.set_tensor("shift", torch.randn(8), trainable=True),
    "a buffer is replaced": lambda p: setattr(p, "shift", torch.randn(8)),
    "gone and back": lambda p: gone_and_back(p, "norm.bias"),
    "a module is gone and back": lambda p: gone_and_back(p, "norm.bias", "norm.weight"),
    "another state": lambda p: p.load_state_dict({k: v.roll(1, 0) for k, v in p.state_dict().items()}),
    "another state, assigned": lambda p: p.load_state_dict(
        {k: v.roll(1, 0) for k, v in p.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_call_sees(program: Program, calls: list[int], name: str) -> None:
    inputs = inputs_of()
    assert planned(program, calls, inputs)
    before = by_graph(program, inputs)
    for _ in range(2):
        CHANGES[name](program)
        assert planned(program, calls, inputs)
    assert not torch.equal(by_graph(program, inputs), before)


def test_another_type_is_seen(program: Program, calls: list[int]) -> None:
    assert planned(program, calls)
    norm = program.get_parameter("norm.weight"), program.get_parameter("norm.bias")
    for parameter in norm:
        parameter.data = parameter.data.double()
    inputs = inputs_of()
    with torch.no_grad(), pytest.raises(RuntimeError):
        program(**inputs)
    for parameter in norm:
        parameter.data = parameter.data.float()
    assert planned(program, calls)
    with torch.no_grad():
        expected = program(**inputs)
        program.to(torch.bfloat16)
        found = program(inputs["ids"], inputs["x"].bfloat16())
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    program.to(torch.float32)
    assert planned(program, calls)


def test_a_tensor_that_is_gone_is_missed(program: Program, calls: list[int]) -> None:
    assert planned(program, calls)
    program.delete_tensor("norm.bias")
    with torch.no_grad(), pytest.raises(AttributeError):
        program(**inputs_of())


def test_weights_on_another_device(program: Program, calls: list[int]) -> None:
    assert planned(program, calls)
    moved = copy.deepcopy(program).to("meta")
    with torch.no_grad():
        found = moved(**{name: value.to("meta") for name, value in inputs_of().items()})
    assert found.is_meta
    assert moved.runner is not None
    assert "no plain tensor of the CPU" in moved.runner.obstacle


# ---- copies


def test_copies_plan_for_themselves(program: Program, calls: list[int]) -> None:
    inputs = inputs_of()
    assert planned(program, calls, inputs)
    before = by_graph(program, inputs)
    for other in (copy.deepcopy(program), program.copy()):
        assert other.planned
        assert planned(other, calls, inputs)
        assert torch.equal(by_graph(other, inputs), before)
    changed = copy.deepcopy(program)
    with torch.no_grad():
        changed.get_parameter("norm.weight").zero_()
    assert planned(changed, calls, inputs)
    assert torch.equal(by_graph(program, inputs), before)
    assert planned(program, calls, inputs)


def test_another_pass_makes_another_plan(program: Program, calls: list[int]) -> None:
    inputs = inputs_of()
    assert planned(program, calls, inputs)
    changed = Pipeline([ComposeOps()])(program)
    (tanh,) = changed.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    tanh.target = torch.ops.aten.sigmoid.default
    changed.recompile()
    assert planned(changed, calls, inputs)
    assert planned(program, calls, inputs)
    with torch.no_grad():
        assert not torch.allclose(changed(**inputs), program(**inputs))
