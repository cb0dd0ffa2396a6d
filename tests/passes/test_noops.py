from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes.properties import violation
from prequant.trace import trace

from .canonical import Forward, calls, canonical, changes, check, named_sizes
from .support import assert_golden

aten = torch.ops.aten


def test_what_computes_nothing_goes() -> None:
    def wasteful(self: Forward, x: Tensor) -> Tensor:
        _unused = x + torch.arange(4)
        y = x.to(torch.float32).to(x.device)[:, :].expand(-1, x.shape[1], 4)
        y = y.contiguous().reshape(x.shape[0], -1)
        return torch.clamp(y - torch.tensor(3.0), max=x.shape[1] * 2)

    module = Forward(wasteful).eval()
    program = trace(module, {"x": torch.randn(2, 3, 4)}, dynamic_axes={"x": {0: "batch"}})
    result = canonical(named_sizes(program))
    assert_golden(
        result,
        """
        program(x: f32[batch, 3, 4])
          %size_0 = sym_size.int(%x, 0)
          %reshape = reshape(%x, [%size_0, -1])
          %sub = sub.Tensor(%reshape, lifted_tensor_0 [scalar f32])
          %clamp = clamp(%sub, None, 6)
          return %clamp
        """,
    )
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(result(x), module(x))


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda self, x: x.to(torch.float64), aten.to.dtype),
        (lambda self, x: x[:, 1:], aten.slice.Tensor),
        (lambda self, x: x[:, ::2], aten.slice.Tensor),
        (lambda self, x: x[:, :2], aten.slice.Tensor),
        (lambda self, x: x.transpose(0, 1).contiguous().view(-1), aten.contiguous.default),
        (lambda self, x: x[:1].expand(x.shape[0], -1), aten.expand.default),
        (lambda self, x: x.view(-1), aten.view.default),
        (lambda self, x: (x * 0.0 - 0.0) + 0, aten.add.Tensor),
    ],
)
def test_what_computes_something_stays(function: Any, target: Any) -> None:
    assert calls(check(function, 4), target)


def test_dropout_stays_even_where_nothing_is_dropped() -> None:
    result = check(lambda self, x: nn.functional.dropout(x, 0.0, training=True), 4)
    assert len(calls(result, aten.dropout.default)) == 1


def test_assertions_go_and_inputs_stay() -> None:
    class Unused(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            torch._assert_async(x.sum() > -1e9, "never")
            return x.to(torch.float64) * 2

    program = trace(Unused(), (torch.randn(2, 3), torch.randn(2, 3)))
    assert any("_assert" in str(node.target) for node in program.graph.nodes)
    result = canonical(program)
    assert not any("_assert" in str(node.target) for node in result.graph.nodes)
    assert result.signature.names == ("x", "y") and violation("valid-signature", result) is None
    x = torch.randn(4, 3)
    assert torch.equal(result(x, x), x.double() * 2)


def test_tensors_that_nothing_reads_any_more_go() -> None:
    def reads(self: Any, x: Tensor) -> Tensor:
        _unused = self.table * 2 + torch.tensor([1.0, 2.0, 3.0])
        return x * self.bias

    program = trace(Forward(reads).eval(), torch.randn(2, 3))
    assert {"table", "bias"} < {name for name, _ in (*program.named_buffers(), *program.named_parameters())}
    result = canonical(program)
    assert [name for name, _ in (*result.named_buffers(), *result.named_parameters())] == ["bias"]
    assert ("table", "no node reads it, removed") in changes(result)
    assert result.info.constants == ()
