"""prequant view, from the command line to the file."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prequant.cli import app
from prequant.view.recorder import FEW_ERRORS, NO_BATCH, NO_ORIGINAL

from ..tiny import save_folder

PIPELINE = "canonicalize,split-outliers{ratio=0.01},quantize-weights{bits=4},lower"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "encoder"
    return save_folder(folder, head="ForSequenceClassification", num_hidden_layers=1)


@pytest.fixture(scope="module")
def compressed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "compressed"
    assert run("opt", model, "--pipeline", PIPELINE, "--out", out, "--no-reports").exit_code == 0
    return out


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})


def succeed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.stdout)


def held(path: Path) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="record">(.*?)</script>', path.read_text("utf-8"))
    return json.loads(text)


def test_a_pipeline_over_a_model_measured_on_the_sample(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.html"
    text = succeed("view", model, "--pipeline", PIPELINE, "--data", "sample", "--out", out, "--quiet")
    assert text == f"wrote {out}\n"
    record = held(out)
    assert record["title"] == "encoder · BertForSequenceClassification"
    assert re.fullmatch(r"on 8 texts of up to \d+ tokens", record["batch"])
    assert [stage["title"] for stage in record["stages"]][1:] == [
        "canonicalize",
        "split-outliers",
        "quantize-weights",
        "lower",
    ]
    assert record["stages"][1]["results"] == {"logits": "inf"} and 5 < record["stages"][-1]["results"]["logits"] < 60


def test_a_saved_folder_shows_what_was_recorded(compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.html"
    succeed("view", compressed, "--out", out, "--quiet")
    record = held(out)
    recorded = json.loads((compressed / "prequant-report.json").read_text())
    errors = {row["name"]: row["sqnr"] for row in recorded["weights"] if row["sqnr"] is not None}
    assert errors and len(record["stages"]) == 1
    assert {w["name"]: w["sqnr"] for w in record["weights"] if w["recorded"]} == errors


def test_a_saved_folder_without_errors_says_so(compressed: Path, tmp_path: Path) -> None:
    (compressed / "prequant-report.json").rename(tmp_path / "report.json")
    try:
        out = tmp_path / "graph.html"
        text = succeed("view", compressed, "--no-measure", "--out", out, "--quiet")
    finally:
        (tmp_path / "report.json").rename(compressed / "prequant-report.json")
    assert text.splitlines()[:2] == [NO_ORIGINAL, NO_BATCH]
    record = held(out)
    assert record["notes"] == [NO_ORIGINAL, NO_BATCH]
    assert {weight["sqnr"] for weight in record["weights"] if ":" in weight["format"]} == {None}


def test_against_the_original_errors_are_measured(model: Path, compressed: Path, tmp_path: Path) -> None:
    out = tmp_path / "graph.html"
    succeed("view", compressed, "--against", model, "--out", out, "--quiet")
    record = held(out)
    assert FEW_ERRORS in record["notes"]
    assert not any(weight["recorded"] for weight in record["weights"])
    recorded = json.loads((compressed / "prequant-report.json").read_text())
    errors = {row["name"]: row["sqnr"] for row in recorded["weights"] if row["sqnr"] is not None}
    measured = {weight["name"]: weight["sqnr"] for weight in record["weights"] if weight["name"] in errors}
    assert measured == pytest.approx(errors)
    assert record["stages"][0]["errors"]


@pytest.mark.parametrize("suffix", ["svg", "png", "dot"])
def test_pictures_by_the_name_of_the_file(suffix: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / f"graph.{suffix}"
    succeed("view", model, "--no-measure", "--out", out, "--quiet")
    assert out.read_bytes().startswith({"svg": b"<svg", "png": b"\x89PNG", "dot": b"digraph"}[suffix])


def test_the_format_may_be_named(model: Path, tmp_path: Path) -> None:
    succeed("view", model, "--no-measure", "--format", "dot", "--out", tmp_path / "graph.txt", "--quiet")
    assert (tmp_path / "graph.txt").read_text().startswith('digraph "encoder')


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "graph.gif"], "the format 'gif' is not known: it is one of html, svg, png, dot"),
        (["--out", "graph"], "the format '' is not known"),
        (["--out", "graph.svg", "--colour", "mood"], "the colour 'mood' is not known"),
        (["--out", "."], "the format '' is not known"),
        (["--out", ".", "--format", "html"], ". is a folder; name a file to write"),
        (["--out", "g.html", "--pipeline", "canonicalise"], "canonicalise"),
        (["--out", "g.html", "--data", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(
    words: list[str], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("view", model, *words)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("prequant view: ") and message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_no_original(compressed: Path, tmp_path: Path) -> None:
    other = save_folder(tmp_path / "other", head="ForSequenceClassification", num_hidden_layers=2)
    result = run("view", compressed, "--against", other, "--out", tmp_path / "graph.html")
    assert result.exit_code == 2 and "the model has 1 layers, the original 2" in result.stderr
    assert not (tmp_path / "graph.html").exists()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = run("view", tmp_path / "nothing", "--out", tmp_path / "graph.html")
    assert result.exit_code == 2 and "does not exist" in result.stderr and not (tmp_path / "graph.html").exists()
