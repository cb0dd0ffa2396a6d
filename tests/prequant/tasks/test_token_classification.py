from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from prequant.sources import canonical_program
from prequant.tasks import Limits, TaskError, TokenClassification, task
from prequant.tasks.token_classification import IGNORED

from ..tiny import LENGTH, make_model, make_tokenizer

NAMES = ("O", "B-X", "I-X")
TASK = TokenClassification("names", ("somewhere",), NAMES)
ROWS = Dataset.from_dict(
    {"tokens": [["a", "quiet", "day", "it's"], ["good", "film"]], "ner_tags": [[0, 1, 2, 1], [0, 1]]}
)


class Oracle(nn.Module):
    """Says that certain words begin an entity."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self.ids = torch.tensor([make_tokenizer().get_vocab()[word] for word in words])
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        begins = torch.isin(input_ids, self.ids).float()
        return {"logits": torch.stack([1 - begins, begins, 0 * begins], -1)}


def test_a_word_is_labelled_at_its_first_token() -> None:
    tokenizer = make_tokenizer()
    encoded = TASK.encode(ROWS, tokenizer, LENGTH, progress=False)
    # "it's" is three tokens; the ends are no words.
    assert list(encoded["labels"]) == [[IGNORED, 0, 1, 2, 1, IGNORED, IGNORED, IGNORED], [IGNORED, 0, 1, IGNORED]]
    batch = TASK.collator(tokenizer)(list(encoded))
    assert batch["labels"][1].tolist() == [IGNORED, 0, 1, *[IGNORED] * 5]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_each_word_gets_the_class_of_its_first_token(side: str, batch_size: int) -> None:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    result = TASK.evaluate(Oracle("quiet", "film", "s"), ROWS, tokenizer, Limits(LENGTH, batch_size), progress=False)
    assert result.predictions == [["O", "B-X", "O", "O"], ["O", "B-X"]]
    assert result.scores == {"entity F1": pytest.approx(2 * 1 / (2 + 3)), "token accuracy": pytest.approx(4 / 6)}


def test_words_that_are_cut_off_are_of_the_first_class() -> None:
    result = TASK.evaluate(Oracle("quiet", "day"), ROWS, make_tokenizer(), Limits(4), progress=False)
    assert result.predictions == [["O", "B-X", "O", "O"], ["O", "O"]]


def test_a_program_is_scored_like_its_model_and_trains_on_its_rows() -> None:
    tokenizer, model = make_tokenizer(), make_model(head="ForTokenClassification", num_labels=3)
    program = canonical_program(model, tokenizer)
    results = [TASK.evaluate(each, ROWS, tokenizer, Limits(LENGTH), progress=False) for each in (model, program)]
    assert results[0] == results[1] and TASK.misfit(model.config) == ""
    batch = TASK.collator(tokenizer)(list(TASK.encode(ROWS, tokenizer, LENGTH, progress=False)))
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(program(**batch).loss, expected)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": [["a"]], "tags": [[0]]}, "no column 'ner_tags', which task 'names' needs"),
        ({"tokens": ["a b"], "ner_tags": [[0]]}, "'tokens' of row 0 is 'a b', not a list of words"),
        ({"tokens": [["a", "b"]], "ner_tags": [[0]]}, "row 0 has 2 words and 1 ner_tags"),
        ({"tokens": [["a"]], "ner_tags": [[3]]}, r"row 0 holds 3, not one of the integers 0 \(O\) to 2 \(I-X\)"),
        ({"tokens": [["a"]], "ner_tags": [["O"]]}, "row 0 holds 'O', not one of"),
    ],
)
def test_rows_that_are_not_the_tasks_are_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TASK.checked(Dataset.from_dict(columns), "here")
    assert np.array_equal(TASK.checked(ROWS, "here")["ner_tags"][1], [0, 1])


def test_entities_are_known_by_their_parts() -> None:
    known = task("conll2003")
    assert isinstance(known, TokenClassification) and known.labels[0] == "O" and len(known.labels) == 9
    assert TASK.head_options()["id2label"] == dict(enumerate(NAMES))
