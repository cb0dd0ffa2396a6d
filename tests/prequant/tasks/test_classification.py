from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from prequant.passes import Program
from prequant.sources import canonical_program
from prequant.tasks import SAMPLE, Limits, SequenceClassification, TaskError, task

from ..tiny import LENGTH, SST2, make_model, make_tokenizer

COUNT = 21
STSB = task("stsb")
PAIRS: dict[str, list[Any]] = {
    "sentence1": ["a fine day", "one"],
    "sentence2": ["a day", "two of them"],
    "label": [2.5, 0.0],
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("Roberta")


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return SST2.load(SAMPLE)["validation"].select(range(COUNT))


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel, rows: Dataset) -> np.ndarray:
    """The logits of each sentence by itself, without padding."""
    tokenizer = make_tokenizer()
    with torch.no_grad():
        texts = (tokenizer(text, return_tensors="pt") for text in rows["sentence"])
        return np.concatenate([model(**text).logits.numpy() for text in texts])


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1", "2"], "the label '1' of row 0"),
        ([1, None], "the label None of row 1"),
        ([1.0, float("inf")], "the label inf of row 1"),
    ],
)
def test_numbers_have_to_be_some(labels: list[object], message: str) -> None:
    with pytest.raises(TaskError, match=f"here: {message} is no finite number"):
        STSB.checked(Dataset.from_dict({**PAIRS, "label": labels}), "here")


def test_rows_are_encoded_as_the_tokenizer_does_it_alone(rows: Dataset) -> None:
    tokenizer = make_tokenizer()
    encoded = SST2.encode(rows, tokenizer, LENGTH, progress=False)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert list(encoded["labels"]) == list(rows["label"])
    assert list(encoded["input_ids"]) == [tokenizer(text)["input_ids"] for text in rows["sentence"]]
    short = SST2.encode(rows, tokenizer, 5, progress=False)
    for cut, whole in zip(short["input_ids"], encoded["input_ids"], strict=True):
        assert len(cut) == 5 and cut[:4] == whole[:4] and cut[4] == whole[-1]


def test_pairs_are_encoded_together_and_numbers_are_floats() -> None:
    tokenizer = make_tokenizer()
    encoded = STSB.encode(Dataset.from_dict(PAIRS), tokenizer, LENGTH, progress=False)
    assert list(encoded["input_ids"][1]) == tokenizer("one", "two of them")["input_ids"]
    assert list(encoded["labels"]) == [2.5, 0.0]


@pytest.mark.parametrize("length", [2, 0, -1, LENGTH + 1])
def test_lengths_that_fit_no_text_or_no_model_are_refused(rows: Dataset, length: int) -> None:
    with pytest.raises(TaskError, match=f"max_length={length}: expected 3 to {LENGTH} tokens"):
        SST2.encode(rows, make_tokenizer(), length)


@pytest.mark.parametrize("shown", [True, False])
def test_bars_are_hidden_only_while_it_lasts(shown: bool, capfd: pytest.CaptureFixture[str]) -> None:
    # Rows in memory: of those from a file, ``datasets`` keeps what it made before, and shows no bar.
    rows = Dataset.from_dict({"sentence": ["one", "two", "three"], "label": [0, 1, 0]})
    assert not datasets.are_progress_bars_disabled()
    SST2.encode(rows, make_tokenizer(), LENGTH, progress=shown)
    assert ("tokenizing sst2" in capfd.readouterr().err) == shown
    assert not datasets.are_progress_bars_disabled()


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_logits_stand_in_the_order_of_the_rows_however_they_are_batched(
    model: PreTrainedModel, rows: Dataset, alone: np.ndarray, batch_size: int
) -> None:
    result = SST2.evaluate(model, rows, make_tokenizer(), Limits(LENGTH, batch_size), progress=False)
    np.testing.assert_allclose(result.predictions, alone, rtol=0, atol=1e-5)
    right = sum(int(label == (b > a)) for (a, b), label in zip(alone, rows["label"], strict=True))
    assert (result.metric_name, result.metric, result.examples) == ("accuracy", right / COUNT, COUNT)


def test_dropout_is_off_and_stays_so(model: PreTrainedModel, rows: Dataset, alone: np.ndarray) -> None:
    program = canonical_program(model, make_tokenizer())
    for scored in (model, program):
        scored.train()
        result = SST2.evaluate(scored, rows, make_tokenizer(), Limits(LENGTH), progress=False)
        np.testing.assert_allclose(result.predictions, alone, rtol=0, atol=1e-5)
        assert not scored.training


@pytest.mark.parametrize("progress", [False, True])
def test_a_bar_shows_if_wanted(
    model: PreTrainedModel, rows: Dataset, progress: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    program: Program | PreTrainedModel = model
    SST2.evaluate(program, rows, make_tokenizer(), Limits(LENGTH), progress=progress)
    printed = capfd.readouterr()
    assert printed.out == "" and ("evaluating sst2" in printed.err) == progress


def test_a_number_is_scored_by_how_it_goes_along_with_the_true_one() -> None:
    table = Dataset.from_dict({**{name: values * 3 for name, values in PAIRS.items()}, "label": np.arange(6.0)})
    model, tokenizer = make_model(num_labels=1, problem_type="regression"), make_tokenizer()
    program = canonical_program(model, tokenizer)
    results = [STSB.evaluate(each, table, tokenizer, Limits(LENGTH), progress=False) for each in (model, program)]
    said = results[0].predictions[:, 0]
    expected = np.corrcoef(said, np.arange(6.0))[0, 1]
    assert list(results[0].scores) == ["Pearson correlation", "Spearman correlation"]
    assert results[0].metric == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(results[1].predictions[:, 0], said, atol=1e-5)
    batch = STSB.collator(tokenizer)([STSB.encode(table, tokenizer, LENGTH, progress=False)[i] for i in range(6)])
    loss = program(**batch).loss
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(torch.tensor(said), torch.arange(6.0)))


def test_heads_and_misfits() -> None:
    assert STSB.head_options() == {"num_labels": 1, "problem_type": "regression"}
    options = SST2.head_options()
    assert options["id2label"] == {0: "negative", 1: "positive"} and options["label2id"]["positive"] == 1
    three = make_model(num_labels=3).config
    assert SST2.misfit(three) == "it has 3 classes; sst2 has 2"
    assert isinstance(STSB, SequenceClassification) and "stsb has 1" in STSB.misfit(three)
    assert task("mnli").misfit(three) == ""
