"""A small lowered Program, and whether a call of it goes by its plan. Import with ``from .small import ...``."""

from functools import cache

import torch
from torch import Tensor, fx, nn

from prequant.passes import Pipeline, Program, QuantizeWeights, lower
from prequant.trace import trace


class Small(nn.Module):
    """ids [batch, length] and floats [batch, length, 8]: an embedding, two linears, a norm, and a call of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.shift: Tensor
        self.register_buffer("shift", torch.randn(8))

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        hidden = self.norm(torch.sin(self.first(self.tokens(ids) + x)) + self.shift)
        return self.second(hidden).tanh()


@cache
def lowered() -> Program:
    torch.manual_seed(3)
    inputs = {"ids": torch.randint(0, 12, (3, 5)), "x": torch.randn(3, 5, 8)}
    traced = trace(Small().eval(), inputs)
    return lower(Pipeline([QuantizeWeights(bits=4)])(traced))


def inputs_of(batch: int = 2, length: int = 4) -> dict[str, Tensor]:
    return {"ids": torch.randint(0, 12, (batch, length)), "x": torch.randn(batch, length, 8)}


def by_graph(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = fx.Interpreter(program).run(*program.bind((), inputs))
    return result[0] if isinstance(result, (tuple, list)) else result


def planned(program: Program, calls: list[int], inputs: dict[str, Tensor] | None = None) -> bool:
    """Whether a call goes by the plan; its result has to be the graph's."""
    inputs = inputs or inputs_of()
    before = len(calls)
    with torch.no_grad():
        found = program(**inputs)
    expected = by_graph(program, inputs)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    return len(calls) > before
