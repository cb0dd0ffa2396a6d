import copy
import math
from collections.abc import Callable
from functools import cache
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

from ..models import FAMILIES, random_inputs, small_model, traced
from .support import assert_golden, mlp_inputs, tiny_mlp_program

aten = torch.ops.aten
BARE = ("Bert", "Roberta", "DistilBert", "Electra", "Albert", "MPNet", "GPT2", "OPT", "Llama", "Qwen2")
HEADS = dict.fromkeys(BARE, "Model") | {"GPT2": "LMHeadModel"} | dict.fromkeys(("OPT", "Llama", "Qwen2"), "ForCausalLM")
HEADS["T5"] = "ForConditionalGeneration"
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


@cache
def model_of(prefix: str, attention: str = "eager") -> Any:
    return small_model(prefix, HEADS[prefix], attn_implementation=attention)


@cache
def program_of(prefix: str, attention: str = "eager") -> Program:
    """Traced, with hidden states and attention scores exposed."""
    model = model_of(prefix, attention)
    return ExposeOutputs(hidden_states=True, attention_scores=True)(trace(model, random_inputs(model, 1, 4)))


def exposed(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The exposed values, without gradients."""
    with torch.no_grad():
        return program.call_with_exposed(**inputs)[1]


class Attending(nn.Module):
    """Attention over [batch, length, 8] with ``heads`` for queries, with what ``attend`` makes of q, k, v and a mask
    [batch, length], true where there is a token.
    """

    def __init__(self, attend: Callable[..., Tensor], heads: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.query, self.key, self.value = (nn.Linear(8, 4 * heads[i]) for i in (0, 1, 1))
        self.out = nn.Linear(4 * heads[0], 8)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        q, k, v = (
            layer(x).unflatten(-1, (count, 4)).transpose(1, 2)
            for layer, count in zip((self.query, self.key, self.value), (*self.heads, self.heads[1]), strict=True)
        )
        return {"logits": self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))}


def eager(mask_scores: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention that spells out its scores, which ``mask_scores`` masks."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = mask_scores(q @ k.transpose(-1, -2) * 0.5, mask[:, None, None, :])
        return torch.softmax(scores, -1) @ v

    return attend


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])


def attending_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two texts of five tokens, the last two of the second padded."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    return {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5)).to(dtype), "mask": mask}


def attending(attend: Callable[..., Tensor], heads: tuple[int, int] = (2, 2), **options: Any) -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Attending(attend, heads).eval()
    program = trace(
        model, attending_inputs(), dynamic_axes={"x": {0: "batch", 1: "length"}, "mask": {0: "batch", 1: "length"}}
    )
    return ExposeOutputs(**(options or {"attention_scores": True}))(Canonicalize()(program))


def scores_by_hand(program: Program, x: Tensor) -> Tensor:
    """Scaled products of queries and keys, head by head, in float64."""
    state = {name: value.double() for name, value in program.state_dict().items()}
    q, k = (x.double() @ state[f"{part}.weight"].T + state[f"{part}.bias"] for part in ("query", "key"))
    heads, key_heads = q.shape[-1] // 4, k.shape[-1] // 4
    owners = [head * key_heads // heads for head in range(heads)]
    parts = [q[..., 4 * h : 4 * h + 4] @ k[..., 4 * o : 4 * o + 4].transpose(-1, -2) / 2 for h, o in enumerate(owners)]
    return torch.stack(parts, 1)


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


def test_golden_of_fused_attention() -> None:
    text = readable(attending(fused))
    assert (
        """
  %mul_tensor = mul.Tensor(%transpose, 0.5)
  %transpose_int = transpose.int(%transpose_1, -1, -2)
  %matmul_default = matmul(%mul_tensor, %transpose_int)
  %logical_not_default = logical_not(%unsqueeze_1)
  %masked_fill_scalar = masked_fill.Scalar(%matmul_default, %logical_not_default, 0)
  %scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose_1, %transpose_2, %unsqueeze_1)
"""
        in text
    )
    assert text.endswith("expose %masked_fill_scalar as attention_scores.0")


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


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith(("t5-seq", "albert"))])
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


# ---- attention scores, against transformers


def assert_probabilities(scores: Tensor, probabilities: Tensor) -> None:
    """The softmax of the scores, masked ones left out, is ``probabilities``; they are 0 where masked, and small."""
    masked = probabilities == 0
    assert bool((scores[masked] == 0).all()) and float(scores.abs().max()) < 100
    found = scores.float().masked_fill(masked, -math.inf).softmax(-1)
    assert torch.allclose(found, probabilities.float(), atol=1e-5)


@pytest.mark.parametrize("prefix", BARE)
def test_attention_scores_give_the_probabilities_of_transformers(prefix: str) -> None:
    model = model_of(prefix)
    inputs = random_inputs(model, 3, 9, padded=True)
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions
    found = exposed(program_of(prefix), inputs)
    assert [name for name in found if "scores" in name] == [f"attention_scores.{i}" for i in range(len(expected))]
    assert any(bool((probabilities == 0).any()) for probabilities in expected)
    for number, probabilities in enumerate(expected):
        assert_probabilities(found[f"attention_scores.{number}"], probabilities)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_encoder_and_a_decoder_have_three_kinds(attention: str) -> None:
    model = model_of("T5")
    inputs = random_inputs(model, 3, 9, padded=True)
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
    found = exposed(program_of("T5", attention), inputs)
    for kind in ("encoder", "decoder", "cross"):
        for number, probabilities in enumerate(expected[f"{kind}_attentions"]):
            assert_probabilities(found.pop(f"{kind}_attention_scores.{number}"), probabilities)
    assert not any("scores" in name for name in found)


@pytest.mark.parametrize("prefix", [prefix for prefix in BARE if prefix != "MPNet"])
def test_fused_attention_has_the_same_scores(prefix: str) -> None:
    inputs = random_inputs(model_of(prefix), 3, 9, padded=True)
    spelled_out, beside = (exposed(program_of(prefix, attention), inputs) for attention in ("eager", "sdpa"))
    assert any("scaled_dot_product_attention" in str(node.target) for node in program_of(prefix, "sdpa").graph.nodes)
    tokens = inputs["attention_mask"].bool()  # where a query has no key at all, the two compute different things
    for name in spelled_out:
        if "scores" in name:
            first, second = (value.transpose(1, 2)[tokens] for value in (spelled_out[name], beside[name]))
            assert torch.allclose(first, second, atol=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_in_half_precision(attention: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model_of("Bert", attention)).to(dtype)
    inputs = random_inputs(model, 2, 7, padded=True)
    program = ExposeOutputs(attention_scores=True)(trace(model, random_inputs(model, 2, 4)))
    single = exposed(program_of("Bert"), inputs)
    for name, value in exposed(program, inputs).items():
        assert value.dtype is dtype and bool(torch.isfinite(value).all())
        assert torch.equal(value == 0, single[name] == 0)
        assert torch.allclose(value.float(), single[name], atol=0.5)


# ---- masks and fused attention, by hand

LEAST = torch.finfo(torch.float32).min
MASKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda scores, mask: scores + (~mask) * LEAST,
    "added, small": lambda scores, mask: scores + (1.0 - mask.float()) * -10000.0,
    "taken away": lambda scores, mask: scores - (1.0 - mask.float()) * 10000.0,
    "chosen": lambda scores, mask: torch.where(mask, scores, -math.inf),
    "chosen the other way round": lambda scores, mask: torch.where(~mask, -math.inf, scores),
    "chosen from a tensor": lambda scores, mask: torch.where(mask, scores, torch.full((), LEAST)),
    "filled": lambda scores, mask: scores.masked_fill(~mask, -math.inf),
    "filled with a tensor": lambda scores, mask: scores.masked_fill(~mask, torch.full((), LEAST)),
    "added twice": lambda scores, mask: scores + (~mask) * LEAST + torch.where(mask, 0.0, LEAST),
    "bounded": lambda scores, mask: torch.max(scores + (~mask) * LEAST, torch.tensor(LEAST)),
    "moved": lambda scores, mask: (scores + (~mask) * LEAST).flatten(0, 1).unflatten(0, (-1, 2)),
    "in another order": lambda scores, mask: (scores * 2).transpose(1, 2).transpose(1, 2) / 2 + (~mask) * LEAST,
}


@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS.keys())
def test_masked_scores_are_0(masking: Callable[[Tensor, Tensor], Tensor]) -> None:
    program, inputs = attending(eager(masking)), attending_inputs()
    expected = scores_by_hand(program, inputs["x"]).masked_fill(~inputs["mask"][:, None, None, :], 0)
    assert torch.allclose(exposed(program, inputs)["attention_scores.0"].double(), expected, atol=1e-5)


def test_the_mask_decides_and_not_the_score() -> None:
    program, inputs = attending(eager(lambda scores, mask: scores * 1e5 + (~mask) * LEAST)), attending_inputs()
    expected = scores_by_hand(program, inputs["x"]).masked_fill(~inputs["mask"][:, None, None, :], 0) * 1e5
    found = exposed(program, inputs)["attention_scores.0"]
    assert float(found.min()) < -1e4 and torch.allclose(found.double(), expected, rtol=1e-4, atol=1)


def test_a_bias_is_a_part_of_the_scores() -> None:
    program = attending(eager(lambda scores, mask: scores + torch.arange(mask.shape[-1]) + (~mask) * LEAST))
    inputs = attending_inputs()
    expected = (scores_by_hand(program, inputs["x"]) + torch.arange(5)).masked_fill(
        ~inputs["mask"][:, None, None, :], 0
    )
    assert torch.allclose(exposed(program, inputs)["attention_scores.0"].double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["condition", "addend"])
def test_a_mask_of_fused_attention(kind: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, None, None, :]
        addend = torch.where(mask, torch.arange(mask.shape[-1], dtype=q.dtype), -math.inf)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask if kind == "condition" else addend)

    program, inputs = attending(attend), attending_inputs()
    bias = torch.arange(5) if kind == "addend" else torch.zeros(5)
    expected = (scores_by_hand(program, inputs["x"]) + bias).masked_fill(~inputs["mask"][:, None, None, :], 0)
    assert torch.allclose(exposed(program, inputs)["attention_scores.0"].double(), expected, atol=1e-5)


def test_causal_fused_attention_with_grouped_queries_and_a_scale() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        result = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
        return result * mask[:, None, :, None]

    program, inputs = attending(attend, heads=(4, 2)), attending_inputs()
    expected = scores_by_hand(program, inputs["x"]).tril() / 2
    assert torch.allclose(exposed(program, inputs)["attention_scores.0"].double(), expected, atol=1e-5)


def test_layers_share_the_condition_of_their_mask() -> None:
    assert len(program_of("Bert").graph.find_nodes(op="call_function", target=aten.le.Scalar)) == 1
    assert len(program_of("Bert", "sdpa").graph.find_nodes(op="call_function", target=aten.logical_not.default)) == 1


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


def softmax_of_a_linear(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (torch.softmax(torch.tanh(q), -1) @ k.transpose(-1, -2)) @ v * mask[:, None, :, None]


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (tiny_mlp_program, {"hidden_states": True}, "no transformer blocks found: expose values by include"),
        (tiny_mlp_program, {"attention_scores": True}, "no attention found in the graph"),
        (
            lambda: attending(softmax_of_a_linear, include=("query",)),
            {"attention_scores": True},
            'softmax can\'t be found: no product of queries and keys leads to it; trace the model with attn_.*"eager"',
        ),
        (tiny_mlp_program, {"include": ("frist",)}, "'frist' matches none.*near misses: first"),
        (tiny_mlp_program, {"include": ("type:Conv*",)}, "'type:Conv\\*' matches none"),
        (tiny_mlp_program, {"include": (lambda node: False,)}, "matches none of the 4 candidates"),
    ],
)
def test_refusals(program: Callable[[], Program], options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        ExposeOutputs(**options)(program())


def test_a_fused_attention_that_it_does_not_know() -> None:
    program = attending(fused, include=("query",))
    (node,) = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    node.target = aten._scaled_dot_product_flash_attention_for_cpu.default
    with pytest.raises(PassError, match=r"scaled_dot_product_attention can't be found: .* computes them inside itself"):
        ExposeOutputs(attention_scores=True)(program)


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


class Routed(nn.Module):
    """A softmax that weighs rows of a stored matrix, and one that weighs what two linears give: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.router(x), -1)
        mixed = sum(shares[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return torch.softmax(mixed, -1) @ self.table


def test_not_every_softmax_is_attention() -> None:
    with pytest.raises(PassError, match="no attention found in the graph"):
        ExposeOutputs(attention_scores=True)(trace(Routed().eval(), mlp_inputs()))


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("prefix", ["Bert", "T5"])
def test_gradients_reach_parameters_in_both_modes(prefix: str, attention: str) -> None:
    inputs = random_inputs(model_of(prefix), 2, 6, padded=True)
    for training in (False, True):
        program = copy.deepcopy(program_of(prefix, attention)).train(training)
        _, found = program.call_with_exposed(**inputs)
        values = [value for name, value in found.items() if "scores" in name]
        sum(value.square().mean() for value in values).backward()  # type: ignore[union-attr]
        gradients = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
        queries = [name for name in gradients if name.endswith(("query.weight", ".q.weight"))]
        assert len(queries) == len(values)
        assert all(bool(g.isfinite().all()) for g in gradients.values())
        assert all(float(gradients[name].abs().max()) > 0 for name in queries)


def test_a_student_is_trained_frozen_lowered_and_saved_without_them(tmp_path: Path) -> None:
    plain = traced("bert-masked-lm")
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
