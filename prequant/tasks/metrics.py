"""How predictions are scored. Each metric is one function of a library that works without a network."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np

from .errors import TaskError

EXTRA = "prequant[metrics]"


@dataclass(frozen=True)
class Metric:
    """A score of all predictions at once.

    ``function`` takes predictions and targets, of the kind that the task says; ``module`` is what it needs beyond
    prequant's own dependencies, and comes with the extra ``metrics``. Scores are shares, correlations or scores of
    their libraries: nothing is multiplied by 100 that was not before.
    """

    name: str
    function: Callable[[Any, Any], float]
    module: str = ""
    lower_is_better: bool = False

    def __call__(self, predictions: Any, targets: Any) -> float:
        """The score."""
        return float(self.function(predictions, targets))

    def check(self) -> None:
        """Raise :class:`TaskError` if what it needs is not installed."""
        if self.module:
            _library(self.module, self.name)


def _library(name: str, metric: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise TaskError(f"the metric {metric!r} needs {package}: pip install '{EXTRA}' ({error})") from error


# ---- classes and numbers ---------------------------------------------------------------------------------------------


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    # Of the class 1 against all else, as GLUE has it; a prediction may be no class at all (-1).
    score = _library("sklearn.metrics", "F1").f1_score
    return float(score(labels == 1, predictions == 1, zero_division=0.0))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(_library("sklearn.metrics", "Matthews correlation").matthews_corrcoef(labels, predictions))


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _correlation("pearsonr", predictions, labels)


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _correlation("spearmanr", predictions, labels)


def _correlation(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0  # what is constant goes along with nothing; scipy warns, and gives NaN
    return float(getattr(_library("scipy.stats", name), name)(predictions, labels).statistic)


ACCURACY = Metric("accuracy", _accuracy)
F1 = Metric("F1", _f1, "sklearn.metrics")
MATTHEWS = Metric("Matthews correlation", _matthews, "sklearn.metrics")
PEARSON = Metric("Pearson correlation", _pearson, "scipy.stats")
SPEARMAN = Metric("Spearman correlation", _spearman, "scipy.stats")


# ---- entities --------------------------------------------------------------------------------------------------------


def _entity_f1(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    score = _library("seqeval.metrics", "entity F1").f1_score
    return float(score(labels, predictions, zero_division=0))


def _token_accuracy(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> float:
    pairs = [pair for row in zip(predictions, labels, strict=True) for pair in zip(*row, strict=True)]
    return fmean(a == b for a, b in pairs)


ENTITY_F1 = Metric("entity F1", _entity_f1, "seqeval.metrics")
TOKEN_ACCURACY = Metric("token accuracy", _token_accuracy)


# ---- generated text --------------------------------------------------------------------------------------------------


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    most = max(map(len, references))
    # sacrebleu takes the n-th references of all texts together, None where a text has fewer.
    columns = [[several[n] if n < len(several) else None for several in references] for n in range(most)]
    return float(_library("sacrebleu", "BLEU").corpus_bleu(list(texts), columns).score)


def _rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    scorer = _library("rouge_score.rouge_scorer", "ROUGE-L").RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        scorer.score_multi(several, text)["rougeL"].fmeasure for text, several in zip(texts, references, strict=True)
    ]
    return 100 * fmean(best)


def _nist(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # BLEU's own tokens, so that the two scores differ in what they weigh and not in what they count.
    tokenize = _library("sacrebleu.tokenizers.tokenizer_13a", "NIST").Tokenizer13a()
    words = [[tokenize(text).split() for text in several] for several in references]
    said = [tokenize(text).split() for text in texts]
    longest = max(map(len, said))
    if not longest:
        return 0.0
    return float(_library("nltk.translate.nist_score", "NIST").corpus_nist(words, said, n=min(5, longest)))


BLEU = Metric("BLEU", _bleu, "sacrebleu")
ROUGE_L = Metric("ROUGE-L", _rouge_l, "rouge_score.rouge_scorer")
NIST = Metric("NIST", _nist, "nltk.translate.nist_score")


# ---- likelihood ------------------------------------------------------------------------------------------------------


def _perplexity(total: float, tokens: int) -> float:
    return math.exp(total / tokens)


PERPLEXITY = Metric("perplexity", _perplexity, lower_is_better=True)
