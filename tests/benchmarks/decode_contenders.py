"""What the benchmark of decoding compares: torch and prequant, and what every contender has to do."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stands import PREQUANT, Contender  # type: ignore[import-not-found]
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

MODULES: tuple[str, ...] = ("transformers.models.gpt2.modeling_gpt2",)


@dataclass(frozen=True)
class Source:
    """A decoder to measure, with random weights: prompts of ``prompt`` tokens, then ``new`` more, for each of
    ``batches`` at once; the memory is measured on the first."""

    name: str
    config: tuple[tuple[str, int], ...]
    prompt: int
    new: int
    batches: tuple[int, ...]

    def model(self, attention: str = "sdpa") -> GPT2LMHeadModel:
        """In float32, ready to infer."""
        torch.manual_seed(0)
        # No token ends the text, or contenders would stop at different ones.
        options: dict[str, Any] = {**dict(self.config), "attn_implementation": attention}
        config = GPT2Config(**options, eos_token_id=None, bos_token_id=None)
        model = GPT2LMHeadModel(config)
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None
        return model.eval()

    def ids(self, batch: int, length: int, seed: int = 0) -> np.ndarray:
        """Random tokens ``[batch, length]``, int64."""
        vocabulary = dict(self.config).get("vocab_size", GPT2Config().vocab_size)
        return np.random.default_rng(seed).integers(0, vocabulary, (batch, length))


SOURCES = {
    "gpt2": Source("gpt2", (), 128, 64, (1, 8)),
    # To try the benchmark out.
    "tiny": Source(
        "tiny", (("n_embd", 64), ("n_layer", 2), ("n_head", 2), ("vocab_size", 512), ("n_positions", 64)), 8, 4, (1, 2)
    ),
}


class Decoding(Contender):
    """One way to decode: ``prefill`` begins anew, each ``step`` goes on from there."""

    @abstractmethod
    def load(self, folder: Path, source: Source, threads: int) -> None:
        """Get ready to run."""

    def begin(self, batch: int) -> None:
        """Get ready for prompts of so many at once."""

    @abstractmethod
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[batch, vocabulary]`` after prompts ``[batch, length]``, int64."""

    @abstractmethod
    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits ``[batch, vocabulary]`` after one more token each, ``[batch]``, int64."""


class TorchDecoder(Decoding):
    """transformers' model with its cache; eager, or with a cache of fixed size and the forward compiled."""

    library = "torch"

    def __init__(self, name: str, dtype: torch.dtype, compiled: bool = False) -> None:
        super().__init__(name, 8 * dtype.itemsize)
        self.dtype, self.compiled = dtype, compiled
        self.modules = (*MODULES, "torch._inductor.compile_fx") if compiled else MODULES

    def prepare(self, source: Source, folder: Path) -> None:
        model: Any = source.model()
        model.to(self.dtype).save_pretrained(folder)

    def load(self, folder: Path, source: Source, threads: int) -> None:
        self._length = source.prompt + source.new
        self._model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=self.dtype).eval()
        self._call = self._model
        if self.compiled:
            import torch._inductor.config

            torch._inductor.config.freezing = True

    def begin(self, batch: int) -> None:
        from transformers.cache_utils import StaticCache

        if self.compiled:
            # One cache for all texts: another would be another thing to compile for.
            self._cache: Any = StaticCache(config=self._model.config, max_cache_len=self._length)
            torch._dynamo.reset()
            self._call = torch.compile(self._model, dynamic=False)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        from transformers.cache_utils import DynamicCache

        if self.compiled:
            self._cache.reset()
        else:
            self._cache = DynamicCache()
        return self._logits(self._model, ids)

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self._logits(self._call, ids[:, None])

    def _logits(self, call: Any, ids: np.ndarray) -> np.ndarray:
        found = call(torch.from_numpy(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return np.asarray(found.logits[:, -1].float().numpy())


class PackedDecoder(Decoding):
    """prequant: weights, embeddings and the head that is tied to them in a format, inputs of linears quantized
    dynamically to 8 bits."""

    library = PREQUANT
    modules = (*MODULES, "prequant.checkpoint", "prequant.generation", "torch.export._trace")

    def __init__(self, format: str, bits: int, compress: str) -> None:
        super().__init__(f"prequant {format}, affine8:row", bits)
        self.pipeline = f"canonicalize,{compress},quantize-activations{{bits=8}}"

    def prepare(self, source: Source, folder: Path) -> None:
        import prequant as pq

        program = pq.trace(source.model(), {"input_ids": torch.ones(2, 12, dtype=torch.int64)})
        pq.save(pq.lower(pq.Pipeline.parse(self.pipeline)(program)), folder)

    def load(self, folder: Path, source: Source, threads: int) -> None:
        import prequant as pq
        from prequant.generation import with_cache

        program: Any = pq.load(folder)
        self._decoder: Any = with_cache(program)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._cache: Any = None
        return self._logits(ids)

    def step(self, ids: np.ndarray) -> np.ndarray:
        return self._logits(ids[:, None])

    def _logits(self, ids: np.ndarray) -> np.ndarray:
        found = self._decoder(input_ids=torch.from_numpy(ids), past_key_values=self._cache)
        self._cache = found.past_key_values
        return np.asarray(found.logits[:, -1].numpy())


def torch_and_packed() -> tuple[list[Decoding], list[Decoding]]:
    """torch's, the reference first; prequant's, from wide to narrow."""
    row, group = "quantize-weights{{bits={}}}", "quantize-weights{{bits={},granularity=group,group_size=64}}"
    return [
        TorchDecoder("torch fp32", torch.float32),
        TorchDecoder("torch bf16", torch.bfloat16),
        TorchDecoder("torch fp32, compiled", torch.float32, True),
        TorchDecoder("torch bf16, compiled", torch.bfloat16, True),
    ], [
        PackedDecoder("affine8:row", 8, row.format(8)),
        PackedDecoder("affine4:row", 4, row.format(4)),
        PackedDecoder("affine4:group64", 4, group.format(4)),
        PackedDecoder("bcq3:row", 3, "binary-code{bits=3,embeddings=true}"),
        PackedDecoder("affine2:group64", 2, group.format(2)),
        PackedDecoder("ternary:row", 2, "quantize-weights{bits=2,ternary=true}"),
        PackedDecoder("binary:row", 1, "quantize-weights{bits=1}"),
    ]


class WithPast(nn.Module):
    """``ids, key and value of each layer  ->  logits of the last position, keys and values``: what peers convert.

    The model's ``Conv1D`` become linears first, which every converter knows how to quantize.
    """

    def __init__(self, source: Source, attention: str) -> None:
        super().__init__()
        self.model = source.model(attention)
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Conv1D):
                    setattr(module, name, _linear(child))

    @property
    def layers(self) -> int:
        """How many have a key and a value."""
        return int(self.model.config.n_layer)

    def past(self, batch: int, length: int) -> list[Tensor]:
        """Keys and values ``[batch, heads, length, size]`` of so many positions."""
        config = self.model.config
        shape = (batch, config.n_head, length, config.n_embd // config.n_head)
        return [torch.zeros(shape) for _ in range(2 * self.layers)]

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Of the inputs and of the outputs."""
        keys = [f"{what}_{layer}" for layer in range(self.layers) for what in ("key", "value")]
        return ["input_ids", *(f"past_{key}" for key in keys)], ["logits", *(f"present_{key}" for key in keys)]

    def forward(self, input_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache: Any = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            # As if they had been added before: adding them would join each to nothing in the graph.
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        found = self.model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return (found.logits[:, -1], *present)


def _linear(conv: Conv1D) -> nn.Linear:
    columns, rows = conv.weight.shape
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    return linear
