import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import Program
from prequant.passes.compose_ops import ComposeOps
from prequant.trace import trace

from .support import assert_golden

aten = torch.ops.aten


class Of(nn.Module):
    """A function of an input [batch, length, 8], with a weight [8] that is not 1."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def program_of(function: Callable[[Tensor, Tensor], Tensor]) -> Program:
    return trace(Of(function).eval(), {"x": torch.randn(3, 5, 8)})


def gelu(x: Tensor, factor: float = 0.044715, half: float = 0.5) -> Tensor:
    return half * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + factor * torch.pow(x, 3.0))))


def new_gelu(x: Tensor) -> Tensor:
    """As ``transformers.activations.NewGELUActivation`` has it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-6) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def composed(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Program, Program, int]:
    before = program_of(function)
    after = before.copy()
    report = ComposeOps().run(after)
    after.recompile()
    after.graph.lint()
    return before, after, report.totals["composed"]


def test_golden() -> None:
    _, after, count = composed(lambda x, w: new_gelu(x) + rms_norm(x, w))
    assert count == 2
    assert_golden(
        after,
        """
        program(x: f32[batch, length, 8])
          %gelu_default = gelu(%x, approximate=tanh)
          %rms_norm_default = rms_norm(%x, [8], weight [8 f32], 1e-06)
          %add_3 = add.Tensor(%gelu_default, %rms_norm_default)
          return %add_3
        """,
    )


COMPOSED = {
    "gelu": lambda x, w: new_gelu(x),
    "gelu of a gelu": lambda x, w: new_gelu(new_gelu(x * w)),
    "rms norm": rms_norm,
    "rms norm of an rms norm": lambda x, w: rms_norm(rms_norm(x, w), w, 1e-3),
    "both": lambda x, w: rms_norm(new_gelu(rms_norm(x, w)), w),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_the_same_within_rounding_with_the_same_gradients(name: str) -> None:
    before, after, count = composed(COMPOSED[name])
    assert count
    left = {node.target for node in after.graph.nodes}
    assert not left & {aten.tanh.default, aten.rsqrt.default, aten.pow.Tensor_Scalar}
    for sizes in ((3, 5, 8), (1, 1, 8)):
        gradients = []
        x = torch.randn(sizes) * 3
        for program in (before, after):
            input = x.clone().requires_grad_()
            program.zero_grad()
            result = program(input)
            result.square().sum().backward()
            gradients.append((result.detach(), input.grad, *(p.grad for p in program.parameters())))
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def read_twice(x: Tensor, w: Tensor) -> Tensor:
    mean = x.pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(mean + 1e-6)) + mean


APART: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another factor": lambda x, w: gelu(x, factor=0.05),
    "another half": lambda x, w: gelu(x, half=1.0),
    "another power": lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)),
    "another axis": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6)),
    "another input": lambda x, w: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)),
    "a part is read": read_twice,
    "a weight of rows": lambda x, w: w.view(1, 1, 8) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "a weight that is broadcast": lambda x, w: w[:1] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "one number in a row": lambda x, w: w * (x[..., :1] * torch.rsqrt(x[..., :1].pow(2).mean(-1, keepdim=True) + 1e-6)),
    "a weight of another type": lambda x, w: w.double() * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "a sum with a factor": lambda x, w: (
        w * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-6, alpha=2)))
    ),
}


@pytest.mark.parametrize("name", APART)
def test_what_computes_something_else_stays(name: str) -> None:
    before, after, count = composed(APART[name])
    assert count == 0
    x = torch.randn(2, 4, 8)
    assert torch.equal(before(x), after(x))
