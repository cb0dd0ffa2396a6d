import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.checkpoint import save
from prequant.passes import (
    AllocateBits,
    ExampleBatches,
    PassError,
    PassTextError,
    Pipeline,
    Program,
    QuantizeWeights,
    SplitOutliers,
    lower,
    weight_sites,
    weights,
)
from prequant.runtime import PrequantError
from prequant.trace import trace

from .support import embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp, tiny_mlp_program

GROUPS: dict[str, Any] = {"granularity": "group", "group_size": 8}
BATCHES = ExampleBatches([mlp_inputs(), mlp_inputs(4, 2)])


def widths(program: Program) -> dict[str, int]:
    return {change.what: change.figures["bits"] for change in program.reports[-1].changes}


def stored(program: Program) -> int:
    return sum(view.bytes for view in weights(program))


def squares(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def weight_ratio(program: Program, name: str, bits: int) -> float:
    (site,) = [site for site in weight_sites(program) if site.name == name]
    quantized = QuantizeWeights(bits=bits)(program)
    (close,) = [site for site in weight_sites(quantized) if site.name == name]
    return squares(site.value() - close.value()) / squares(site.value())


def output_ratio(model: nn.Module, program: Program) -> float:
    """Noise over signal of the logits over both batches, by the eager model."""
    exact = [model(**batch)["logits"] for batch in BATCHES.batches]
    close = [program(**batch)["logits"] for batch in BATCHES.batches]
    noise = sum(squares(a - b) for a, b in zip(exact, close, strict=True))
    return noise / sum(map(squares, exact))


# ---- the choice


@pytest.mark.parametrize("bits", [2.0, 3.7, 4.5, 5.2, 7.9])
def test_the_best_of_all_choices_by_the_noise_of_weights(bits: float) -> None:
    program = tiny_mlp_program()
    rows, numbers = {"first.weight": 16, "second.weight": 4}, {"first.weight": 128, "second.weight": 64}
    budget = int(192 * bits / 8) + 80  # 20 scales
    ratios = {name: {b: weight_ratio(program, name, b) for b in (2, 3, 4, 8)} for name in rows}
    best = min(
        (
            dict(zip(rows, chosen, strict=True))
            for chosen in itertools.product((2, 3, 4, 8), repeat=2)
            if sum(numbers[n] * b // 8 + 4 * rows[n] for n, b in zip(rows, chosen, strict=True)) <= budget
        ),
        key=lambda chosen: sum(ratios[name][b] for name, b in chosen.items()),
    )
    made = AllocateBits(budget_bytes=budget, widths=(8, 2, 4, 3))(program)
    assert widths(made) == best
    totals = made.reports[-1].totals
    assert totals["bytes"] == stored(made) <= totals["budget"] == budget
    predicted = sum(ratios[name][b] for name, b in best.items())
    assert totals["predicted_sqnr"] == pytest.approx(-10 * math.log10(predicted))
    assert totals["sensitivity"] == "weight" and "measured_sqnr" not in totals


def test_the_best_of_all_choices_by_the_noise_of_outputs() -> None:
    program, model = tiny_mlp_program(), tiny_mlp()
    ratios = {
        (name, bits): output_ratio(model, QuantizeWeights(bits=bits, include=(name,))(program))
        for name in ("first.weight", "second.weight")
        for bits in (2, 4, 8)
    }
    made = AllocateBits(mean_bits=6.5, widths=(2, 4, 8), batches=BATCHES)(program)
    budget = int(6.5 * 192 / 8)
    best = min(
        (
            chosen
            for chosen in itertools.product((2, 4, 8), repeat=2)
            if 16 * chosen[0] + 64 + 8 * chosen[1] + 16 <= budget
        ),
        key=lambda chosen: ratios["first.weight", chosen[0]] + ratios["second.weight", chosen[1]],
    )
    assert tuple(widths(made).values()) == best
    figures = {change.what: change.figures for change in made.reports[-1].changes}
    for (name, chosen), neighbours in zip(widths(made).items(), ({2: 4, 4: 8}, {2: 4, 4: 8}), strict=True):
        assert figures[name]["alone"] == pytest.approx(-10 * math.log10(ratios[name, chosen]), abs=1e-3)
        if chosen in neighbours:
            total = sum(ratios[n, b] for n, b in widths(made).items())
            wider = total - ratios[name, chosen] + ratios[name, neighbours[chosen]]
            assert figures[name]["wider"] == pytest.approx(10 * math.log10(total / wider), abs=1e-3)
    totals = made.reports[-1].totals
    assert totals["sensitivity"] == "output"
    assert totals["measured_sqnr"] == pytest.approx(-10 * math.log10(output_ratio(model, made)), abs=1e-3)


def test_the_fisher_information_is_that_of_the_results() -> None:
    """Of one linear, ``y = W x``: ``d y_i / d W_ij = x_j``, so that ``F_ij`` is the sum of ``x_j^2``."""
    from prequant.passes import sensitivity
    from prequant.passes.sensitivity import Candidate, fisher_noise

    model = nn.Linear(8, 4, bias=False).eval()
    program = trace(model, {"input": torch.randn(2, 8)})
    inputs = torch.randn(400, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)
    (site,), (close,) = weight_sites(program), weight_sites(QuantizeWeights(bits=2)(program))
    batches = ExampleBatches([{"input": inputs[:200]}, {"input": inputs[200:]}])
    ((found,),) = fisher_noise(program, batches, [site], [[Candidate(2, close)]], progress=False)
    change = (site.value() - close.value()).detach().double()
    exact = float((change.square() * inputs.double().square().sum(0)).sum()) / squares(model(inputs))
    # A mean of squares of normal numbers: its relative error is sqrt(2 / (32 weights * probes * 2 batches)) or so.
    assert found == pytest.approx(exact, rel=5 * (2 / (32 * sensitivity.PROBES * 2)) ** 0.5)


@pytest.mark.parametrize("sensitivity", ["weight", "fisher", "output"])
def test_a_sensitive_weight_gets_more_bits(sensitivity: Any) -> None:
    """The first linear's results are multiplied by almost nothing, before a bias that is added to them."""
    model = tiny_mlp()
    with torch.no_grad():
        model.second.weight.copy_(torch.randn(4, 16, generator=torch.Generator().manual_seed(3)))
        model.first.weight.mul_(1e-3)
        model.first.bias.fill_(1.0)
    program = tiny_mlp_program(model)
    made = AllocateBits(mean_bits=9, sensitivity=sensitivity, batches=BATCHES)(program)
    assert (widths(made) == {"first.weight": 4, "second.weight": 8}) is (sensitivity != "weight")
    assert made.reports[-1].totals["sensitivity"] == sensitivity


class Equals(nn.Module):
    """Linears with the very same weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.linears = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
        weight = torch.randn(16, 16, generator=generator)
        for linear in self.linears:
            linear.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.linears])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_equal_weights_have_equal_widths_where_the_budget_is_just_that(bits: int) -> None:
    program = trace(Equals().eval(), {"x": torch.randn(2, 16)})
    uniform = QuantizeWeights(bits=bits, **GROUPS)(program)
    for goal in ({"budget_bytes": stored(uniform)}, {"mean_bits": float(bits + 4)}):
        made = AllocateBits(**goal, **GROUPS)(program)
        assert set(widths(made).values()) == {bits}
        assert made.reports[-1].totals["uniform_bits"] == bits
        for name, value in uniform.state_dict().items():
            assert torch.equal(made.state_dict()[name], value)


# ---- the budget


@pytest.mark.parametrize("options", [{}, GROUPS, {"granularity": "tensor"}, {"symmetric": False}], ids=str)
def test_the_budget_holds_on_disk(options: dict[str, Any], tmp_path: Path) -> None:
    program = Pipeline([SplitOutliers(ratio=0.05)])(tiny_mlp_program())
    outliers = sum(view.bytes for view in weights(program)) - 192 * 4
    for budget in (outliers + 150, outliers + 260):
        if options == {"symmetric": False} and budget == outliers + 150:
            budget += 60
        made = AllocateBits(budget_bytes=budget, **{**options})(program)
        assert stored(made) <= budget
        folder = save(lower(made), tmp_path / f"{budget}")
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys() if "bias" not in name}  # noqa: SIM118
        assert sum(sizes.values()) == made.reports[-1].totals["bytes"] <= budget


def test_a_budget_below_the_least_names_both_numbers() -> None:
    # 2 bits of 128 + 64 weights are 48 bytes, 20 scales 80.
    with pytest.raises(PassError, match=r"budget_bytes=127 is below the least possible: 128 bytes, with 2-bit codes"):
        AllocateBits(budget_bytes=127)(tiny_mlp_program())
    with pytest.raises(PassError, match=r"mean_bits=5 is below the least possible: 5\.3334 bits a weight"):
        AllocateBits(mean_bits=5)(tiny_mlp_program())
    assert stored(AllocateBits(budget_bytes=128)(tiny_mlp_program())) == 128
    assert stored(AllocateBits(mean_bits=5.3334)(tiny_mlp_program())) == 128


def test_more_than_all_can_use() -> None:
    assert set(widths(AllocateBits(budget_bytes=10**9)(tiny_mlp_program())).values()) == {8}


# ---- the target


@pytest.mark.parametrize("target", [8.0, 15.0, 30.0])
def test_a_predicted_target_is_reached_with_the_fewest_bytes(target: float) -> None:
    program = tiny_mlp_program()
    made = AllocateBits(target_sqnr=target)(program)
    found = {name: weight_ratio(program, name, bits) for name, bits in widths(made).items()}
    assert -10 * math.log10(sum(found.values())) >= target
    size = stored(made)
    ratios = {name: {b: weight_ratio(program, name, b) for b in (2, 3, 4, 5, 6, 8)} for name in found}
    for first, second in itertools.product((2, 3, 4, 5, 6, 8), repeat=2):
        if 16 * first + 64 + 8 * second + 16 < size:
            ratio = ratios["first.weight"][first] + ratios["second.weight"][second]
            assert -10 * math.log10(ratio) < target


@pytest.mark.parametrize("sensitivity", ["weight", "output"])
@pytest.mark.parametrize("target", [10.0, 25.0])
def test_a_measured_target_is_reached(target: float, sensitivity: Any) -> None:
    made = AllocateBits(target_sqnr=target, batches=BATCHES, sensitivity=sensitivity)(tiny_mlp_program())
    measured = -10 * math.log10(output_ratio(tiny_mlp(), made))
    assert measured >= target - 1e-6
    assert made.reports[-1].totals["measured_sqnr"] == pytest.approx(measured, abs=1e-3)


@pytest.mark.parametrize("batches", [None, BATCHES])
def test_a_target_that_nothing_reaches(batches: Any) -> None:
    with pytest.raises(PassError, match=r"target_sqnr=90 can't be reached: .* leaves \d\d\.\d\d dB, .* up to 8 bits"):
        AllocateBits(target_sqnr=90, batches=batches)(tiny_mlp_program())


# ---- with the rest of a program


def test_scopes_and_what_is_codes_already() -> None:
    first = QuantizeWeights(bits=3, include=("first",))(tiny_mlp_program())
    made = AllocateBits(mean_bits=6)(first)
    assert widths(made) == {"second.weight": 4}
    assert [(item.what, item.why) for item in made.reports[-1].kept] == [("first.weight", "already affine3:row")]
    scoped = AllocateBits(mean_bits=6, exclude=("first",))(tiny_mlp_program())
    assert widths(scoped) == {"second.weight": 4}
    assert [site.format for site in weight_sites(scoped)] == ["float32", "affine4:row"]
    again = AllocateBits(mean_bits=6)(made)
    assert not again.reports[-1].changes and len(again.reports[-1].kept) == 2


def test_a_tied_matrix_has_one_width_and_runs_lowered() -> None:
    batches = ExampleBatches([embedding_inputs()])
    program = Pipeline([AllocateBits(mean_bits=9, batches=batches)])(tiny_embedding_program())
    assert list(widths(program)) == ["tokens.weight", "mix.weight"]
    packed = lower(program)
    assert torch.equal(packed(**embedding_inputs())["logits"], program(**embedding_inputs())["logits"])


def test_the_codes_are_those_of_quantize_weights_and_the_input_stays() -> None:
    program = SplitOutliers(ratio=0.1)(tiny_mlp_program())
    before = {name: value.clone() for name, value in program.state_dict().items()}
    made = AllocateBits(mean_bits=20, batches=BATCHES)(program)
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    for name, bits in widths(made).items():
        alone = QuantizeWeights(bits=bits, include=(name,))(program)
        for part in ("codes", "scale", "outliers.values"):
            assert torch.equal(made.tensor(f"{name}.{part}"), alone.tensor(f"{name}.{part}"))


def test_text_form() -> None:
    text = (
        "allocate-bits{mean_bits=3.5,widths=[2,4,8],granularity=group,group_size=64,symmetric=false,strategy=minmax,"
        "exclude=[head]}"
    )
    (pass_,) = Pipeline.parse(text).passes
    assert str(pass_) == text
    assert isinstance(pass_, AllocateBits) and pass_.widths == (2, 4, 8) and pass_.measure == "weight"
    for goal in ("budget_bytes=1000", "target_sqnr=20.0"):
        assert str(Pipeline.parse(f"allocate-bits{{{goal}}}")) == f"allocate-bits{{{goal}}}"
    with pytest.raises(PassTextError, match="'batches' of pass 'allocate-bits' has no text form"):
        str(AllocateBits(mean_bits=4, batches=BATCHES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of budget_bytes, mean_bits, target_sqnr; there is none of them"),
        ({"budget_bytes": 5, "target_sqnr": 3.0}, "there is budget_bytes=5 and target_sqnr=3.0"),
        ({"mean_bits": -1.0}, "mean_bits=-1.0 is not a positive number"),
        ({"target_sqnr": math.inf}, "target_sqnr=inf is not"),
        ({"mean_bits": 4.0, "widths": ()}, r"widths=\[\]: expected"),
        ({"mean_bits": 4.0, "widths": (4, 4)}, r"widths=\[4, 4\]: expected"),
        ({"mean_bits": 4.0, "widths": (1, 4)}, r"widths=\[1, 4\]: expected"),
        ({"mean_bits": 4.0, "widths": (4, 9)}, "bits=9"),
        ({"mean_bits": 4.0, "granularity": "group"}, "group_size=0"),
        ({"mean_bits": 4.0, "strategy": "median"}, "'median' is unknown"),
        ({"mean_bits": 4.0, "sensitivity": "hessian"}, "'hessian' is not one of"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        AllocateBits(**options)


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(PassError, match="sensitivity=output takes example batches, and there are none"):
        AllocateBits(mean_bits=6, sensitivity="output")(tiny_mlp_program())
    with pytest.raises(PrequantError, match="there is no batch"):
        ExampleBatches([])
    with pytest.raises(PassError, match=r"batch 1: unexpected input 'y'"):
        AllocateBits(mean_bits=6, batches=ExampleBatches([mlp_inputs(), {"y": torch.ones(2)}]))(tiny_mlp_program())


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(PassError, match=r"needs scipy: pip install 'prequant\[allocate\]'"):
        AllocateBits(mean_bits=6)(tiny_mlp_program())
