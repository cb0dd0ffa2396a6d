import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.checkpoint import load, save
from prequant.generation import with_cache
from prequant.model import ModelProgram
from prequant.passes import (
    Canonicalize,
    ExposeOutputs,
    Freeze,
    HideOutputs,
    PassError,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Verify,
    lower,
    readable,
)
from prequant.trace import trace

from ..models import FAMILIES, random_inputs, traced
from .support import assert_golden, mlp_inputs, tiny_mlp_program
from .test_attention_scores import BARE, exposed, model_of, program_of

aten = torch.ops.aten
BLOCKS = {
    "Bert": "encoder.layer",
    "Roberta": "encoder.layer",
    "DistilBert": "transformer.layer",
    "Electra": "encoder.layer",
    "Albert": "encoder.albert_layer_groups",
    "MPNet": "encoder.layer",
    "GPT2": "transformer.h",
    "OPT": "model.decoder.layers",
    "Llama": "model.layers",
    "Qwen2": "model.layers",
}
"""Where the models of HEADS have their blocks."""


# ---- golden


def test_golden() -> None:
    assert_golden(
        ExposeOutputs(include=("first", "relu"))(tiny_mlp_program()),
        """
        program(x: f32[batch, length, 8])
          %linear = linear(%x, first.weight [16×8 f32], first.bias [16 f32])
          %relu = relu(%linear)
          %dropout = dropout(%relu, 0.1, False)
          %linear_1 = linear(%dropout, second.weight [4×16 f32], second.bias [4 f32])
          return {logits: %linear_1}
          expose %linear as first
          expose %relu as relu
        """,
    )


# ---- hidden states, against transformers


@pytest.mark.parametrize("prefix", BARE)
def test_hidden_states_are_those_of_transformers(prefix: str) -> None:
    model, inputs = model_of(prefix), random_inputs(model_of(prefix), 3, 9, padded=True)
    found = exposed(program_of(prefix), inputs)
    leaving: list[Tensor] = []
    blocks = model.get_submodule(BLOCKS[prefix])
    hooks = [
        block.register_forward_hook(lambda _, __, out: leaving.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    names = [name for name in found if name.startswith("hidden_states")]
    assert names == [f"hidden_states.{number}" for number in range(len(expected))]
    # The last of transformers is behind the final norm of the models that have one; what leaves the block is ours.
    for name, value in zip(names, (*expected[:-1], leaving[-1]), strict=True):
        assert torch.allclose(found[name], value, atol=1e-5), name


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("t5-seq")])
def test_every_family_has_them(name: str) -> None:
    family, program = FAMILIES[name](), ExposeOutputs(hidden_states=True)(traced(name))
    inputs = family.make_inputs(2, 7)
    with torch.no_grad():
        expected = family.model(**inputs, output_hidden_states=True).hidden_states[:-1]
    found = exposed(program, inputs)
    assert list(found) == [f"hidden_states.{number}" for number in range(len(expected) + 1)]
    assert all(torch.allclose(found[f"hidden_states.{i}"], value, atol=1e-5) for i, value in enumerate(expected))


def test_an_encoder_and_a_decoder_have_their_own() -> None:
    model = model_of("T5")
    inputs = random_inputs(model, 3, 9, padded=True)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
    found = exposed(program_of("T5"), inputs)
    for part in ("encoder", "decoder"):
        states = expected[f"{part}_hidden_states"]
        names = [name for name in found if name.startswith(f"{part}_hidden_states")]
        assert names == [f"{part}_hidden_states.{number}" for number in range(len(states))]
        for name, value in zip(names, states[:-1], strict=False):
            assert torch.allclose(found[name], value, atol=1e-5), name


# ---- other values


def test_modules_and_nodes_by_pattern() -> None:
    program = traced("bert-masked-lm")
    attention = "bert.encoder.layer.0.attention"
    patterns = (attention, "type:BertSelfOutput", "linear_3", lambda node: node.target is aten.gelu.default)
    found = ExposeOutputs(include=patterns)(program)
    nodes = {name: found.graph.output_node().args[0][at].name for name, at in found.signature.exposed.items()}  # type: ignore
    others = {"linear_3", "gelu", "gelu_1", "gelu_2"}
    assert set(nodes) == {attention, f"{attention}.output", "bert.encoder.layer.1.attention.output", *others}
    assert nodes[attention] == nodes[f"{attention}.output"]  # one value, returned once
    family = FAMILIES["bert-masked-lm"]()
    inputs, values = family.make_inputs(2, 5), dict[str, Tensor]()
    hook = family.model.get_submodule(attention).register_forward_hook(lambda _, __, out: values.update(out=out[0]))
    with torch.no_grad():
        family.model(**inputs)
    hook.remove()
    assert torch.allclose(exposed(found, inputs)[attention], values["out"], atol=1e-5)


def test_a_result_of_the_model_is_not_returned_twice() -> None:
    program = ExposeOutputs(include=("second",))(tiny_mlp_program())
    outputs, found = program.call_with_exposed(**mlp_inputs())
    assert found["second"] is outputs["logits"] and len(program.graph.output_node().args[0]) == 1  # type: ignore


def test_text_form() -> None:
    pass_ = ExposeOutputs(hidden_states=True, include=("type:BertLayer",))
    text = "expose-outputs{hidden_states=true,include=[type:BertLayer]},hide-outputs"
    assert Pipeline.parse(text).passes == (pass_, HideOutputs()) and str(Pipeline((pass_, HideOutputs()))) == text


def test_the_report_names_every_value() -> None:
    program = ExposeOutputs(hidden_states=True)(program_of("Bert"))
    assert [kept.what for kept in program.reports[-1].kept] == [f"hidden_states.{i}" for i in range(3)]
    assert {kept.why for kept in program.reports[-1].kept} == {"exposed already"}
    first = program_of("Bert").reports[-1]
    assert first.totals == {"exposed": 5} and [change.what for change in first.changes][-1] == "attention_scores.1"


# ---- what it refuses


def test_nothing_asked_for() -> None:
    with pytest.raises(PassError, match="give hidden_states=true, attention_scores=true or include"):
        ExposeOutputs()


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (tiny_mlp_program, {"hidden_states": True}, "no transformer blocks found: expose values by include"),
        (tiny_mlp_program, {"attention_scores": True}, "no attention found in the graph"),
        (tiny_mlp_program, {"include": ("frist",)}, "'frist' matches none.*near misses: first"),
        (tiny_mlp_program, {"include": ("type:Conv*",)}, "'type:Conv\\*' matches none"),
        (tiny_mlp_program, {"include": (lambda node: False,)}, "matches none of the 4 candidates"),
    ],
)
def test_refusals(program: Callable[[], Program], options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        ExposeOutputs(**options)(program())


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        return doubled.add_(1) + 3


def test_a_value_that_is_written_into_later() -> None:
    program = trace(Writing().eval(), {"x": torch.zeros(2, 3)})
    with pytest.raises(PassError, match="add_ writes into the value of mul later: canonicalize comes first"):
        ExposeOutputs(include=("mul",))(program)
    found = ExposeOutputs(include=("mul",))(Canonicalize()(program))
    assert torch.equal(exposed(found, {"x": torch.ones(2, 3)})["mul"], torch.full((2, 3), 2.0))


class TwoStacks(nn.Module):
    """Two stacks of blocks, one after the other or beside each other."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.after = after
        self.left, self.right = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a = x + 1
        b = a + 1
        for block in self.left:
            a = block(a)
        b = a + 1 if self.after else b
        for block in self.right:
            b = block(b)
        return a + b


@pytest.mark.parametrize("after", [True, False])
def test_two_stacks_that_are_no_encoder_and_decoder(after: bool) -> None:
    with pytest.raises(PassError, match="blocks are in left, right, not in one stack or an encoder and a decoder"):
        ExposeOutputs(hidden_states=True)(trace(TwoStacks(after).eval(), mlp_inputs()))


# ---- calls, training, and what comes after


def test_calls_return_what_they_returned() -> None:
    name = "bert-sequence-classification"
    program = ExposeOutputs(hidden_states=True, attention_scores=True)(traced(name))
    inputs = FAMILIES[name]().make_inputs(2, 6)
    before, after = traced(name)(**inputs), program(**inputs)
    assert type(after) is type(before) and after.keys() == before.keys() and torch.equal(after.logits, before.logits)
    labels = torch.tensor([0, 2])
    outputs, found = program.call_with_exposed(**inputs, labels=labels, return_dict=False)
    assert torch.equal(outputs[0], traced(name)(**inputs, labels=labels).loss) and len(outputs) == 2
    assert list(found) == ["hidden_states.0", "hidden_states.1", "attention_scores.0"]
    assert traced(name).call_with_exposed(**inputs)[1] == {}


def test_a_student_is_trained_frozen_lowered_and_saved_without_them(tmp_path: Path) -> None:
    plain = copy.deepcopy(traced("bert-masked-lm"))
    inputs = FAMILIES["bert-masked-lm"]().make_inputs(3, 8, padded=True)
    expose = ExposeOutputs(hidden_states=True, attention_scores=True)
    teacher = exposed(expose(plain), inputs)
    student = Pipeline(
        [Canonicalize(), QuantizeWeights(bits=2, latent=True), QuantizeActivations(operands="matmul"), expose]
    )(plain, [Verify()])
    student.train()
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        _, found = student.call_with_exposed(**inputs)
        loss = torch.stack([nn.functional.mse_loss(value, teacher[name]) for name, value in found.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    packed = lower(Pipeline([HideOutputs(), Freeze()])(student.train(False), [Verify()]))
    assert not packed.signature.exposed and "expose" not in readable(packed)
    loaded = load(save(packed, tmp_path / "student"))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, packed(**inputs).logits)


def test_hiding_leaves_the_program_that_was_there() -> None:
    plain = Canonicalize()(traced("t5-seq2seq-lm"))
    shown = Pipeline([ExposeOutputs(hidden_states=True, attention_scores=True)])(plain, [Verify()])
    hidden = Pipeline([HideOutputs()])(shown, [Verify()])
    assert readable(hidden) == readable(plain) and hidden.signature == plain.signature
    assert [change.what for change in hidden.reports[-1].changes[:1]] == ["encoder_hidden_states.0"]
    again = HideOutputs()(hidden)
    assert [kept.why for kept in again.reports[-1].kept] == ["no value is exposed"]


def test_passes_keep_them() -> None:
    name = "gpt2-causal-lm"
    program = ExposeOutputs(hidden_states=True, attention_scores=True)(traced(name))
    inputs = FAMILIES[name]().make_inputs(2, 9)
    expected = exposed(program, inputs)
    packed = lower(Pipeline([Canonicalize(), QuantizeWeights(bits=8), Freeze()])(program, [Verify()]))
    assert packed.planned and packed.runner is not None and not packed.runner.obstacle
    by_plan = exposed(packed, inputs)
    packed.planned = False
    by_graph = exposed(packed, inputs)
    assert list(by_plan) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(by_plan[name], by_graph[name], atol=1e-4)
        assert torch.allclose(by_plan[name], value, atol=0.5)


def test_copies_and_files_keep_them(tmp_path: Path) -> None:
    program, inputs = program_of("Bert"), random_inputs(model_of("Bert"), 2, 6)
    expected = exposed(program, inputs)
    loaded = load(save(program, tmp_path / "model"))
    for other in (program.copy(), copy.deepcopy(program), loaded):
        assert other.signature.exposed == program.signature.exposed
        found = exposed(other, inputs)
        assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_loaded_program_can_be_asked_for_them(tmp_path: Path) -> None:
    packed = lower(Pipeline([Canonicalize(), QuantizeWeights()])(traced("bert-masked-lm")))
    loaded = load(save(packed, tmp_path / "model"))
    program = ExposeOutputs(hidden_states=True, attention_scores=True)(loaded)
    inputs = FAMILIES["bert-masked-lm"]().make_inputs(2, 6)
    expected = exposed(ExposeOutputs(hidden_states=True, attention_scores=True)(packed), inputs)
    found = exposed(program, inputs)
    assert len(found) == 5 and all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_a_program_with_them_generates() -> None:
    program = ExposeOutputs(hidden_states=True, attention_scores=True)(traced("gpt2-causal-lm"))
    prompt = FAMILIES["gpt2-causal-lm"]().make_inputs(2, 5)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = traced("gpt2-causal-lm")
    assert isinstance(program, ModelProgram) and isinstance(plain, ModelProgram)
    assert torch.equal(program.generate(**prompt, **options), plain.generate(**prompt, **options))
    assert not with_cache(program).graphs.decode.signature.exposed
