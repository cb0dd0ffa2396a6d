"""Answers out of contexts that are cut into parts, by a model whose logits are known."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from torch import Tensor, nn

from prequant.sources import canonical_program
from prequant.tasks import Limits, QuestionAnswering, TaskError, task
from prequant.tasks.question_answering import EXACT_MATCH, F1, normalized

from ..tiny import LENGTH, make_model, make_tokenizer

SQUAD = QuestionAnswering("squad", ("somewhere",), stride=4, longest_answer=3)
CONTEXT = (
    "It was a quiet film , but the end of it was slow and the music bad ; still , all in all a good day for us two ."
)


def rows(*answers: str, context: str = CONTEXT, question: str = "was the music good") -> Dataset:
    starts = [context.index(answer) for answer in answers]
    return Dataset.from_list(
        [{"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}]
    )


class Oracle(nn.Module):
    """Says that answers begin and end with certain tokens, if it sees them both; else with the first."""

    def __init__(self, first: str, last: str) -> None:
        super().__init__()
        words = make_tokenizer().get_vocab()
        self.first, self.last = words[first], words[last]
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        start, end = (input_ids == self.first).float(), (input_ids == self.last).float()
        seen = (start.any(1) & end.any(1)).float()[:, None]
        return {"start_logits": 5 * start * seen, "end_logits": 5 * end * seen}


# ---- the score -------------------------------------------------------------------------------------------------------


def test_answers_are_compared_without_case_articles_and_punctuation() -> None:
    assert normalized(" The  end,  an 'A' ") == "end"
    assert EXACT_MATCH(["The Music!", "film"], [["no", "music"], ["a quiet film"]]) == 50.0
    assert F1(["the quiet day", "x"], [["quiet film", "a day"], ["y"]]) == pytest.approx(100 * (2 / 3) / 2)


@pytest.mark.parametrize(
    ("system", "exact", "f1"), [("bert_ensemble", 86.2062, 92.1956), ("logistic_regression", 40.1419, 50.9815)]
)
def test_known_systems_get_their_known_scores(shared_data: Path | None, system: str, exact: float, f1: float) -> None:
    if shared_data is None:
        pytest.skip("PREQUANT_DATA is not set: the answers of real systems are not at hand")
    folder = shared_data / "squad"
    with gzip.open(folder / "predictions" / f"{system}.json.gz") as file:
        answers = json.load(file)
    questions = load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train")
    said = [answers.get(name, "") for name in questions["id"]]
    truths = [found["text"] for found in questions["answers"]]
    assert EXACT_MATCH(said, truths) == pytest.approx(exact, abs=5e-5)
    assert F1(said, truths) == pytest.approx(f1, abs=5e-5)


# ---- parts of contexts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [LENGTH, 24, 14])
@pytest.mark.parametrize("answer", ["It", "quiet film", "the music", "good day", "."])
def test_targets_are_where_the_answer_stands_in_each_part(length: int, answer: str) -> None:
    tokenizer = make_tokenizer()
    encoded = SQUAD.encode(rows(answer), tokenizer, length, progress=False)
    assert encoded.column_names == ["input_ids", "attention_mask", "start_positions", "end_positions"]
    assert len(encoded) > (length < LENGTH)
    wanted = tokenizer(answer, add_special_tokens=False)["input_ids"]
    found = []
    for part in encoded:
        assert len(part["input_ids"]) <= length
        first, last = part["start_positions"], part["end_positions"]
        found.append(part["input_ids"][first : last + 1] if last else None)
    assert wanted in found and all(ids in (None, wanted) for ids in found)


@pytest.mark.parametrize("length", [LENGTH, 24, 14])
@pytest.mark.parametrize(("first", "last", "answer"), [("quiet", "film", "quiet film"), ("music", "bad", "music bad")])
def test_the_answer_is_the_text_as_it_stands_in_the_context(length: int, first: str, last: str, answer: str) -> None:
    tokenizer = make_tokenizer()
    context = CONTEXT.replace("music bad", "Music  Bad").replace("quiet film", "QUIET film")
    truth = next(text for text in ("QUIET film", "Music  Bad") if text.lower().split() == answer.split())
    for batch_size in (1, 8):
        result = SQUAD.evaluate(
            Oracle(first, last), rows(truth, context=context), tokenizer, Limits(length, batch_size), progress=False
        )
        assert result.predictions == [truth]
        assert result.scores == {"F1": 100.0, "exact match": 100.0} and result.examples == 1


def test_an_answer_does_not_run_backwards_nor_too_long_nor_into_the_question() -> None:
    tokenizer, limits = make_tokenizer(), Limits(LENGTH)
    for first, last in (("film", "quiet"), ("quiet", "end"), ("music", "good")):
        answer = SQUAD.evaluate(Oracle(first, last), rows("It"), tokenizer, limits, progress=False).predictions[0]
        assert answer in CONTEXT and len(answer.split()) <= 3


def test_long_questions_leave_room_for_the_context() -> None:
    table = rows("quiet film", question="was it good " * 20)
    encoded = SQUAD.encode(table, make_tokenizer(), 16, progress=False)
    assert max(len(part["input_ids"]) for part in encoded) <= 16 and any(encoded["end_positions"])


def test_a_program_is_scored_like_its_model_and_trains_on_its_rows() -> None:
    tokenizer, model = make_tokenizer(), make_model(head="ForQuestionAnswering")
    program, limits = canonical_program(model, tokenizer), Limits(24)
    table = rows("quiet film", "film")
    results = [SQUAD.evaluate(each, table, tokenizer, limits, progress=False) for each in (model, program)]
    assert results[0] == results[1]
    encoded = SQUAD.encode(table, tokenizer, 24, progress=False)
    batch = SQUAD.collator(tokenizer)(list(encoded))
    torch.testing.assert_close(program(**batch).loss, model(**batch).loss)


# ---- rows that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": [], "answer_start": []}, "not {text: "),
        ({"text": ["quiet"], "answer_start": [0]}, "answer 'quiet' of row 0 does not stand at 0 of its context"),
        ("quiet", "'answers' of row 0 is 'quiet', not {text: "),
    ],
)
def test_answers_that_are_none_are_named(answers: Any, message: str) -> None:
    table = Dataset.from_list([{"question": "q", "context": CONTEXT, "answers": answers}])
    with pytest.raises(TaskError, match=message):
        SQUAD.checked(table, "here")


def test_what_can_not_be_cut_is_refused() -> None:
    slow: Any = SimpleNamespace(is_fast=False)
    with pytest.raises(TaskError, match="task 'squad' needs a fast tokenizer"):
        SQUAD.encode(rows("It"), slow, LENGTH)
    with pytest.raises(TaskError, match=f"max_length=8: expected 9 to {LENGTH} tokens"):
        SQUAD.encode(rows("It"), make_tokenizer(), 8)
    assert isinstance(task("squad"), QuestionAnswering) and np.isfinite(task("squad").longest_answer)  # type: ignore[attr-defined]
