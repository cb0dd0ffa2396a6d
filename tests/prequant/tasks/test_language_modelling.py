import math

import pytest
import torch
from datasets import Dataset

from prequant.sources import canonical_program
from prequant.tasks import LanguageModelling, Limits, TaskError, task
from prequant.tasks.language_modelling import IGNORED

from ..tiny import make_model, make_tokenizer, sentences

TASK = LanguageModelling("text", ("somewhere",))
ROWS = Dataset.from_dict({"text": [row["sentence"] + "\n" for row in sentences()[:6]]})


def ids() -> list[int]:
    tokenizer = make_tokenizer()
    return [i for text in ROWS["text"] for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_training_pieces_are_the_text_one_behind_the_other() -> None:
    encoded = TASK.encode(ROWS, make_tokenizer(), 16, progress=False)
    assert [i for row in encoded["input_ids"] for i in row][: len(ids())] == ids()[
        : sum(map(len, encoded["input_ids"]))
    ]
    assert {len(row) for row in encoded["input_ids"][:-1]} == {16}
    assert list(encoded["labels"]) == list(encoded["input_ids"])


@pytest.mark.parametrize("stride", [0.01, 0.25, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("length", [2, 16, 31])
def test_every_token_but_the_first_is_scored_once(stride: float, length: int) -> None:
    windows = LanguageModelling("text", ("x",), stride=stride).windows(ids(), length)
    scored = [label for row in windows["labels"] for label in row if label != IGNORED]
    assert scored == ids()[1:]
    for row in windows:
        assert 2 <= len(row["input_ids"]) <= length and row["labels"][0] == IGNORED


@pytest.mark.parametrize("stride", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_is_that_of_each_token_by_itself(stride: float, batch_size: int) -> None:
    tokenizer, model = make_tokenizer(), make_model("GPT2", "LMHeadModel", pad_token_id=0)
    length, text = 12, ids()
    measured = LanguageModelling("text", ("x",), stride=stride)
    step = max(1, min(length - 1, round(length * stride)))
    losses = []
    with torch.no_grad():
        for token in range(1, len(text)):
            # The first window that holds the token.
            start = next(s for s in range(0, len(text), step) if s + length > token)
            logits = model(torch.tensor([text[start:token]])).logits[0, -1].double()
            losses.append(-float(logits.log_softmax(0)[text[token]]))
    expected = math.exp(math.fsum(losses) / len(losses))
    for each in (model, canonical_program(model, tokenizer)):
        result = measured.evaluate(each, ROWS, tokenizer, Limits(length, batch_size), progress=False)
        assert result.metric == pytest.approx(expected, rel=1e-5)
        assert (result.metric_name, result.examples) == ("perplexity", len(text) - 1)


def test_text_that_is_none_is_refused() -> None:
    with pytest.raises(TaskError, match="'text' of row 1 is None, not text"):
        TASK.checked(Dataset.from_dict({"text": ["a", None]}), "here")
    with pytest.raises(TaskError, match="needs two tokens at least; the text has 1"):
        TASK.encode(Dataset.from_dict({"text": ["film"]}), make_tokenizer(), 8)
    assert task("wikitext2").lower_is_better
