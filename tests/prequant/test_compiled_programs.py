"""Programs through ``torch.compile``: one graph for all lengths, the same results, the plan where there is one."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from prequant.passes import Canonicalize, Pipeline, Program, QuantizeActivations, QuantizeWeights, SplitOutliers, lower
from prequant.runtime import PrequantError
from prequant.trace import trace

from ..models import FAMILIES, VOCABULARY, traced

LENGTHS = (5, 9, 7, 12, 3, 16)
KINDS = ("traced", "simulated", "latent", "lowered")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def program_of(name: str, kind: str) -> Program:
    """With tensors of its own, to be trained and written to."""
    program = copy.deepcopy(traced(name))
    if kind == "traced":
        return program
    if kind == "latent":
        passes = [Canonicalize(), QuantizeWeights(bits=4, latent=True), QuantizeActivations(bits=8)]
        return Pipeline(passes)(program)
    simulated = Pipeline([Canonicalize(), SplitOutliers(ratio=0.01), QuantizeWeights(bits=4)])(program)
    return simulated if kind == "simulated" else lower(simulated)


def compiled(program: Any, backend: Any) -> Any:
    return torch.compile(program, fullgraph=True, dynamic=True, backend=backend)


def floats(result: Any) -> list[Tensor]:
    return [value for value in result.values() if isinstance(value, Tensor) and value.is_floating_point()]


def with_labels(program: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = inputs.get("decoder_input_ids", inputs["input_ids"])
    of_tokens = program.task in ("causal-lm", "seq2seq-lm", "masked-lm")
    return {**inputs, "labels": torch.randint(VOCABULARY, ids.shape) if of_tokens else torch.arange(len(ids)) % 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2-causal-lm", "t5-seq2seq-lm"])
def test_one_graph_serves_all_lengths(name: str, kind: str) -> None:
    program, counter = program_of(name, kind), CompileCounter()
    ours = compiled(program, counter)
    for length in LENGTHS:
        inputs = FAMILIES[name]().make_inputs(2, length + 2)
        for found, wanted in zip(floats(ours(**inputs)), floats(program(**inputs)), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


class Scaled(nn.Module):
    """A module of the user's own around a Program."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.inner = program

    def forward(self, **inputs: Tensor) -> Tensor:
        return 2 * self.inner(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert-sequence-classification", "gpt2-causal-lm"])
def test_a_compiled_function_that_calls_a_program_gets_the_models_output(name: str, kind: str) -> None:
    program, inputs = program_of(name, kind), FAMILIES[name]().make_inputs(2, 7)
    expected = 2 * program(**inputs).logits
    for caller in (Scaled(program), lambda **given: 2 * program(**given).logits):
        torch.testing.assert_close(compiled(caller, CompileCounter())(**inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert-sequence-classification", "llama-causal-lm"])
def test_training_steps_are_the_same(name: str, kind: str) -> None:
    program, counter = program_of(name, kind).train(), CompileCounter()
    ours = compiled(program, counter)
    for length in LENGTHS:
        inputs = with_labels(program, FAMILIES[name]().make_inputs(2, length))
        losses, gradients = [], []
        for call in (ours, program):
            program.zero_grad()
            torch.manual_seed(length)  # dropout
            loss = call(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append({key: p.grad.clone() for key, p in program.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*losses)
        assert gradients[0].keys() == gradients[1].keys() and gradients[0]
        for key, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-5)
    # The first call of a classifier finds out what its labels are, as the model does.
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["simulated", "lowered"])
def test_inductor_computes_the_same(kind: str) -> None:
    program = program_of("bert-sequence-classification", kind)
    ours, make_inputs = compiled(program, "inductor"), FAMILIES["bert-sequence-classification"]().make_inputs
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 9)):
            inputs = make_inputs(batch, length, padded=True)
            torch.testing.assert_close(ours(**inputs).logits, program(**inputs).logits, rtol=1e-4, atol=1e-5)


# ---- the plan --------------------------------------------------------------------------------------------------------


class Targets:
    """A backend that runs graphs as they are, and keeps what they call."""

    def __init__(self) -> None:
        self.called: set[Any] = set()

    def __call__(self, graph_module: Any, inputs: Any) -> Any:
        self.called |= {node.target for node in graph_module.graph.nodes if node.op == "call_function"}
        return graph_module


PLANNED = torch.ops.prequant.planned_call.default


def test_a_call_without_gradients_is_left_to_the_plan() -> None:
    program, targets = program_of("bert-sequence-classification", "lowered"), Targets()
    inputs = FAMILIES["bert-sequence-classification"]().make_inputs(2, 9)
    ours = compiled(program, targets)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).logits, program(**inputs).logits)
    assert PLANNED in targets.called
    targets.called.clear()
    ours(**inputs)
    assert PLANNED not in targets.called, "its parameters would get no gradient"
    targets.called.clear()
    with torch.no_grad():
        program.train()(**inputs)
        ours(**inputs)
    assert PLANNED not in targets.called


def test_the_plan_sees_weights_that_changed() -> None:
    program = program_of("bert-sequence-classification", "lowered")
    inputs = FAMILIES["bert-sequence-classification"]().make_inputs(2, 9)
    counter = CompileCounterWithBackend("eager")
    ours = compiled(program, counter)
    with torch.no_grad():
        before = ours(**inputs).logits
        program.get_parameter("classifier.bias").add_(1)
        torch.testing.assert_close(ours(**inputs).logits, before + 1)
    assert counter.frame_count == 1


def test_a_compiler_may_write_into_planned_results() -> None:
    """Two results are one tensor in the graph, a third is a view of the input, the last a stored tensor."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.table: Tensor
            self.register_buffer("table", torch.arange(8.0))

        def forward(self, x: Tensor) -> Any:
            y = self.linear(x)
            return y, y, x.reshape(-1, 8), self.table.view(2, 4)

    torch.manual_seed(0)
    program = Pipeline.parse("canonicalize,quantize-weights{bits=8},lower,plan")(
        trace(Several(), (torch.rand(3, 5, 8),))
    )

    def writes(x: Tensor) -> Any:
        first, second, third, table = program(x)
        for result in (first, third, table):
            result.add_(100.0)
        return first, second, third, table

    x = torch.rand(4, 7, 8)
    given = x.clone()
    with torch.no_grad():
        wanted = program.eval()(x)
        found = torch.compile(writes, backend="eager")(x)
        assert torch.equal(x, given) and torch.equal(program.tensor("table"), torch.arange(8.0))
    for result, expected, added in zip(found, wanted, (100, 0, 100, 100), strict=True):
        torch.testing.assert_close(result, expected + added)


def test_modes_are_compiled_once_each() -> None:
    program, counter = program_of("bert-sequence-classification", "lowered"), CompileCounter()
    inputs = FAMILIES["bert-sequence-classification"]().make_inputs(2, 9)
    ours = compiled(program, counter)
    with torch.no_grad():
        for _ in range(3):
            program.train()
            ours(**inputs)
            program.eval()
            assert torch.equal(ours(**inputs).logits, program(**inputs).logits)
    assert counter.frame_count == 2


def test_shapes_of_planned_results_follow_the_inputs() -> None:
    program = program_of("gpt2-causal-lm", "lowered")
    ours, make_inputs = compiled(program, "aot_eager"), FAMILIES["gpt2-causal-lm"]().make_inputs
    with torch.no_grad():
        for batch, length in ((2, 4), (3, 7)):
            inputs = make_inputs(batch, length)
            assert torch.equal(ours(**inputs).logits, program(**inputs).logits)


def test_exported_graphs_have_no_plan_in_them() -> None:
    program = program_of("bert-sequence-classification", "lowered")
    inputs = FAMILIES["bert-sequence-classification"]().make_inputs(2, 9)

    class Caller(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program = program

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.program(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits

    with torch.no_grad():
        exported = torch.export.export(Caller(), (inputs["input_ids"], inputs["attention_mask"]))
    assert PLANNED not in {node.target for node in exported.graph.nodes}


def test_a_program_that_is_gone_says_so() -> None:
    with pytest.raises(PrequantError, match="a Program that is gone"):
        torch.ops.prequant.planned_call("0" * 32, [torch.ones(1)])


def test_any_number_of_programs_can_be_compiled() -> None:
    """Dynamo gives up on a piece of code that it has compiled eight times."""
    original = traced("bert-sequence-classification")
    inputs = FAMILIES["bert-sequence-classification"]().make_inputs(2, 5)
    for _ in range(10):
        copied = original.copy()
        torch.testing.assert_close(compiled(copied, "eager")(**inputs).logits, original(**inputs).logits)


def test_errors_are_those_of_the_program() -> None:
    program = program_of("bert-sequence-classification", "lowered")
    inputs = FAMILIES["bert-sequence-classification"]().make_inputs(2, 5)
    ours = compiled(program, "eager")
    with torch.no_grad():
        ours(**inputs)
        with pytest.raises(IndexError, match=f"ids reach from .* to {VOCABULARY}; the table has"):
            ours(**{**inputs, "input_ids": inputs["input_ids"].index_fill(1, torch.tensor([0]), VOCABULARY)})
