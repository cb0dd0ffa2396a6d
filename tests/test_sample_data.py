"""The sample that comes with the package is what its README says it is."""

import csv
import re
from collections import Counter
from importlib import resources

import pytest

FOLDER = resources.files("prequant") / "data"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    lines = (FOLDER / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_there_are_320_sentences_balanced_in_each_split(rows: list[dict[str, str]]) -> None:
    assert Counter((row["split"], row["label"]) for row in rows) == {
        ("train", "0"): 120,
        ("train", "1"): 120,
        ("validation", "0"): 40,
        ("validation", "1"): 40,
    }


def test_no_sentence_is_there_twice(rows: list[dict[str, str]]) -> None:
    """Neither as it stands nor with other punctuation or capitals: a training sentence must not be validated on."""
    words = Counter(" ".join(re.findall(r"\w+", row["sentence"].lower())) for row in rows)
    assert words.most_common(1)[0][1] == 1


def test_sentences_are_clean_text(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert list(row) == ["sentence", "label", "split"]
        sentence = row["sentence"]
        assert sentence == " ".join(sentence.split())
        assert sentence.isascii() and '"' not in sentence, sentence
        assert re.fullmatch(r"[A-Z].*[.!?]", sentence), sentence
        assert 5 <= len(sentence.split()) <= 30, sentence


def test_the_readme_states_the_origin_the_licence_and_the_limits() -> None:
    text = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    assert "CC0-1.0" in text
    assert "wrote and labelled every sentence" in text
    assert "no benchmark" in text
