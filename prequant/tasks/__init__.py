"""Tasks: where their data comes from, what a model reads of it, how a model is scored. One file per kind of task."""

from .base import Evaluation, Task
from .catalog import TASKS, task
from .classification import SequenceClassification
from .data import SAMPLE
from .data_to_text import DataToText, Reading
from .errors import TaskError
from .language_modelling import LanguageModelling
from .metrics import Metric
from .predicting import Collator, Limits
from .question_answering import QuestionAnswering
from .text_classification import TextClassification
from .token_classification import TokenClassification

__all__ = [
    "SAMPLE",
    "TASKS",
    "Collator",
    "DataToText",
    "Evaluation",
    "LanguageModelling",
    "Limits",
    "Metric",
    "QuestionAnswering",
    "Reading",
    "SequenceClassification",
    "Task",
    "TaskError",
    "TextClassification",
    "TokenClassification",
    "task",
]
