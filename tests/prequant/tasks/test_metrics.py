"""Scores against their definitions, or worked by hand."""

import math
from typing import Any

import numpy as np
import pytest

from prequant.tasks import TASKS, Metric, TaskError
from prequant.tasks import metrics as m

LABELS = np.array([1, 1, 1, 0, 0, 0, 0, 1])
PREDICTED = np.array([1, 0, 1, 0, 0, 1, -1, 1])  # 3 true and 1 false positives, 1 false negative


def test_classes() -> None:
    assert m.ACCURACY(PREDICTED, LABELS) == 5 / 8
    assert m.F1(PREDICTED, LABELS) == pytest.approx(2 * 3 / (4 + 4))
    binary = np.where(PREDICTED == -1, 0, PREDICTED)
    expected = np.corrcoef(binary, LABELS)[0, 1]  # of two classes, Matthews' is Pearson's
    assert m.MATTHEWS(binary, LABELS) == pytest.approx(expected)
    assert m.MATTHEWS(np.zeros(8, int), LABELS) == 0.0
    assert m.F1(np.zeros(8, int), LABELS) == 0.0


def test_numbers() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 4.0, 9.0, 10.0])
    assert m.PEARSON(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert m.SPEARMAN(x, y) == pytest.approx(1.0) and m.SPEARMAN(-x, y) == pytest.approx(-1.0)
    assert m.PEARSON(np.ones(4), y) == 0.0


def test_entities_count_as_wholes() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["O", "B-ORG"]]
    assert m.ENTITY_F1(said, true) == pytest.approx(2 / 3)  # the person is cut short, so neither found nor right
    assert m.TOKEN_ACCURACY(said, true) == pytest.approx(5 / 6)


TEXTS = ["the cat sat on the mat", "a dog barks"]
REFERENCES = [["the cat sat on the mat", "there is a cat"], ["the dog is barking loudly", "a dog barks", "dogs bark"]]


def test_what_is_a_reference_scores_the_most() -> None:
    assert m.BLEU(TEXTS[:1], REFERENCES[:1]) == pytest.approx(100)
    assert m.ROUGE_L(TEXTS, REFERENCES) == pytest.approx(100)
    other = ["the mat sat on the cat", "a dog barks"]
    assert m.NIST(TEXTS, REFERENCES) > m.NIST(other, REFERENCES) > 0
    assert m.BLEU(TEXTS, REFERENCES) > m.BLEU(other, REFERENCES)


def test_bleu_by_hand() -> None:
    # 1- to 4-grams that match: 5/6, 3/5, 2/4, 1/3; as long as its reference, so no penalty.
    precisions = [5 / 6, 3 / 5, 2 / 4, 1 / 3]
    expected = 100 * math.exp(sum(map(math.log, precisions)) / 4)
    assert m.BLEU(["the cat sat on a mat"], [["the cat sat on the mat"]]) == pytest.approx(expected)


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence of 4 and 5 words is 3 long: precision 3/4, recall 3/5.
    assert m.ROUGE_L(["one two six four"], [["one two three four five", "x"]]) == pytest.approx(100 * 2 * 3 / 9)


def test_texts_that_say_nothing_score_nothing() -> None:
    assert m.BLEU(["", ""], REFERENCES) == m.ROUGE_L(["", ""], REFERENCES) == m.NIST(["", ""], REFERENCES) == 0.0


def test_perplexity() -> None:
    assert m.PERPLEXITY(4 * math.log(7), 4) == pytest.approx(7) and m.PERPLEXITY.lower_is_better


def test_a_library_that_is_missing_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for known in TASKS.values():
        known.check_metrics()
    absent: Any = Metric("a score", lambda *_: 0.0, "no_such_library.part")
    with pytest.raises(TaskError, match=r"'a score' needs no_such_library: pip install 'prequant\[metrics\]'"):
        absent.check()
