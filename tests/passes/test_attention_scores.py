import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import Canonicalize, ExposeOutputs, PassError, Program, readable
from prequant.trace import trace

from ..models import random_inputs, small_model
from .support import mlp_inputs

aten = torch.ops.aten
BARE = ("Bert", "Roberta", "DistilBert", "Electra", "Albert", "MPNet", "GPT2", "OPT", "Llama", "Qwen2")
HEADS = dict.fromkeys(BARE, "Model") | {"GPT2": "LMHeadModel"} | dict.fromkeys(("OPT", "Llama", "Qwen2"), "ForCausalLM")
HEADS["T5"] = "ForConditionalGeneration"


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


# ---- what is no attention, and what is hidden in one


def softmax_of_a_linear(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (torch.softmax(torch.tanh(q), -1) @ k.transpose(-1, -2)) @ v * mask[:, None, :, None]


def test_attention_without_a_product_of_queries_and_keys() -> None:
    with pytest.raises(
        PassError, match=r'softmax can\'t be found: no product .* leads to it; trace .* with attn_.*"eager"'
    ):
        attending(softmax_of_a_linear)


def test_a_fused_attention_that_it_does_not_know() -> None:
    program = attending(fused, include=("query",))
    (node,) = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    node.target = aten._scaled_dot_product_flash_attention_for_cpu.default
    with pytest.raises(PassError, match=r"scaled_dot_product_attention can't be found: .* computes them inside itself"):
        ExposeOutputs(attention_scores=True)(program)


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


# ---- training


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
