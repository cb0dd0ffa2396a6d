"""The training losses of language models, by task: what transformers' models compute when they are given labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss import loss_utils
from transformers.models.auto import modeling_auto

from prequant.runtime import PrequantError

SEQUENCE_CLASSIFICATION = "sequence-classification"
TOKEN_CLASSIFICATION = "token-classification"
QUESTION_ANSWERING = "question-answering"
MASKED_LM = "masked-lm"
CAUSAL_LM = "causal-lm"
SEQ2SEQ_LM = "seq2seq-lm"

CLASSES = {
    SEQUENCE_CLASSIFICATION: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TOKEN_CLASSIFICATION: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    QUESTION_ANSWERING: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MASKED_LM: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    SEQ2SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""Model classes of each task, by model type."""

LABELS = {task: ("labels",) for task in CLASSES} | {QUESTION_ANSWERING: ("start_positions", "end_positions")}
"""The targets that a task's loss takes."""

LOGITS = {task: ("logits",) for task in CLASSES} | {QUESTION_ANSWERING: ("start_logits", "end_logits")}
"""The outputs that it takes, which come first."""

_SHARED_BY_ITEMS = (CAUSAL_LM, MASKED_LM, QUESTION_ANSWERING)
"""Tasks whose shared loss function takes the number of items in the whole batch of an optimizer step."""


def task_of(model: PreTrainedModel) -> str | None:
    """The task of a model's head, by the nearest of its classes that transformers knows; None if it has none."""
    for kind in type(model).__mro__:
        for task, classes in CLASSES.items():
            if kind.__name__ in classes.values():
                return task
    return None


def counts_items(model: PreTrainedModel, task: str | None) -> bool:
    """Whether the model divides its loss by ``num_items_in_batch`` where that is given.

    Models that compute their loss with transformers' shared function of the task do; those that call cross entropy
    themselves take the argument and ignore it.
    """
    forward: Any = inspect.unwrap(type(model).forward)
    return task in _SHARED_BY_ITEMS and "loss_function" in forward.__code__.co_names


def accepts_loss_kwargs(model: PreTrainedModel) -> bool:
    """What the ``Trainer`` finds out about a model in order to scale losses over accumulated batches."""
    stated = getattr(model, "accepts_loss_kwargs", None)
    if stated is not None:
        return bool(stated)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def loss_of(
    task: str, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], config: PretrainedConfig, items: Any = None
) -> Tensor:
    """The scalar loss of a model's outputs.

    ``outputs`` holds ``logits``, or ``start_logits`` and ``end_logits`` [batch, length]; ``targets`` the labels of the
    task, with -100 where there is none. Sequence classification goes by ``config.problem_type``, and sets it where it
    is None, as models do. ``items``: divide the sum over items by this instead of by their number here.
    """
    options = {} if items is None else {"num_items_in_batch": items}
    if task == QUESTION_ANSWERING:
        return loss_utils.ForQuestionAnsweringLoss(outputs["start_logits"], outputs["end_logits"], **targets, **options)
    logits, labels = outputs["logits"], targets["labels"]
    if task == SEQUENCE_CLASSIFICATION:
        return loss_utils.ForSequenceClassificationLoss(labels, logits, config)
    if task == TOKEN_CLASSIFICATION:
        return loss_utils.ForTokenClassification(logits, labels, config)
    if task == CAUSAL_LM:  # the label of a position is the token after it
        return loss_utils.ForCausalLMLoss(logits, labels, logits.shape[-1], **options)
    return loss_utils.ForMaskedLMLoss(logits, labels, logits.shape[-1], **options)


def shift_right(labels: Tensor, config: PretrainedConfig) -> Tensor:
    """A decoder's inputs [batch, length] from its labels: a start token, then all but the last, padding for -100.

    Raises :class:`PrequantError` for a config without ``decoder_start_token_id`` or ``pad_token_id``.
    """
    start, pad = getattr(config, "decoder_start_token_id", None), getattr(config, "pad_token_id", None)
    if start is None or pad is None:
        raise PrequantError(
            "decoder_input_ids can't be made from labels: "
            f"config.decoder_start_token_id is {start}, config.pad_token_id is {pad}"
        )
    shifted = labels.new_full(labels.shape, start)
    shifted[..., 1:] = labels[..., :-1]
    return shifted.masked_fill(shifted == -100, pad)
