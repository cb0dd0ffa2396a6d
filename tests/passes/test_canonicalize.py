import copy

import pytest
import torch

from prequant.passes import Canonicalize, Pass, Pipeline
from prequant.passes.properties import violation

from ..models import FAMILIES, LAYERS, traced
from .canonical import canonical, changes, kept

aten = torch.ops.aten


def test_its_text_form() -> None:
    assert str(Canonicalize()) == "canonicalize" and isinstance(Canonicalize(), Pass)
    assert Pipeline([Canonicalize()]).passes == (Canonicalize(),)


def test_the_report_counts_nodes() -> None:
    report = canonical(traced("llama-causal-lm")).reports[-1]
    assert report.totals["nodes before"] - report.totals["nodes after"] > 30
    counted = {change.what: change.figures["nodes"] for change in report.changes if "nodes" in change.figures}
    assert counted["_assert_tensor_metadata"] > 5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name: str) -> None:
    model, _, make_inputs = FAMILIES[name]()
    result = canonical(traced(name))
    for batch, length, padded in ((1, 1, False), (3, 11, True)):
        inputs = make_inputs(batch, length, padded)
        with torch.no_grad():
            expected, actual = model(**inputs), result(**inputs)
        for key, value in actual.items():
            # float32 products in another order, through layers whose values are in the tens
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=2e-5, equal_nan=True)
    for item in ("canonical", "no-orphans", "valid-signature"):
        assert violation(item, result) is None
    assert not kept(result) and not changes(canonical(result))
    targets = {str(node.target) for node in result.graph.nodes if node.op == "call_function"}
    assert not any(
        "addmm" in target or "_assert" in target or "_." in target for target in targets - {"aten.__and__.Tensor"}
    )


def test_a_whole_gpt2_is_turned_and_trains_alike() -> None:
    family = FAMILIES["gpt2-causal-lm"]()
    model, make_inputs = copy.deepcopy(family.model), family.make_inputs
    result = canonical(copy.deepcopy(traced("gpt2-causal-lm")))
    assert len(result.info.transposed) == 4 * LAYERS
    inputs = make_inputs(2, 7)
    for each in (result, model):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in result.named_parameters():
        expected = model.get_parameter(name).grad
        assert expected is not None and parameter.grad is not None
        turned = name in result.info.transposed
        torch.testing.assert_close(parameter.grad, expected.t() if turned else expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parameter, model.get_parameter(name).t() if turned else model.get_parameter(name))
