from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import Canonicalize, FuseEpilogue, Lower, Pipeline, Program, QuantizeWeights, Train, lower
from prequant.runtime import ops
from prequant.trace import trace

from .support import assert_golden, mlp_inputs, tiny_mlp_program

gelu = nn.functional.gelu


class Block(nn.Module):
    """A feed-forward block, 8 -> 16 -> 8, with what ``combine`` makes of its input and its result."""

    def __init__(self, activation: Callable[[Tensor], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.activation, self.combine = activation, combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.down(self.activation(self.up(x))))


def lowered(model: nn.Module) -> Program:
    return Pipeline([Canonicalize(), QuantizeWeights(), Lower(strict=True)])(trace(model.eval(), mlp_inputs()))


def fused_parts(program: Program) -> dict[str, str]:
    return {change.what: change.how for change in program.reports[-1].changes}


def test_golden() -> None:
    program = Pipeline([QuantizeWeights(), Lower(), FuseEpilogue()])(tiny_mlp_program())
    assert_golden(
        program,
        """
        program(x: f32[batch, length, 8])
          %packed_linear_default_2 = packed_linear<affine4:row>(%x, first.weight.codes [16×4 u8], first.weight.scale [16×1 f32], bias=first.bias [16 f32], columns=8, activation=relu)
          %dropout = dropout(%packed_linear_default_2, 0.1, False)
          %packed_linear_default_1 = packed_linear<affine4:row>(%dropout, second.weight.codes [4×8 u8], second.weight.scale [4×1 f32], bias=second.bias [4 f32], columns=16)
          return {logits: %packed_linear_default_1}
        """,  # noqa: E501
    )
    assert fused_parts(program) == {"first.weight": "relu"} and program.reports[-1].totals == {"fused": 1}


@pytest.mark.parametrize(
    ("activation", "name"),
    [(torch.relu, "relu"), (gelu, "gelu"), (partial(gelu, approximate="tanh"), "gelu_tanh")],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_fused_equals_apart(activation: Callable[[Tensor], Tensor], name: str, swapped: bool) -> None:
    apart = lowered(Block(activation, lambda x, y: y + x if swapped else x + y))
    fused = FuseEpilogue()(apart)
    assert fused_parts(fused) == {"up.weight": name, "down.weight": "residual"}
    assert sum(node.op == "call_function" for node in fused.graph.nodes) == 2
    for shape in ((3, 5), (1, 1), (2, 7)):
        inputs = mlp_inputs(*shape)
        torch.testing.assert_close(fused(**inputs), apart(**inputs), rtol=1e-5, atol=1e-6)


def test_a_fused_program_learns_as_before() -> None:
    apart = Train(scales=True, biases=True)(lowered(Block(gelu, lambda x, y: x + y)))
    fused = FuseEpilogue()(apart)
    for program in (apart, fused):
        program(**mlp_inputs()).square().sum().backward()
    for name, value in apart.named_parameters():
        torch.testing.assert_close(fused.tensor(name).grad, value.grad, rtol=1e-4, atol=1e-5)


def after(activation: Callable[[Tensor], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> dict[str, str]:
    return fused_parts(FuseEpilogue()(lowered(Block(activation, combine))))


def test_what_can_not_be_fused_stays() -> None:
    nothing: dict[str, str] = {}
    assert after(torch.tanh, lambda x, y: y) == nothing
    assert after(torch.tanh, lambda x, y: x - y) == nothing
    assert after(torch.tanh, lambda x, y: torch.add(x, y, alpha=2)) == nothing
    assert after(torch.tanh, lambda x, y: y + y) == nothing
    assert after(torch.tanh, lambda x, y: y + 1) == nothing
    assert after(torch.tanh, lambda x, y: y + x[:, :1]) == nothing, "a residual that is spread"
    assert after(torch.tanh, lambda x, y: y + x.double()) == nothing, "a residual of another type"
    assert after(torch.tanh, lambda x, y: (y + x) * y) == nothing, "a second reader of the linear"
    assert after(torch.tanh, lambda x, y: nn.functional.dropout(y, 0.1, False) + x) == nothing
    assert after(torch.tanh, lambda x, y: torch.relu(torch.relu(y))) == {"down.weight": "relu"}
    assert after(torch.tanh, lambda x, y: torch.relu(y + x)) == {"down.weight": "residual"}, "the sum comes last"


def test_the_sum_of_two_linears_is_one_linears_residual() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    apart = lowered(Two())
    fused = FuseEpilogue()(apart)
    assert fused_parts(fused) == {"a.weight": "residual"}
    torch.testing.assert_close(fused(**mlp_inputs()), apart(**mlp_inputs()), rtol=1e-5, atol=1e-6)


def test_lower_fuses() -> None:
    program = lower(QuantizeWeights()(tiny_mlp_program()))
    names = [report.source.partition("{")[0] for report in program.reports[-5:]]
    assert names == ["lower", "compose-ops", "fuse-epilogue", "fuse-parallel-linears", "plan"]
    activations = [
        node.kwargs.get("activation", "")
        for node in program.graph.find_nodes(op="call_function", target=ops.packed_linear)
    ]
    assert activations == ["relu", ""]
