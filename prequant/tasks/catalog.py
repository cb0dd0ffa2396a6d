"""The tasks that prequant knows by name."""

from __future__ import annotations

from collections.abc import Mapping

from prequant.passes.options import near_misses

from .base import Task
from .classification import SequenceClassification
from .data_to_text import DART, E2E, WEB_NLG, DataToText
from .errors import TaskError
from .language_modelling import LanguageModelling
from .metrics import ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN
from .question_answering import QuestionAnswering
from .text_classification import TextClassification
from .token_classification import TokenClassification

PAIR = ("sentence1", "sentence2")
NLI = ("entailment", "neutral", "contradiction")
ENTAILED = ("entailment", "not_entailment")


def _glue(name: str) -> tuple[str, ...]:
    return ("nyu-mll/glue", name)


def _mnli(name: str, split: str) -> SequenceClassification:
    columns, rows = ("premise", "hypothesis"), (split, "validation", "dev")
    return SequenceClassification(name, _glue("mnli"), columns, NLI, validation=rows)


GLUE = (
    SequenceClassification("cola", _glue("cola"), labels=("unacceptable", "acceptable"), measures=(MATTHEWS, ACCURACY)),
    SequenceClassification("sst2", _glue("sst2"), labels=("negative", "positive"), has_sample=True),
    SequenceClassification("mrpc", _glue("mrpc"), PAIR, ("not_equivalent", "equivalent"), (F1, ACCURACY)),
    SequenceClassification(
        "qqp", _glue("qqp"), ("question1", "question2"), ("not_duplicate", "duplicate"), (F1, ACCURACY)
    ),
    SequenceClassification("stsb", _glue("stsb"), PAIR, (), (PEARSON, SPEARMAN)),
    _mnli("mnli", "validation_matched"),
    _mnli("mnli-mm", "validation_mismatched"),
    SequenceClassification("qnli", _glue("qnli"), ("question", "sentence"), ENTAILED),
    SequenceClassification("rte", _glue("rte"), PAIR, ENTAILED),
    SequenceClassification("wnli", _glue("wnli"), PAIR, ("not_entailment", "entailment")),
)

AS_TEXT = tuple(TextClassification(f"{task.name}-text", task.hub, task) for task in GLUE)
"""The same for models that write their answers, such as T5."""

ENTITIES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")

OTHERS = (
    TokenClassification("conll2003", ("eriktks/conll2003",), ENTITIES),
    QuestionAnswering("squad", ("rajpurkar/squad",)),
    DataToText("e2e", ("tuetschek/e2e_nlg",), E2E),
    DataToText("dart", ("Yale-LILY/dart",), DART),
    DataToText("webnlg", ("webnlg-challenge/web_nlg", "webnlg_challenge_2017"), WEB_NLG, beams=5, length_penalty=0.8),
    LanguageModelling("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1")),
)

TASKS: Mapping[str, Task] = {task.name: task for task in (*GLUE, *AS_TEXT, *OTHERS)}


def task(name: str) -> Task:
    """The task of that name. Raises :class:`TaskError` with near misses if there is none."""
    if name not in TASKS:
        raise TaskError(f"task {name!r} is unknown{near_misses(name, TASKS)}")
    return TASKS[name]
