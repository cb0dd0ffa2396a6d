"""What a training computes in: products in bfloat16 take a fraction of the time where the processor has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from prequant.tasks import Collator

Precision: TypeAlias = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a forward pass. In bfloat16, matrix products and attention round what they read and give to it
    (``torch.autocast``); parameters, gradients of them, the optimizer, losses, and rounding to codes stay in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


LENGTHS = 16
"""Batches that are computed in bfloat16 have lengths that are multiples of so many tokens."""


class EvenLengths:
    """Pads batches to multiples of :data:`LENGTHS`, where the tokenizer's limit allows it.

    oneDNN makes kernels in bfloat16 for every shape, and keeps them: some MB for each length that a training meets.
    """

    def __init__(self, collate: DataCollatorWithPadding | DataCollatorForSeq2Seq) -> None:
        self._plain, self._even = collate, replace(collate, pad_to_multiple_of=LENGTHS)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """The batch of ``rows``."""
        longest = max(len(row["input_ids"]) for row in rows)
        fits = -(-longest // LENGTHS) * LENGTHS <= self._plain.tokenizer.model_max_length
        return (self._even if fits else self._plain)(rows)


def collator_for(precision: Precision, collate: Collator) -> Collator:
    """What makes batches that are to be computed in ``precision``."""
    if precision == "bfloat16" and isinstance(collate, (DataCollatorWithPadding, DataCollatorForSeq2Seq)):
        return EvenLengths(collate)
    return collate
