"""Evaluation: a model's predictions on a task, scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from prequant.tasks import Task


@dataclass(frozen=True)
class Evaluation:
    """The score of a model on ``examples`` rows, and its ``logits`` [examples, classes] in the order of the rows."""

    metric_name: str
    metric: float
    examples: int
    logits: np.ndarray


def evaluate(
    model: nn.Module,
    task: Task,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 64,
    progress: bool = True,
) -> Evaluation:
    """Score ``model`` on tokenized rows (see :func:`prequant.tasks.encode`), on the device that it is on.

    Rows of similar length share a batch. The model is left in eval mode.
    """
    model.eval()
    device = next(model.parameters()).device
    collate = DataCollatorWithPadding(tokenizer)
    order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    logits: list[np.ndarray] = []
    starts = range(0, len(order), batch_size)
    with torch.inference_mode():
        for start in tqdm(starts, desc=f"evaluating {task.name}", disable=not progress, leave=False):
            batch: Any = collate([rows[int(i)] for i in order[start : start + batch_size]])
            batch.pop("labels")
            logits.append(model(**batch.to(device)).logits.float().cpu().numpy())
    by_length = np.concatenate(logits)
    scattered = np.empty_like(by_length)
    scattered[order] = by_length
    score = task.metric(scattered.argmax(1), np.asarray(rows["labels"]))
    return Evaluation(task.metric_name, score, len(order), scattered)
