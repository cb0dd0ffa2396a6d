"""What the tests of canonicalize share. Import with ``from .canonical import ...``."""

from typing import Any

import torch
from torch import Tensor, nn

from prequant.passes import Canonicalize, Program
from prequant.passes.properties import violation
from prequant.trace import trace

aten = torch.ops.aten


def canonical(program: Program) -> Program:
    return Canonicalize()(program)


def changes(program: Program) -> list[tuple[str, str]]:
    return [(change.what, change.how) for change in program.reports[-1].changes]


def kept(program: Program) -> list[tuple[str, str]]:
    return [(item.what, item.why) for item in program.reports[-1].kept]


def named_sizes(program: Program) -> Program:
    """The Program with its sizes numbered from 0: how the exporter counts them differs between its versions."""
    for number, node in enumerate(calls(program, aten.sym_size.int)):
        node.name = f"size_{number}"
    return program


class Forward(nn.Module):
    """A module of one function of its input ``x``; ``w`` is 4 × 3, ``v`` 3 × 4."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.w = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.v = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, generator=generator))
        self.register_buffer("table", torch.randn(4, 3, generator=generator))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def check(function: Any, *shape: int, atol: float = 1e-6) -> Program:
    """The canonical Program of a function, after comparing it with the function at another batch size."""
    module = Forward(function).eval()
    program = trace(module, torch.randn(2, *shape))
    result = canonical(program)
    x = torch.randn(5, *shape)
    torch.testing.assert_close(result(x), module(x), rtol=0, atol=atol)
    torch.testing.assert_close(program(x), module(x), rtol=0, atol=atol)
    assert violation("canonical", result) is None
    assert not changes(canonical(result)), "once is enough"
    return result


def calls(program: Program, target: Any) -> list[Any]:
    return list(program.graph.find_nodes(op="call_function", target=target))
