import operator
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes.functional import functional_variant
from prequant.trace import trace

from .canonical import Forward, calls, canonical, changes, check, kept
from .support import assert_golden, tiny_mlp_program

aten = torch.ops.aten


def test_writing_ops_become_functional() -> None:
    def writes(self: Forward, x: Tensor) -> Tensor:
        y = x * 2
        y += self.bias
        y.relu_()
        return nn.functional.dropout(y, 0.25, training=True, inplace=True)

    module = Forward(writes).eval()
    program = trace(module, {"x": torch.randn(2, 3)})
    assert_golden(
        program,
        """
        program(x: f32[batch, 3])
          %mul = mul.Tensor(%x, 2)
          %add_ = add_.Tensor(%mul, bias [3 f32])
          %relu_ = relu_(%add_)
          %dropout_ = dropout_(%relu_, 0.25, False)
          return %dropout_
        """,
    )
    result = canonical(program)
    assert_golden(
        result,
        """
        program(x: f32[batch, 3])
          %mul = mul.Tensor(%x, 2)
          %add_ = add.Tensor(%mul, bias [3 f32])
          %relu_ = relu(%add_)
          %dropout_ = dropout(%relu_, 0.25, False)
          return %dropout_
        """,
    )
    assert changes(result) == [
        ("add_", "add_.Tensor -> add.Tensor"),
        ("relu_", "relu_ -> relu"),
        ("dropout_", "dropout_ -> dropout"),
    ]
    share = (result.train()(torch.ones(500, 3) * 100) == 0).float().mean()
    assert abs(share - 0.25) < 0.06


def test_writing_that_something_else_sees_is_kept() -> None:
    def through_a_view(self: Forward, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].add_(1.0)
        return y + 1

    def casts(self: Forward, x: Tensor) -> Tensor:
        y = (x > 0).to(torch.int64) * 3
        y.mul_(x > 1)
        y.copy_(x * 5)  # a float cut to an integer
        return y

    def seen_through_a_view(self: Forward, x: Tensor) -> Tensor:
        y = x * 2
        z = y[:, 0]
        y.add_(1.0)
        return y.sum(1) * z

    def rounds(self: Forward, x: Tensor) -> Tensor:
        y = x * 2
        y.add_(x.double() / 3)
        return y

    result = check(through_a_view, 3)
    assert ["may be a view of another value" in why for _, why in kept(result)] == [True]
    assert calls(result, aten.add_.Tensor)
    result = check(seen_through_a_view, 3)
    assert [bool(re.search(r"and (slice|select)(_\d)? may see it$", why)) for _, why in kept(result)] == [True]
    result = check(rounds, 3)
    assert [why for _, why in kept(result)] == [
        "aten.add_.Tensor casts to its operand's type or shape, which aten.add.Tensor would not"
    ]
    assert calls(check(casts, 3), aten.mul.Tensor)


def test_native_dropout() -> None:
    program = tiny_mlp_program()
    (dropout,) = calls(program, aten.dropout.default)
    with program.graph.inserting_before(dropout):
        native = program.graph.call_function(aten.native_dropout.default, (*dropout.args[:2], True))
        first = program.graph.call_function(operator.getitem, (native, 0))
    dropout.replace_all_uses_with(first)
    program.graph.erase_node(dropout)
    program.recompile()
    result = canonical(program)
    (dropout,) = calls(result, aten.dropout.default)
    assert dropout.args[1:] == (0.1, True) and not calls(result, aten.native_dropout.default)
    assert ("native_dropout_default", "native_dropout -> dropout") in changes(result)
    result.eval()
    assert dropout.args[2] is False


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.masked_fill_.Scalar, aten.masked_fill.Scalar),
        (aten.alpha_dropout_.default, aten.alpha_dropout.default),
        (aten.add.Tensor, None),
        (aten.__and__.Tensor, None),
    ],
)
def test_functional_variants(target: Any, expected: Any) -> None:
    assert functional_variant(target) is expected
