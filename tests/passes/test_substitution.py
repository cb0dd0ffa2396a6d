"""Runs with other weights in some places, against Programs that were rewritten to have them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prequant.passes import (
    Canonicalize,
    ExampleBatches,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    lower,
    weight_sites,
    weights,
)
from prequant.passes.output_noise import OutputNoise, decibels, float_results, ratio_of
from prequant.passes.substitution import Change, Substitution, forms_of
from prequant.runtime import PrequantError

from ..models import FAMILIES, traced
from .support import embedding_inputs, mlp_inputs, tiny_embedding_program, tiny_mlp_program

FAMILY = "bert-sequence-classification"


def logits(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = program(**inputs)["logits"]
    return found


def run(substitution: Substitution, inputs: dict[str, Tensor], change: Change) -> Tensor:
    with torch.no_grad():
        flat = substitution.results(substitution.program.bind((), inputs), change)
    found: Tensor = flat[0]
    return found


@pytest.mark.parametrize("name", ["tokens.weight", "mix.weight"])
def test_a_weight_is_another_wherever_it_is_read(name: str) -> None:
    program, inputs = tiny_embedding_program(), embedding_inputs()
    quantized = QuantizeWeights(bits=2, include=(name,))(program)
    (site,) = [site for site in weight_sites(quantized) if site.name == name]
    found = run(Substitution(program), inputs, Change(weights={name: site.value}))
    assert torch.equal(found, logits(quantized, inputs))
    assert not torch.equal(found, logits(program, inputs))


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("inputs_too", [False, True])
def test_one_weight_is_restored(lowered: bool, inputs_too: bool) -> None:
    """Of a model whose linears are fused with what follows, or with each other, where it is lowered."""
    program = Canonicalize()(traced(FAMILY))
    inputs = FAMILIES[FAMILY]().make_inputs(3, 7)
    names = [site.name for site in weight_sites(program)]

    def compressed(exclude: tuple[str, ...]) -> Program:
        steps: list[Any] = [SplitOutliers(ratio=0.02, exclude=exclude), QuantizeWeights(bits=3, exclude=exclude)]
        if inputs_too:
            linears = {s.name for s in weight_sites(program) if s.kind == "linear"}
            steps.append(QuantizeActivations(exclude=tuple(name for name in exclude if name in linears)))
        made = Pipeline(steps)(program)
        return lower(made) if lowered else made

    substitution, original = Substitution(compressed(())), Substitution(program)
    originals = {view.name: forms_of(view) for view in weights(original.program)}
    changes = []
    for view in weights(substitution.program):
        forms = dict(zip(forms_of(view), originals[view.name].values(), strict=True))
        changes.append(Change(forms=forms))
        expected = logits(compressed((view.name,)), inputs)
        found = run(substitution, inputs, changes[-1])
        assert torch.allclose(found, expected, atol=2e-5 * float(expected.abs().max())), view.name
        assert not torch.allclose(found, logits(substitution.program, inputs), atol=1e-4)
    assert len(changes) == len(names) > 8
    # Runs that begin where the change is give what whole runs give.
    with torch.no_grad():
        each = dict(substitution.each(substitution.program.bind((), inputs), changes))
    assert sorted(each) == list(range(len(changes)))
    for number, change in enumerate(changes):
        assert torch.equal(each[number][0], run(substitution, inputs, change))


def test_one_weight_is_compressed() -> None:
    program = Canonicalize()(traced(FAMILY))
    inputs = FAMILIES[FAMILY]().make_inputs(2, 6)
    packed = lower(Pipeline([QuantizeWeights(bits=3), QuantizeActivations(bits=5)])(program))
    original, close = Substitution(program), Substitution(packed)
    forms = {view.name: forms_of(view) for view in weights(close.program)}
    for view in weights(original.program):
        change = Change(forms=dict(zip(forms_of(view), forms[view.name].values(), strict=True)))
        steps: list[Any] = [QuantizeWeights(bits=3, include=(view.name,))]
        if view.kind == "linear":
            steps.append(QuantizeActivations(bits=5, include=(view.name,)))
        expected = logits(Pipeline(steps)(program), inputs)
        assert torch.allclose(run(original, inputs, change), expected, atol=1e-5), view.name


def test_what_consumers_would_give_is_shown_with_the_inputs_they_have() -> None:
    program, inputs = tiny_mlp_program(), mlp_inputs()
    quantized = QuantizeWeights(bits=2)(program)
    seen: list[tuple[Tensor, Tensor]] = []
    substitution = Substitution(program)
    forms = [form for view in weights(quantized) for form in forms_of(view).values()]
    with torch.no_grad():
        substitution.results(
            program.bind((), inputs), watch=lambda node, value, result: seen.append((value, result(forms[len(seen)])))
        )
    hidden = torch.relu(inputs["x"] @ program.tensor("first.weight").T + program.tensor("first.bias"))
    close = weight_sites(quantized)[1].value()
    assert torch.allclose(seen[1][0], hidden @ program.tensor("second.weight").T + program.tensor("second.bias"))
    assert torch.allclose(seen[1][1], hidden @ close.T + program.tensor("second.bias"))


def test_it_runs_in_eval_mode_and_leaves_the_program_alone() -> None:
    program = tiny_mlp_program()
    program.train()
    expected = logits(tiny_mlp_program(), mlp_inputs())
    assert torch.equal(run(Substitution(program), mlp_inputs(), Change()), expected)
    assert program.training and any(
        node.args[2] for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    )


# ---- noise


def test_noise_is_energy_over_energy_and_results_count_alike() -> None:
    noise = OutputNoise()
    noise.add(
        {"a": torch.tensor([3.0]), "b": torch.tensor([100.0])}, {"a": torch.tensor([2.0]), "b": torch.tensor([90.0])}
    )
    noise.add(
        {"a": torch.tensor([4.0]), "b": torch.tensor([0.0])}, {"a": torch.tensor([4.0]), "b": torch.tensor([0.0])}
    )
    assert noise.ratio == pytest.approx((1 / 25 + 100 / 10000) / 2)
    assert ratio_of(noise.sqnr) == pytest.approx(noise.ratio)
    assert decibels(0.0) == torch.inf and decibels(torch.inf) == -torch.inf and decibels(0.01) == pytest.approx(20)


def test_results_that_can_not_be_compared() -> None:
    with pytest.raises(PrequantError, match=r"can't be compared: they were \{'a': \[2\]\} and are \{'a': \[3\]\}"):
        OutputNoise().add({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    with pytest.raises(PrequantError, match="returns no float tensor"):
        float_results(tiny_mlp_program(), (torch.zeros(1, dtype=torch.int64),))


def test_batches_are_bound_to_a_program() -> None:
    program = tiny_mlp_program()
    (flat,) = ExampleBatches([mlp_inputs()]).bound(program)
    assert torch.equal(flat[0], mlp_inputs()["x"])
    with pytest.raises(PrequantError, match=r"batch 0 is a list, not a mapping"):
        list(ExampleBatches([[1]]).bound(program))  # type: ignore[list-item]
    with pytest.raises(PrequantError, match=r"batch 0: the input 'x' has the shape \[1, 2, 9\]"):
        list(ExampleBatches([{"x": torch.zeros(1, 2, 9)}]).bound(program))
