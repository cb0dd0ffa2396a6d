import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prequant.passes import WeightSite, weight_sites
from prequant.trace import trace

from .canonical import calls, canonical, changes, check, kept, named_sizes
from .support import assert_golden

aten = torch.ops.aten


class Projection(nn.Module):
    """GPT-2's way of writing a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(6, 4)
        self.drop = nn.Dropout(0.1)
        with torch.no_grad():
            self.up.weight.copy_(torch.arange(24.0).view(4, 6))
            self.up.bias.copy_(torch.arange(6.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.drop(self.up(x))}


def test_conv1d_becomes_linear() -> None:
    module = Projection().eval()
    program = trace(module, {"x": torch.randn(1, 2, 4)}, dynamic_axes={"x": {0: "batch", 1: "length"}})
    assert_golden(
        named_sizes(program),
        """
        program(x: f32[batch, length, 4])
          %size_0 = sym_size.int(%x, 0)
          %size_1 = sym_size.int(%x, 1)
          %view = view(%x, [-1, 4])
          %addmm = addmm(up.bias [6 f32], %view, up.weight [4×6 f32])
          %view_1 = view(%addmm, [%size_0, %size_1, 6])
          %dropout = dropout(%view_1, 0.1, False)
          return {y: %dropout}
        """,
    )
    result = canonical(program)
    assert_golden(
        result,
        """
        program(x: f32[batch, length, 4])
          %linear = linear(%x, up.weight [6×4 f32], up.bias [6 f32])
          %dropout = dropout(%linear, 0.1, False)
          return {y: %dropout}
        """,
    )
    weight = result.tensor("up.weight")
    assert isinstance(weight, nn.Parameter) and weight.is_contiguous() and weight.requires_grad
    assert torch.equal(weight, torch.arange(24.0).view(4, 6).t())
    assert result.info.transposed == ("up.weight",)
    assert ("up.weight", "addmm -> linear, stored as [out, in]") in changes(result)
    (linear,) = calls(result, aten.linear.default)
    assert linear.meta["module_stack"][-1] == ("up", "Conv1D")
    assert linear.meta["val"].shape[-1] == 6 and linear.meta["val"].dim() == 3
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(result(x)["y"], module(x)["y"])

    assert program.tensor("up.weight") is not weight and program.tensor("up.weight").shape == (4, 6)
    assert program.info.transposed == (), "the Program that a pass is given stays as it is"
    torch.testing.assert_close(program(x)["y"], module(x)["y"])


@pytest.mark.parametrize(
    ("function", "shape", "how"),
    [
        (lambda self, x: x @ self.w, (4,), "mm|matmul"),
        (lambda self, x: x @ self.w, (5, 4), "matmul"),
        (lambda self, x: torch.mm(x, self.w), (4,), "mm"),
        (lambda self, x: torch.addmm(self.bias, x, self.w), (4,), "addmm"),
        (lambda self, x: torch.addmm(self.bias, x, self.w, beta=0.5, alpha=3.0), (4,), "addmm"),
        (lambda self, x: torch.addmm(self.bias.expand(x.shape[0], 3), x, self.w), (4,), "addmm"),
        (lambda self, x: nn.functional.linear(x, self.w.t(), self.bias), (5, 4), "linear with a transposed weight"),
        (lambda self, x: x @ self.w + torch.relu(x) @ self.w, (5, 4), "matmul"),
    ],
)
def test_products_with_an_in_out_weight(function: Any, shape: tuple[int, ...], how: str) -> None:
    result = check(function, *shape, atol=1e-5)
    assert result.info.transposed == ("w",) and result.tensor("w").shape == (3, 4)
    lines = [line for what, line in changes(result) if what == "w"]
    assert lines and all(re.fullmatch(f"({how}) -> linear, stored as \\[out, in\\]", line) for line in lines)
    assert all(node.args[1].target == "w" for node in calls(result, aten.linear.default))
    assert not calls(result, aten.t.default)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda self, x: x @ self.v.t(), (4,)),
        (lambda self, x: x @ self.v.T, (5, 4)),
        (lambda self, x: x @ self.v.transpose(-1, 0), (5, 4)),
        (lambda self, x: x @ self.v.permute(1, 0), (5, 4)),
        (lambda self, x: torch.addmm(self.bias, x, self.v.t()), (4,)),
    ],
)
def test_products_with_a_transposed_weight(function: Any, shape: tuple[int, ...]) -> None:
    result = check(function, *shape)
    assert result.info.transposed == () and result.tensor("v").shape == (3, 4)
    (linear,) = calls(result, aten.linear.default)
    assert linear.args[1].target == "v"
    assert [site.name for site in weight_sites(result)] == ["v"]


@pytest.mark.parametrize(
    ("function", "reader"),
    [
        (lambda self, x: x @ self.w + self.w.sum(), "sum_1"),
        (lambda self, x: (x @ self.w) @ self.w.t(), "linear"),
        (lambda self, x: nn.functional.linear(x @ self.w, self.w), "linear"),
    ],
)
def test_a_weight_that_is_read_both_ways_stays_as_it_is(function: Any, reader: str) -> None:
    result = check(function, 4, atol=1e-5)
    assert result.info.transposed == () and result.tensor("w").shape == (4, 3)
    ((what, why),) = kept(result)
    assert what == "w" and re.fullmatch(r"(mm|matmul) can't become linear: \w+ reads w as it is stored", why)
    assert reader in why or reader == "linear"


def test_views_stay_where_the_outer_one_does_not_undo_the_inner_one() -> None:
    def merges(self: Any, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, 4), self.w)
        return flat.view(x.shape[0], -1)

    def splits(self: Any, x: Tensor) -> Tensor:
        flat = torch.mm(x.view(-1, 4), self.w)
        return flat.view(x.shape[0], x.shape[1], 3, 1)

    for function in (merges, splits):
        result = check(function, 5, 4, atol=1e-5)
        assert len(calls(result, aten.view.default)) == 2 and len(calls(result, aten.linear.default)) == 1


def test_products_without_a_stored_weight_are_left_alone() -> None:
    for function, shape in (
        (lambda self, x: x @ x.transpose(1, 2), (5, 4)),
        (lambda self, x: self.v @ x.transpose(1, 2), (5, 4)),
        (lambda self, x: x @ self.table, (5, 4)),
        (lambda self, x: x @ torch.softmax(self.w, 0), (5, 4)),
    ):
        result = check(function, *shape)
        assert not calls(result, aten.linear.default) and not kept(result)


def test_a_tied_weight_is_transposed_for_all_its_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv1D(4, 4), Conv1D(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    module = Twice().eval()
    result = canonical(trace(module, torch.randn(2, 3, 4)))
    assert result.info.transposed == ("first.weight",)
    assert result.info.aliases == {"first.weight": ("second.weight",)}
    (site,) = weight_sites(result)
    assert isinstance(site, WeightSite) and len(site.consumers) == 2
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(result(x), module(x))


def test_frozen_weights_stay_frozen() -> None:
    module = Projection().eval().requires_grad_(False)
    result = canonical(trace(module, torch.randn(1, 2, 4)))
    assert not any(parameter.requires_grad for parameter in result.parameters())
