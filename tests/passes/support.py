"""Tiny programs for the tests of passes, and the golden-text assertion. Import with ``from .support import ...``."""

import difflib
import textwrap

import torch
from torch import Tensor, nn

from prequant.passes import Input, Program, Signature
from prequant.passes.printing import readable
from prequant.trace import trace


class TinyMLP(nn.Module):
    """Two linears with biases around a ReLU: 8 -> 16 -> 4, with dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.dropout = nn.Dropout(0.1)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(self.dropout(torch.relu(self.first(x))))}


class TinyEmbedding(nn.Module):
    """A token embedding (12 × 8), a linear, a layer norm, and a head that is tied to the embedding: ids to logits
    over tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(torch.tanh(self.mix(self.tokens(input_ids)))))}


def tiny_mlp(seed: int = 0) -> TinyMLP:
    """The eager model, in eval mode, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyMLP().eval()


def tiny_embedding(seed: int = 0) -> TinyEmbedding:
    """The eager model, in eval mode, with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyEmbedding().eval()


def mlp_inputs(batch: int = 3, length: int = 5) -> dict[str, Tensor]:
    """Inputs for :class:`TinyMLP`: ``x`` [batch, length, 8]."""
    return {"x": torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch * 100 + length))}


def embedding_inputs(batch: int = 3, length: int = 5) -> dict[str, Tensor]:
    """Inputs for :class:`TinyEmbedding`: ``input_ids`` [batch, length]."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {"input_ids": torch.randint(0, 12, (batch, length), generator=generator)}


def tiny_mlp_program(model: nn.Module | None = None) -> Program:
    """:class:`TinyMLP` (or ``model``, with its input ``x``) traced; it takes any ``mlp_inputs()``."""
    program = trace(model or tiny_mlp(), mlp_inputs())
    # Written out, so that golden texts do not hang on how the tracer names axes.
    inputs = (Input("x", torch.float32, ("batch", "length", 8)),)
    program.update_info(signature=Signature(inputs, {"logits": 0}))
    return program


def tiny_embedding_program(model: nn.Module | None = None) -> Program:
    """:class:`TinyEmbedding` (or ``model``, with its input ``input_ids``) traced; its weight is tied."""
    program = trace(model or tiny_embedding(), embedding_inputs())
    inputs = (Input("input_ids", torch.int64, ("batch", "length")),)
    program.update_info(signature=Signature(inputs, {"logits": 0}), aliases={"tokens.weight": ("head.weight",)})
    return program


def assert_golden(program: Program, expected: str) -> None:
    """Compare ``readable(program)`` with ``expected``, whose common indentation and outer blank lines do not count.

    Fails with a diff, and with the actual text to paste where the change is meant.
    """
    wanted, actual = textwrap.dedent(expected).strip(), readable(program)
    diff = "\n".join(difflib.unified_diff(wanted.splitlines(), actual.splitlines(), "expected", "actual", lineterm=""))
    assert actual == wanted, f"the program differs from its golden text:\n{diff}\n\nthe actual text:\n{actual}"
