import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from prequant.evaluation import evaluate
from prequant.passes import Program
from prequant.sources import canonical_program
from prequant.tasks import load_task_data

from .tiny import SST2, encoded, make_model, make_tokenizer

COUNT = 21


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("Roberta")


@pytest.fixture(scope="module")
def alone(model: PreTrainedModel) -> np.ndarray:
    """The logits of each sentence by itself, without padding."""
    tokenizer = make_tokenizer()
    texts = load_task_data(SST2, "sample")["validation"]["sentence"][:COUNT]
    with torch.no_grad():
        return np.concatenate([model(**tokenizer(text, return_tensors="pt")).logits.numpy() for text in texts])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_logits_stand_in_the_order_of_the_rows_however_they_are_batched(
    model: PreTrainedModel, alone: np.ndarray, batch_size: int
) -> None:
    rows = encoded("validation", COUNT)
    result = evaluate(model, SST2, rows, make_tokenizer(), batch_size, progress=False)
    np.testing.assert_allclose(result.logits, alone, rtol=0, atol=1e-5)
    right = sum(int(label == (b > a)) for (a, b), label in zip(alone, rows["labels"], strict=True))
    assert (result.metric_name, result.metric, result.examples) == ("accuracy", right / COUNT, COUNT)


def test_dropout_is_off_and_stays_so(model: PreTrainedModel, alone: np.ndarray) -> None:
    program = canonical_program(model, make_tokenizer())
    for scored in (model, program):
        scored.train()
        result = evaluate(scored, SST2, encoded("validation", COUNT), make_tokenizer(), progress=False)
        np.testing.assert_allclose(result.logits, alone, rtol=0, atol=1e-5)
        assert not scored.training


@pytest.mark.parametrize("progress", [False, True])
def test_a_bar_shows_if_wanted(model: PreTrainedModel, progress: bool, capfd: pytest.CaptureFixture[str]) -> None:
    program: Program | PreTrainedModel = model
    evaluate(program, SST2, encoded("validation", 3), make_tokenizer(), progress=progress)
    printed = capfd.readouterr()
    assert printed.out == "" and ("evaluating sst2" in printed.err) == progress
