"""The alphas that train: gradients against the formula, the others untouched, and everything together in the end."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.passes import BinaryCode, Freeze, PassError, Pipeline, Program, Train, weights
from prequant.passes.lower import Lower
from prequant.runtime import WeightFormat, reference

from .support import assert_golden, mlp_inputs, tiny_mlp_program

PLANES = 3


def coded(lowered: bool = True, group: int = 0, planes: int = PLANES) -> Program:
    """A Program of two linears, [16, 8] and [4, 16], without a dropout that does anything."""
    code = BinaryCode(bits=planes, group_size=group)
    return Pipeline([code, *([Lower()] if lowered else [])])(tiny_mlp_program())


def trainable(program: Program) -> set[str]:
    return {name for name, value in program.named_parameters() if value.requires_grad}


def loss_of(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    return program(**inputs)["logits"].square().sum()


def test_golden() -> None:
    assert_golden(
        Train(first_alphas=True, mean_alpha_gradients=True, include=("second",))(coded()),
        """
        program(x: f32[batch, length, 8])
          %packed_linear_default = packed_linear<bcq3:row>(%x, first.weight.planes [3×16×1 u8], first.weight.alphas [3×16×1 f32 frozen], bias=first.bias [16 f32 frozen], columns=8)
          %relu = relu(%packed_linear_default)
          %dropout = dropout(%relu, 0.1, False)
          %scale_gradient_default = scale_gradient(second.weight.first_alphas [1×4×1 f32], factor=0.0625)
          %cat_default = cat([%scale_gradient_default, second.weight.other_alphas [2×4×1 f32 frozen]])
          %packed_linear_default_1 = packed_linear<bcq3:row>(%dropout, second.weight.planes [3×4×2 u8], %cat_default, bias=second.bias [4 f32 frozen], columns=16)
          return {logits: %packed_linear_default_1}
        """,  # noqa: E501
    )


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("first", [False, True])
def test_nothing_changes_until_something_trains(lowered: bool, group: int, first: bool) -> None:
    program = coded(lowered, group)
    chosen = Train(first_alphas=first, alphas=not first, mean_alpha_gradients=True)(program)
    assert torch.equal(chosen(**mlp_inputs())["logits"], program(**mlp_inputs())["logits"])
    ending = "first_alphas" if first else "alphas"
    assert trainable(chosen) == {f"{name}.weight.{ending}" for name in ("first", "second")}
    counted = {name: chosen.tensor(name).numel() for name in trainable(chosen)}
    assert chosen.reports[-1].totals["trainable"] == sum(counted.values())
    groups = (1, 1) if not group else (2, 4)
    planes = 1 if first else PLANES
    assert sorted(counted.values()) == sorted(planes * rows * n for rows, n in zip((16, 4), groups, strict=True))


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("mean", [False, True])
def test_gradients_are_the_formulas(lowered: bool, group: int, mean: bool) -> None:
    """d loss / d alpha_1 [row, group] is the sum over tokens of dY * (X B_1^T) of the group; over g, if so wanted."""
    chosen = Train(first_alphas=True, mean_alpha_gradients=mean)(coded(lowered, group))
    inputs = {"x": torch.randn(2, 3, 8)}
    loss_of(chosen, inputs).backward()
    # By hand, from the float weights that the codes stand for.
    views = {view.name: view for view in weights(coded(lowered, group))}
    first, second = (views[f"{name}.weight"].value().requires_grad_() for name in ("first", "second"))
    biases = [chosen.tensor(f"{name}.bias") for name in ("first", "second")]
    hidden = torch.nn.functional.linear(inputs["x"], first, biases[0]).relu()
    torch.nn.functional.linear(hidden, second, biases[1]).square().sum().backward()
    for name, weight in (("first", first), ("second", second)):
        view = views[f"{name}.weight"]
        planes = view.program.tensor(view.tensors["planes"])
        signs = reference.dequantize(
            planes[:1],
            torch.ones_like(view.program.tensor(view.tensors["alphas"])[:1]),
            None,
            WeightFormat.bcq(1, group),
            view.shape[1],
        )
        assert set(signs.unique().tolist()) == {-1.0, 1.0} and weight.grad is not None
        width = group or view.shape[1]
        expected = (weight.grad * signs).unflatten(1, (-1, width)).sum(-1)
        gradient = chosen.tensor(f"{name}.weight.first_alphas").grad
        assert gradient is not None
        torch.testing.assert_close(gradient[0], expected / width if mean else expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_small_steps() -> None:
    chosen = Train(first_alphas=True)(coded()).double()
    inputs = {"x": torch.randn(2, 3, 8, dtype=torch.float64)}
    loss_of(chosen, inputs).backward()
    alphas = chosen.tensor("second.weight.first_alphas")
    gradient, step = alphas.grad, 1e-6
    assert gradient is not None
    for row in range(4):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                alphas[0, row, 0] += sign * step
                losses.append(float(loss_of(chosen, inputs)))
                alphas[0, row, 0] -= sign * step
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient[0, row, 0]), rel=1e-5)


@pytest.mark.parametrize("lowered", [False, True])
def test_weight_decay_and_momentum_reach_no_other_alphas_and_freezing_joins_them(lowered: bool) -> None:
    program = coded(lowered)
    chosen = Train(first_alphas=True, mean_alpha_gradients=True)(program)
    optimizer = torch.optim.AdamW(chosen.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(chosen, mlp_inputs()).backward()
        optimizer.step()
    with torch.no_grad():  # with gradients recorded, a packed weight is unpacked, and sums are rounded otherwise
        trained = chosen(**mlp_inputs())["logits"]
    frozen = Freeze()(chosen)
    assert not trainable(frozen) and frozen.reports[-1].totals["frozen"] == 16 + 4
    assert torch.equal(frozen(**mlp_inputs())["logits"], trained)
    assert frozen.state_dict().keys() == program.state_dict().keys()
    for name in ("first", "second"):
        before, after = (p.tensor(f"{name}.weight.alphas") for p in (program, frozen))
        assert torch.equal(after[1:], before[1:]) and not torch.isclose(after[0], before[0]).any()
        planes = f"{name}.weight.planes"
        assert torch.equal(frozen.tensor(planes), program.tensor(planes))
    # What was learned may be of any size and sign, and is kept as it is.
    negative = Train(first_alphas=True)(program)
    negative.tensor("first.weight.first_alphas").data.neg_()
    assert torch.equal(Freeze()(negative).tensor("first.weight.alphas")[0], -program.tensor("first.weight.alphas")[0])


def test_what_is_frozen_in_part_goes_on_training_elsewhere_as_it_did() -> None:
    chosen = Train(first_alphas=True, mean_alpha_gradients=True)(coded())
    frozen = Freeze(include=("first",))(chosen)
    assert trainable(frozen) == {"second.weight.first_alphas"} and frozen.reports[-1].totals["frozen"] == 16
    loss_of(frozen, mlp_inputs()).backward()
    loss_of(chosen, mlp_inputs()).backward()
    ours, theirs = (p.tensor("second.weight.first_alphas").grad for p in (frozen, chosen))
    assert ours is not None and theirs is not None
    torch.testing.assert_close(ours, theirs)
    assert not trainable(Freeze()(frozen))


def test_training_may_begin_again_otherwise() -> None:
    program = Train(first_alphas=True, mean_alpha_gradients=True)(coded())
    again = Train(alphas=True)(copy.deepcopy(program))
    assert trainable(again) == {"first.weight.alphas", "second.weight.alphas"}
    assert not [n for n in again.graph.nodes if "scale_gradient" in n.name or "cat" in n.name]
    one = Train(first_alphas=True)(coded(planes=1))
    assert trainable(one) == {"first.weight.alphas", "second.weight.alphas"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": True, "first_alphas": True}, "choose one of alphas and first_alphas"),
        ({"biases": True, "mean_alpha_gradients": True}, "mean_alpha_gradients goes with alphas or first_alphas"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Train(**options)
