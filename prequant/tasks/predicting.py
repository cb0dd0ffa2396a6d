"""Running a model over encoded rows, batches of similar length together, and putting its outputs back into order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from .base import Collator

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What models read of encoded rows, where it is there."""


def batches(
    model: nn.Module,
    rows: Dataset,
    columns: Sequence[str],
    collate: Collator,
    batch_size: int,
    description: str,
    progress: bool,
) -> Iterator[tuple[np.ndarray, Any]]:
    """Batches of ``columns``, on the model's device, each with the numbers of its rows; long ones last.

    The model is put into eval mode; what is done with a batch happens without gradients.
    """
    model.eval()
    device = next(model.parameters()).device
    order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    read = rows.select_columns(list(columns))
    with torch.inference_mode():
        for start in tqdm(range(0, len(order), batch_size), desc=description, disable=not progress, leave=False):
            numbers = order[start : start + batch_size]
            yield numbers, collate([read[int(i)] for i in numbers]).to(device)


def outputs(
    model: nn.Module,
    rows: Dataset,
    names: Sequence[str],
    collate: Collator,
    batch_size: int,
    description: str,
    progress: bool,
) -> dict[str, list[np.ndarray]]:
    """The outputs ``names`` of each row, in the order of the rows, padding and all."""
    columns = [name for name in rows.column_names if name in INPUTS]
    found: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
    for numbers, batch in batches(model, rows, columns, collate, batch_size, description, progress):
        result: Mapping[str, Tensor] = model(**batch)
        for name in names:
            for number, output in zip(numbers, result[name].float().cpu().numpy(), strict=True):
                found[name][number] = output
    return found
