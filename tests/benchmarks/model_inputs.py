"""What the benchmark of whole models runs: encoders, and the batches that they are given."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import data_folder, encoder_folder  # type: ignore[import-not-found]
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel

Ids = np.ndarray
"""``[batch, length]``, int64."""

PADDED = 128
"""Tokens that padded sentences have."""
SENTENCES, FEWEST_BATCHES = 32, 8
"""Sentences of SST-2 in a cell with batches of real ones: so many, or so many batches if that is more."""
CALIBRATION_BATCHES, CALIBRATION_BATCH = 16, 8


@dataclass(frozen=True)
class Batch:
    """Inputs of an encoder: ``ids`` and ``mask``, ``[batch, length]``, int64."""

    ids: Ids
    mask: Ids


@dataclass(frozen=True)
class Cell:
    """Batches of one size: of ``length`` tokens, or if that is ``None`` as long as the longest sentence of each."""

    batch: int
    length: int | None
    sentences: bool = False
    """Whether they are sentences of SST-2 (``length`` says what they are padded to) or random tokens."""

    def __str__(self) -> str:
        if not self.sentences:
            return f"batch {self.batch}, length {self.length}"
        return f"batch {self.batch}, " + ("unpadded" if self.length is None else f"padded to {self.length}")


class Encoder(nn.Module):
    """``ids, mask  ->  last hidden states [batch, length, width]``, float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found


@dataclass(frozen=True)
class Source:
    """A model to measure: ``config`` with random weights or, if there is none, the encoder of the ``demo`` extra."""

    name: str
    cells: tuple[Cell, ...]
    """The memory is measured on the first."""
    config: tuple[tuple[str, int], ...] | None = None

    def model(self, attention: str = "sdpa") -> nn.Module:
        """In float32, ready to infer, without a head; ``attention`` is an implementation of transformers'."""
        if self.config is None:
            return AutoModel.from_pretrained(
                encoder_folder(), attn_implementation=attention, add_pooling_layer=False
            ).eval()
        torch.manual_seed(0)
        config = BertConfig(**self._options)
        config._attn_implementation = attention
        return BertModel(config, add_pooling_layer=False).eval()

    def skeleton(self) -> nn.Module:
        """The model on the meta device."""
        folder = encoder_folder()
        config = AutoConfig.from_pretrained(folder) if self.config is None else BertConfig(**self._options)
        with torch.device("meta"):
            return BertModel(config, add_pooling_layer=False).eval()

    def batches(self, cell: Cell) -> list[Batch]:
        """What a pass over ``cell`` runs."""
        if cell.sentences:
            count = max(SENTENCES, FEWEST_BATCHES * cell.batch)
            return list(_tokenized("validation", count, cell.batch, cell.length))
        assert cell.length is not None
        generator = np.random.default_rng(0)
        ids = generator.integers(5, self.model_vocabulary, (cell.batch, cell.length))
        return [Batch(ids, np.ones_like(ids))]

    def calibration(self) -> list[Batch]:
        """For peers that calibrate: like the batches of the cells, but others."""
        count = CALIBRATION_BATCHES * CALIBRATION_BATCH
        if self.config is None:
            return list(_tokenized("train", count, CALIBRATION_BATCH, None))
        generator = np.random.default_rng(1)
        length = max(cell.length or 2 for cell in self.cells)
        ids = generator.integers(5, self.model_vocabulary, (count, length))
        return [Batch(part, np.ones_like(part)) for part in np.split(ids, CALIBRATION_BATCHES)]

    @property
    def _options(self) -> dict[str, Any]:
        return dict(self.config or ())

    @property
    def model_vocabulary(self) -> int:
        """Ids that random tokens are drawn from."""
        return int(self._options.get("vocab_size", BertConfig().vocab_size))


@functools.cache
def _sentences(split: str) -> list[str]:
    import pandas

    path = Path(data_folder()) / "glue/SST-2" / f"{split}.parquet"
    sentences = [str(text).strip() for text in pandas.read_parquet(path)["sentence"]]
    order = np.random.default_rng(0).permutation(len(sentences))
    return [sentences[i] for i in order]


def _tokenized(split: str, count: int, batch: int, length: int | None) -> Iterator[Batch]:
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    chosen = _sentences(split)[:count]
    for start in range(0, len(chosen), batch):
        texts = chosen[start : start + batch]
        padding = {"padding": "longest"} if length is None else {"padding": "max_length", "max_length": length}
        found = tokenizer(texts, return_tensors="np", truncation=length is not None, **padding)
        yield Batch(found["input_ids"].astype(np.int64), found["attention_mask"].astype(np.int64))


SOURCES = {
    source.name: source
    for source in (
        Source("bert-base", (Cell(1, 128), Cell(8, 128), Cell(32, 128), Cell(1, 32)), ()),
        Source(
            "minilm",
            (Cell(1, None, True), Cell(1, PADDED, True), Cell(32, None, True), Cell(32, PADDED, True)),
        ),
        # To try the benchmark out.
        Source(
            "tiny",
            (Cell(1, 16), Cell(2, 8)),
            (
                ("hidden_size", 64),
                ("num_hidden_layers", 2),
                ("num_attention_heads", 2),
                ("intermediate_size", 128),
                ("vocab_size", 1000),
            ),
        ),
    )
}
