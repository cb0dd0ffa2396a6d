"""The main job on every kind of task, with a model of the family that is usual for it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import prequant
from prequant.compress import compress
from prequant.recipes import PreQuant
from prequant.tasks import LanguageModelling, Limits, QuestionAnswering, Task, TokenClassification, task
from prequant.training import TrainingSettings

from .tiny import LENGTH, make_tokenizer, save_folder, sentences

BUDGET = TrainingSettings(max_steps=2, batch_size=4, dropout=False, weight_decay=0.0)
TEXTS = [row["sentence"] for row in sentences()[:12]]

SQUAD = QuestionAnswering("squad", ("x",), stride=4, longest_answer=4)
NAMES = TokenClassification("names", ("x",), ("O", "B-X", "I-X"))
RUNNING = LanguageModelling("running", ("x",))

CASES: dict[str, tuple[str, str, Task, dict[str, list[Any]]]] = {
    "classes of pairs": (
        *("Roberta", "Model", task("mrpc")),
        {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "label": [i % 2 for i in range(12)]},
    ),
    "numbers": (
        *("Roberta", "Model", task("stsb")),
        {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "label": [i / 2 for i in range(12)]},
    ),
    "answers": (
        *("Bert", "Model", SQUAD),
        {
            "question": ["what is it"] * 12,
            "context": TEXTS,
            "answers": [{"text": [text.split()[1]], "answer_start": [text.index(" ") + 1]} for text in TEXTS],
        },
    ),
    "entities": (
        *("Bert", "Model", NAMES),
        {
            "tokens": [text.split() for text in TEXTS],
            "ner_tags": [[i % 3 for i, _ in enumerate(t.split())] for t in TEXTS],
        },
    ),
    "classes as text": (
        *("T5", "ForConditionalGeneration", task("sst2-text")),
        {"sentence": TEXTS, "label": [i % 2 for i in range(12)]},
    ),
    "running text": (*("GPT2", "LMHeadModel", RUNNING), {"text": TEXTS}),
}


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation_bits", [0, 8])
def test_the_main_job_goes_all_the_way(case: str, activation_bits: int, tmp_path: Path) -> None:
    family, head, of, rows = CASES[case]
    options = {"pad_token_id": 0} if family == "GPT2" else {}
    folder, data = save_folder(tmp_path / "model", family, head, **options), tmp_path / "data"
    data.mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict(rows).to_parquet(data / f"{split}.parquet")
    recipe = PreQuant(training=dataclasses.replace(BUDGET), activation_bits=activation_bits)
    report = compress(folder, recipe, of, data, tmp_path / "out", max_length=LENGTH, progress=False)
    assert report.baseline is not None and list(report.compressed.scores) == [metric.name for metric in of.metrics]
    assert report.compressed.bytes_on_disk < report.baseline.bytes_on_disk
    saved: Any = prequant.load(tmp_path / "out")
    assert saved.task == of.kind and not of.misfit(saved.config)
    again = of.evaluate(saved, of.load(data)["validation"], make_tokenizer(), Limits(LENGTH), progress=False)
    assert again.scores == report.compressed.scores and again.examples == report.examples
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert written == report.compressed.bytes_on_disk
