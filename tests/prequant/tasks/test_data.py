import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from prequant.runtime import PrequantError
from prequant.sources import AUTO_CLASSES
from prequant.tasks import SAMPLE, TASKS, TaskError, data, task

from ..tiny import SST2, sentences

ROWS = [("a fine day", 1), ('"Quoted", and then some', 0), ("plain, with a comma", 1)]


def write(path: Path, rows: list[tuple[str, int]] = ROWS, split: list[str] | None = None) -> Path:
    names = ["sentence", "label", *(["split"] if split else [])]
    table: list[list[Any]] = [[*row, *([split[i]] if split else [])] for i, row in enumerate(rows)]
    if path.suffix == ".parquet":
        Dataset.from_dict({name: [row[i] for row in table] for i, name in enumerate(names)}).to_parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in table))
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(str(cell) for cell in row) + "\n" for row in [names, *table]))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([names, *table])
    return path


def pairs(rows: Dataset) -> list[tuple[str, int]]:
    return list(zip(rows["sentence"], rows["label"], strict=True))


def test_an_unknown_task_is_refused_with_those_there_are() -> None:
    assert task("sst2") is TASKS["sst2"]
    with pytest.raises(TaskError, match=r"task 'sst-2' is unknown; did you mean .*sst2"):
        task("sst-2")
    assert issubclass(TaskError, PrequantError)


def test_the_sample_is_what_its_file_says() -> None:
    splits = SST2.load(SAMPLE)
    for split in ("train", "validation"):
        expected = [(row["sentence"], int(row["label"])) for row in sentences() if row["split"] == split]
        assert pairs(splits[split]) == expected
    assert (len(splits["train"]), len(splits["validation"])) == (240, 80)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [suffix for suffix in data.READERS if suffix != ".txt"])
@pytest.mark.parametrize("name", ["validation", "dev"])
def test_a_folder_of_any_type_gives_the_rows_as_they_are(tmp_path: Path, suffix: str, name: str) -> None:
    write(tmp_path / f"train{suffix}")
    write(tmp_path / f"{name}{suffix}", ROWS[:1])
    splits = SST2.load(tmp_path)
    assert pairs(splits["train"]) == ROWS
    assert pairs(splits["validation"]) == ROWS[:1]


def test_a_folder_may_hold_splits_of_two_types_and_other_columns(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", split=["x", "y", "z"])
    write(tmp_path / "valid.csv")
    splits = SST2.load(str(tmp_path))
    assert splits["train"].column_names == splits["validation"].column_names == ["sentence", "label"]
    assert pairs(splits["train"]) == pairs(splits["validation"]) == ROWS


def test_one_file_is_split_by_its_column(tmp_path: Path) -> None:
    file = write(tmp_path / "all.csv", [*ROWS, ("for later", 0)], ["train", "dev", "train", "test"])
    splits = SST2.load(file)
    assert (pairs(splits["train"]), pairs(splits["validation"])) == ([ROWS[0], ROWS[2]], [ROWS[1]])


def test_a_quotation_mark_in_a_tsv_swallows_no_rows(tmp_path: Path) -> None:
    rows = [('"an opening quote and no closing one', 1), ("the next row", 0), ('it ends" here', 1)]
    write(tmp_path / "train.tsv", rows)
    write(tmp_path / "dev.tsv", rows)
    assert pairs(SST2.load(tmp_path)["train"]) == rows


def refuse(path: Path | str | None, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        SST2.load(path)
    assert "\n" not in str(caught.value)


def test_missing_paths_and_splits_are_named(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "none' does not exist")
    refuse(write(tmp_path / "all.csv"), "needs a column 'split' of train and validation; it has sentence, label")
    refuse(write(tmp_path / "some.csv", split=["dev"] * 3), "the train split of .*some.csv is empty")
    (tmp_path / "notes.md").write_text("")
    refuse(tmp_path / "notes.md", "notes.md is of no known type; use one of .parquet, .csv")
    folder = tmp_path / "folder"
    folder.mkdir()
    refuse(folder, r"folder has no train split: expected train\{.parquet,.*found nothing")
    write(folder / "train.csv")
    refuse(folder, "has no validation split: .* found train.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "label": [0]}, "no column 'sentence', which task 'sst2' needs; it has text, label"),
        ({"sentence": ["a"], "target": [0]}, "no column 'label', which task 'sst2' needs; it has sentence, target"),
        ({"sentence": ["a", None], "label": [0, 1]}, "'sentence' of row 1 is None, not text"),
        ({"sentence": [3], "label": [0]}, "'sentence' of row 0 is 3, not text"),
        (
            {"sentence": ["a"], "label": ["positive"]},
            r"the label 'positive' is no integer; expected the integers 0 \(neg",
        ),
        ({"sentence": ["a", "b"], "label": [0, None]}, "the label None is no integer"),
        ({"sentence": ["a"], "label": [0.5]}, "the label 0.5 is no integer"),
        (
            {"sentence": ["a", "b"], "label": [0, 2]},
            r"the label 2 is not one of the integers 0 \(negative\) to 1 \(pos",
        ),
        ({"sentence": ["a", "b"], "label": [-1, -1]}, "the label -1 .*; it looks like a test split with hidden labels"),
    ],
)
def test_rows_that_are_not_the_tasks_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write(tmp_path / "train.parquet")
    Dataset.from_dict(columns).to_parquet(tmp_path / "validation.parquet")
    refuse(tmp_path, f"the validation split of {re.escape(str(tmp_path))}.*{message}")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    (tmp_path / "dev.parquet").write_bytes(b"PAR1 but not really")
    refuse(tmp_path, "dev.parquet can't be read as parquet: ")
    (tmp_path / "dev.parquet").unlink()
    (tmp_path / "dev.json").write_text('{"sentence": "a", ')
    refuse(tmp_path, "dev.json can't be read as json: ")
    (tmp_path / "dev.json").write_text("")
    refuse(tmp_path, "dev.json is empty")


def test_without_a_path_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1], "idx": [0, 1]})
    asked = []

    def hub(*where: str) -> dict[str, Dataset]:
        asked.append(where)
        return {"train": rows, "validation": rows, "test": rows}

    monkeypatch.setattr(data, "load_dataset", hub)
    assert pairs(SST2.load()["train"]) == [("a", 0), ("b", 1)]
    assert asked == [("nyu-mll/glue", "sst2")]

    def offline(*where: str) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(data, "load_dataset", offline)
    refuse(None, r"nyu-mll/glue/sst2 of task 'sst2' can't be had from the hub \(no route\); give a path .*'sample'")


def test_files_may_be_named_for_each_split_and_be_compressed(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.csv"), write(tmp_path / "b,c.jsonl", ROWS[:1])
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(first.read_bytes()))
    splits = SST2.load(f"train={packed},validation={second}")
    assert (pairs(splits["train"]), pairs(splits["validation"])) == (ROWS, ROWS[:1])
    refuse(f"train={packed}", "names no file for validation: write train=FILE,validation=FILE")
    refuse(f"train={packed},validation={tmp_path / 'none.csv'}", "none.csv' does not exist")
    packed.rename(tmp_path / "trainset.csv.gz")
    write(tmp_path / "devset.csv")
    assert pairs(SST2.load(tmp_path)["train"]) == ROWS


def test_another_data_set_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, asked = Dataset.from_dict({"sentence": ["a"], "label": [0]}), []

    def hub(*where: str) -> dict[str, Dataset]:
        asked.append(where)
        return {"train": rows, "dev": rows}

    monkeypatch.setattr(data, "load_dataset", hub)
    assert pairs(SST2.load("some-one/some.thing")["validation"]) == [("a", 0)]
    assert asked == [("some-one/some.thing",)]
    with pytest.raises(TaskError, match=r"the data set nyu-mll/glue/mnli has no validation split; it has train, dev$"):
        data.read_splits("mnli", ("nyu-mll/glue", "mnli"), None, ("validation_matched",))


def test_the_sample_is_for_its_own_task_alone() -> None:
    with pytest.raises(TaskError, match="prequant ships no sample for task 'cola'"):
        task("cola").load(SAMPLE)


def test_every_task_has_a_kind_of_model_and_a_score() -> None:
    for name, known in TASKS.items():
        assert name == known.name and known.kind in AUTO_CLASSES and known.metrics and known.hub
    assert {known.kind for known in TASKS.values()} == set(AUTO_CLASSES)
    assert [name for name, known in TASKS.items() if known.lower_is_better] == ["wikitext2"]
