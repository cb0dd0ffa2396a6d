"""find_stacks: where the blocks of a model are, whatever passes have made of its graph."""

import pytest
import torch
from torch import Tensor, nn

from prequant.passes import Canonicalize, Pipeline, QuantizeActivations, QuantizeWeights, lower
from prequant.passes.blocks import find_stacks
from prequant.trace import trace

from ..models import FAMILIES, small_model, traced

PATHS = {
    "bert-encoder": ("encoder.layer",),
    "roberta-masked-lm": ("roberta.encoder.layer",),
    "distilbert-masked-lm": ("distilbert.transformer.layer",),
    "electra-masked-lm": ("electra.encoder.layer",),
    "mpnet-masked-lm": ("mpnet.encoder.layer",),
    "t5-seq2seq-lm": ("encoder.block", "decoder.block"),
    "gpt2-causal-lm": ("transformer.h",),
    "opt-causal-lm": ("model.decoder.layers",),
    "llama-causal-lm": ("model.layers",),
    "qwen2-causal-lm": ("model.layers",),
}


@pytest.mark.parametrize("form", ["traced", "canonical", "lowered"])
@pytest.mark.parametrize("name", PATHS)
def test_every_family_has_its_stacks(name: str, form: str) -> None:
    program = traced(name)
    if form == "canonical":
        program = Canonicalize()(program)
    elif form == "lowered":
        program = lower(Pipeline([Canonicalize(), QuantizeWeights(bits=4)])(program))
    stacks = find_stacks(program)
    assert tuple(stack.path for stack in stacks) == PATHS[name]
    for stack in stacks:
        assert len(stack) == 2 and not stack.shared
        assert [len(body) for body in stack.bodies] == [len(stack.bodies[0])] * 2
        assert stack.block(1) == f"{stack.path}.1"


@pytest.mark.parametrize("name", ["bert-encoder", "gpt2-causal-lm", "llama-causal-lm", "t5-seq2seq-lm"])
def test_boundaries_are_the_hidden_states_of_the_model(name: str) -> None:
    """Those of transformers, but for the last one where the model puts a norm behind its blocks."""
    family, program = FAMILIES[name](), traced(name)
    inputs = family.make_inputs(2, 7, padded=True)
    with torch.no_grad():
        outputs = family.model(**inputs, output_hidden_states=True)
    expected = [outputs.hidden_states] if "hidden_states" in outputs else []
    expected = expected or [outputs.encoder_hidden_states, outputs.decoder_hidden_states]
    for stack, states in zip(find_stacks(program), expected, strict=True):
        shown = program.copy()
        shown.graph.output_node().args = (tuple(stack_in(shown, stack.boundaries)),)
        shown.recompile()
        found = shown.forward(*shown.bind((), inputs))
        assert len(found) == len(states) == 3
        for one, other in zip(found[:2], states, strict=False):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_decoder_of_the_text_that_the_encoder_reads(depth: int) -> None:
    """Its blocks have two ways from the one input: through each other, and through the encoder."""
    model = small_model("T5", "ForSequenceClassification", num_layers=depth)
    inputs = {"input_ids": torch.randint(5, 90, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    inputs["input_ids"][:, -1] = model.config.eos_token_id  # where the head looks
    program = trace(model, inputs)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    stacks = find_stacks(program)
    assert [(stack.path, len(stack)) for stack in stacks] == [
        ("transformer.encoder.block", depth),
        ("transformer.decoder.block", depth),
    ]
    for stack, states in zip(stacks, (outputs.encoder_hidden_states, outputs.decoder_hidden_states), strict=True):
        shown = program.copy()
        shown.graph.output_node().args = (tuple(stack_in(shown, stack.boundaries)),)
        shown.recompile()
        for one, other in zip(shown.forward(*shown.bind((), inputs))[:depth], states, strict=False):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def stack_in(program: object, boundaries: tuple[torch.fx.Node, ...]) -> list[torch.fx.Node]:
    """The nodes of the same names in a copy."""
    names = {node.name: node for node in program.graph.nodes}  # type: ignore[attr-defined]
    return [names[node.name] for node in boundaries]


def test_one_block_is_a_stack_too() -> None:
    (stack,) = find_stacks(traced("bert-sequence-classification"))
    assert (stack.path, len(stack), len(stack.boundaries)) == ("bert.encoder.layer", 1, 2)


def test_layers_that_share_their_weights_say_so() -> None:
    (stack,) = find_stacks(traced("albert-masked-lm"))
    assert len(stack) == 2 and stack.numbers == (0, 0) and stack.block(0) == stack.block(1)
    assert any(name.endswith("attention.query.weight") for name in stack.shared)


def test_layers_that_share_their_weights_are_found_behind_quantizers_of_their_inputs() -> None:
    program = Pipeline([Canonicalize()])(traced("albert-masked-lm"))
    (stack,) = find_stacks(QuantizeActivations()(program))
    (plain,) = find_stacks(program)
    assert [node.name for node in stack.boundaries] == [node.name for node in plain.boundaries]
    assert any(name.endswith("attention.query.weight") for name in stack.shared)


def test_what_the_first_block_computes_for_all_is_in_no_body() -> None:
    program = trace(small_model("T5", "EncoderModel"), FAMILIES["t5-encoder"]().example_inputs)
    (stack,) = find_stacks(program)
    bias = next(node for node in program.graph.nodes if "relative_attention_bias" in str(node.target))
    (looked_up,) = bias.users
    assert not any(looked_up in body for body in stack.bodies)


class Chain(nn.Module):
    """Numbered modules that are no blocks: of other classes, or side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.beside = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(x)
        return self.beside[0](x) + self.beside[1](x)


def test_what_is_numbered_alone_is_no_stack() -> None:
    assert find_stacks(trace(Chain(), {"x": torch.randn(2, 4)})) == ()


def test_plain_modules_have_stacks_as_well() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    (stack,) = find_stacks(trace(model, {"input": torch.randn(2, 4)}))
    assert (stack.path, len(stack), stack.block(2)) == ("", 3, "2")
