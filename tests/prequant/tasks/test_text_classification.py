from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from prequant.sources import canonical_program
from prequant.tasks import Limits, TaskError, TextClassification, data, task
from prequant.tasks.text_classification import NO_CLASS

from ..tiny import LENGTH, make_model, make_tokenizer

PARTS = ("train", "validation_matched", "validation_mismatched")
SST2, STSB = task("sst2-text"), task("stsb-text")
ROWS = Dataset.from_dict({"sentence": ["a fine day", "a bad film", "good"], "label": [1, 0, 1]})


class Writer(nn.Module):
    """Writes the answer that belongs to a prompt's length."""

    def __init__(self, answers: dict[int, str]) -> None:
        super().__init__()
        self.answers, self.asked = answers, dict[str, Any]()
        self.config = type("Config", (), {"is_encoder_decoder": True})()
        self.nothing = nn.Parameter(torch.zeros(()))

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
        self.asked = settings
        texts = [self.answers[length] for length in attention_mask.sum(1).tolist()]
        tokenizer = make_tokenizer()
        return tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]


def test_prompts_and_answers_are_t5s() -> None:
    assert isinstance(SST2, TextClassification) and isinstance(STSB, TextClassification)
    assert SST2.prompt({"sentence": "a day"}) == "sst2 sentence: a day"
    assert STSB.prompt({"sentence1": "a", "sentence2": "b"}) == "stsb sentence1: a sentence2: b"
    assert [SST2.target(0), SST2.target(1)] == ["negative", "positive"]
    assert [STSB.target(x) for x in (0.0, 2.57, 3.75, 5.0)] == ["0.0", "2.6", "3.8", "5.0"]
    assert [SST2.read(text) for text in ("positive", "negative", "so so")] == [1, 0, NO_CLASS]
    assert [STSB.read(text) for text in ("3.8", "five", "inf", "2")] == [3.8, 0.0, 0.0, 2.0]


def test_data_is_that_of_the_task_in_other_words() -> None:
    assert SST2.load("sample").num_rows == task("sst2").load("sample").num_rows
    with pytest.raises(TaskError, match="prequant ships no sample for task 'mnli'"):
        task("mnli-text").load("sample")


def test_the_splits_of_mnli_are_known_under_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {part: Dataset.from_dict({"premise": [part], "hypothesis": ["b"], "label": [2]}) for part in PARTS}
    monkeypatch.setattr(data, "load_dataset", lambda *where: rows)
    for name, part in (("mnli", PARTS[1]), ("mnli-mm", PARTS[2])):
        for called in (name, f"{name}-text"):
            assert task(called).load()["validation"]["premise"][0] == part


def test_rows_are_encoded_with_the_answer_as_labels() -> None:
    tokenizer = make_tokenizer()
    encoded = SST2.encode(ROWS, tokenizer, LENGTH, progress=False)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert encoded[0]["input_ids"] == tokenizer("sst2 sentence: a fine day")["input_ids"]
    assert encoded[0]["labels"] == tokenizer("positive")["input_ids"]
    batch = SST2.collator(tokenizer)(list(encoded))
    assert batch["labels"].shape[0] == 3 and batch["input_ids"].shape == batch["attention_mask"].shape


def test_what_is_written_is_scored() -> None:
    tokenizer = make_tokenizer()
    words = [word for word in ("good", "bad") if word in tokenizer.get_vocab()]
    assert words == ["good", "bad"]  # the tiny vocabulary has no names of classes, so these stand for them
    named = TextClassification("x", ("y",), type(SST2.of)("x", ("y",), labels=("bad", "good")))  # type: ignore[attr-defined]
    lengths = [len(ids) for ids in named.encode(ROWS, tokenizer, LENGTH, progress=False)["input_ids"]]
    writer = Writer({length: answer for length, answer in zip(lengths, ("good", "film", "good"), strict=True)})
    if lengths[0] == lengths[1]:
        writer.answers[lengths[0]] = "good"
    result = named.evaluate(writer, ROWS, tokenizer, Limits(LENGTH, 2), progress=False)
    expected = [named.read(writer.answers[length]) for length in lengths]
    assert result.predictions.tolist() == expected
    assert result.metric == np.mean(np.array(expected) == ROWS["label"])
    assert writer.asked["max_new_tokens"] == 3 and writer.asked["do_sample"] is False


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_program_writes_what_its_model_writes_and_has_its_loss(batch_size: int) -> None:
    tokenizer, model = make_tokenizer(), make_model("T5", "ForConditionalGeneration")
    program, limits = canonical_program(model, tokenizer), Limits(LENGTH, batch_size)
    results = [SST2.evaluate(each, ROWS, tokenizer, limits, progress=False) for each in (model, program)]
    assert np.array_equal(results[0].predictions, results[1].predictions)
    batch = SST2.collator(tokenizer)(list(SST2.encode(ROWS, tokenizer, LENGTH, progress=False)))
    torch.testing.assert_close(program(**batch).loss, model(**batch).loss)
