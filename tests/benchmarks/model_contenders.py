"""What the benchmark of whole models compares: a class for each library's way to run an encoder, and prequant's own."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_inputs import Batch, Cell, Encoder, Source  # type: ignore[import-not-found]
from stands import PREQUANT, Contender  # type: ignore[import-not-found]


class Encoding(Contender):
    """One way to run an encoder."""

    @abstractmethod
    def load(self, folder: Path, source: Source, cell: Cell, threads: int) -> None:
        """Get ready for batches of ``cell``; called again for each cell."""

    @abstractmethod
    def run(self, batch: Batch) -> np.ndarray:
        """Last hidden states ``[batch, length, width]``, float32."""


class Packed(Encoding):
    """prequant: weights and embeddings in a format, inputs of linears quantized dynamically to 8 bits, or not."""

    library = PREQUANT
    # torch loads the module of torch.export, and what that takes, with the first shape that has a symbol in it.
    modules = ("prequant.checkpoint", "transformers.models.bert.modeling_bert", "torch.export._trace")

    def __init__(self, format: str, bits: int, compress: str, quantized_inputs: bool) -> None:
        """``compress`` is the text of the pass that compresses the weights."""
        super().__init__(f"prequant {format}, {'affine8:row' if quantized_inputs else 'float32'}", bits)
        inputs = ",quantize-activations{bits=8}" if quantized_inputs else ""
        self.pipeline = f"canonicalize,{compress}{inputs}"

    def prepare(self, source: Source, folder: Path) -> None:
        import prequant as pq

        example = {name: torch.ones(2, 12, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        program = pq.trace(source.model(), example)
        pq.save(pq.lower(pq.Pipeline.parse(self.pipeline)(program)), folder)

    def load(self, folder: Path, source: Source, cell: Cell, threads: int) -> None:
        import prequant as pq

        if not hasattr(self, "_program"):
            self._program: Any = pq.load(folder)

    def run(self, batch: Batch) -> np.ndarray:
        found = self._program(input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask))
        return np.asarray(found[0].numpy())


def packed() -> list[Encoding]:
    """prequant's own, from wide to narrow."""
    row, group = "quantize-weights{{bits={}}}", "quantize-weights{{bits={},granularity=group,group_size=64}}"
    return [
        Packed("affine8:row", 8, row.format(8), True),
        Packed("affine4:row", 4, row.format(4), True),
        Packed("affine4:group64", 4, group.format(4), True),
        Packed("bcq3:row", 3, "binary-code{bits=3,embeddings=true}", True),
        Packed("affine2:group64", 2, group.format(2), True),
        Packed("ternary:row", 2, "quantize-weights{bits=2,ternary=true}", True),
        Packed("binary:row", 1, "quantize-weights{bits=1}", True),
        Packed("affine8:row", 8, row.format(8), False),
        Packed("affine4:group64", 4, group.format(4), False),
    ]


def torch_encoder(source: Source, attention: str = "sdpa") -> Encoder:
    """The float model as every peer converts it."""
    return Encoder(source.model(attention)).eval()
