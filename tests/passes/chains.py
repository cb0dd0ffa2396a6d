"""Programs to cut into chains, and what has to hold of these. Import with ``from .chains import ...``."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from prequant.passes import (
    Canonicalize,
    Input,
    Partitioned,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    Signature,
    SplitOutliers,
)
from prequant.trace import trace

from ..models import random_inputs, small_model, traced

F32 = torch.float32
T5 = "t5-seq2seq-lm"
FOURS = Pipeline([QuantizeWeights(bits=4)])
WEIGHTS_AND_INPUTS = Pipeline([SplitOutliers(ratio=0.02), QuantizeWeights(bits=8), QuantizeActivations()])
CUT = [
    *(
        f"{name}-{head}"
        for name in ("bert", "roberta", "distilbert", "electra", "mpnet")
        for head in ("masked-lm", "encoder")
    ),
    *("t5-encoder", T5, "gpt2-causal-lm", "opt-causal-lm", "llama-causal-lm", "qwen2-causal-lm"),
]
"""The families that have two blocks and more."""
SOME = ["bert-masked-lm", T5, "gpt2-causal-lm", "qwen2-causal-lm"]
DEEP: dict[str, tuple[str, str, dict[str, int]]] = {
    "bert": ("Bert", "ForSequenceClassification", {"num_hidden_layers": 5}),
    "gpt2": ("GPT2", "LMHeadModel", {"n_layer": 5}),
    "llama": ("Llama", "ForCausalLM", {"num_hidden_layers": 4}),
    "t5": ("T5", "ForConditionalGeneration", {"num_layers": 3, "num_decoder_layers": 3}),
}


@cache
def canonical(name: str) -> Program:
    return Canonicalize()(traced(name))


@cache
def deep(name: str) -> tuple[Program, Callable[..., dict[str, Tensor]]]:
    prefix, head, options = DEEP[name]
    model = small_model(prefix, head, **options)
    return Canonicalize()(trace(model, random_inputs(model, 1, 4))), partial(random_inputs, model)


def most(program: Program) -> int:
    """How many blocks a family's Program has."""
    return 4 if "decoder_input_ids" in program.signature.names else 2


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_runs_as(chain: Any, program: Program, make_inputs: Callable[..., dict[str, Tensor]]) -> None:
    for batch, length in ((1, 5), (2, 7), (3, 12)):
        inputs = make_inputs(batch, length, padded=True)
        with torch.no_grad():
            assert_same(chain(**inputs), program(**inputs))


def assert_same_tensors(actual: Program, expected: Program, shared: bool = False) -> None:
    ours, theirs = (dict((*program.named_parameters(), *program.named_buffers())) for program in (actual, expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name] is value if shared else torch.equal(ours[name], value), name
        assert isinstance(ours[name], nn.Parameter) == isinstance(value, nn.Parameter)


class Layer(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, inner, bias=False), nn.Linear(inner, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    """Layers of 8, 40, 16, 24 and 8 weights, behind 16 and before 8 more."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.layers = nn.ModuleList(map(Layer, (1, 5, 2, 3, 1)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return {"y": self.leave(x)}


@cache
def tower() -> Program:
    program = Canonicalize()(trace(Tower().eval(), {"x": torch.zeros(3, 4)}))
    program.update_info(signature=Signature((Input("x", F32, ("rows", 4)),), {"y": 0}))
    return program


def blocks(parts: Partitioned) -> list[int]:
    return [cut.blocks for cut in parts.cuts]
