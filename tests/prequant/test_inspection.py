import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prequant.inspection import error_summary, other_bytes, rows_to_json, weight_rows, weight_table
from prequant.passes import (
    BinaryCode,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    lower,
)
from prequant.passes.reports import table_text
from prequant.report_file import REPORT_FILE, recorded_errors, write_report
from prequant.runtime import PrequantError
from prequant.sources import canonical_program

from .tiny import make_model, make_tokenizer

HEAD = "classifier.weight"
WORDS = "bert.embeddings.word_embeddings.weight"
POOLER = "bert.pooler.dense.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def original() -> Program:
    return canonical_program(make_model(), make_tokenizer())


@pytest.fixture(scope="module")
def packed(original: Program) -> Program:
    passes = [
        SplitOutliers(ratio=0.01, include=("*word_embeddings*",)),
        BinaryCode(bits=2, include=("*pooler*",)),
        QuantizeWeights(bits=3, exclude=("classifier", "*pooler*")),
        QuantizeActivations(include=("*.query",)),
    ]
    return lower(Pipeline(passes)(original))


def test_rows_say_what_each_weight_is_and_how_far_from_the_original(original: Program, packed: Program) -> None:
    rows = {row.name: row for row in weight_rows(packed, original)}
    assert next(iter(rows)) == WORDS and len(rows) == 3 + 2 * 6 + 2
    words, size = rows[WORDS], packed.tensor(f"{WORDS}.codes").shape[0]
    count = round(0.01 * size * 32)
    assert (words.kind, words.format, words.shape, words.outliers) == ("embedding", "affine3:row", (size, 32), count)
    # 12 bytes of codes and 4 of scale per row; 4 of value and 2 of column per outlier; 4 per row and 4 more of offsets.
    assert words.bytes == size * (12 + 4) + count * (4 + 2) + 4 * (size + 1)
    assert (words.float_bytes, words.lowered, words.input_format) == (4 * size * 32, True, "")
    assert rows[QUERY].input_format == "affine8:row"
    assert rows[POOLER].format == "bcq2:row" and rows[POOLER].bytes == 2 * 32 * (4 + 4)
    assert (rows[HEAD].format, rows[HEAD].bytes, rows[HEAD].lowered) == ("float32", 256, False)
    assert not rows[HEAD].is_compressed and rows[HEAD].sqnr is None

    exact = original.tensor(QUERY).detach().double()
    codes, scale = packed.tensor(f"{QUERY}.codes"), packed.tensor(f"{QUERY}.scale").detach().double()
    bits = (codes.unsqueeze(-1) >> torch.arange(8)) & 1  # a little-endian stream, three bits a code
    levels = (bits.reshape(32, 32, 3) * torch.tensor([1, 2, 4])).sum(-1).double() - 4
    noise = (exact - levels * scale).square().sum()
    assert rows[QUERY].sqnr == pytest.approx(float(10 * torch.log10(exact.square().sum() / noise)), rel=1e-6)


def test_bytes_of_weights_and_all_else_are_those_of_the_program(original: Program, packed: Program) -> None:
    for program in (original, packed):
        tensors = [*program.parameters(), *program.buffers()]
        total = sum(t.numel() * t.element_size() for t in tensors)
        assert sum(row.bytes for row in weight_rows(program)) + other_bytes(program) == total


def test_recorded_errors_stand_in_where_there_is_no_original(original: Program, packed: Program) -> None:
    rows = {row.name: row for row in weight_rows(packed, recorded={QUERY: 12.5})}
    assert rows[QUERY].sqnr == 12.5 and rows[POOLER].sqnr is None
    measured = {row.name: row.sqnr for row in weight_rows(packed, original, {QUERY: 12.5})}
    assert measured[QUERY] != 12.5


def test_an_original_of_another_model_is_refused(packed: Program) -> None:
    wider = canonical_program(make_model(hidden_size=40), make_tokenizer())
    with pytest.raises(
        PrequantError, match=r"word_embeddings.weight is \[\d+, 32\], in the original \[\d+, 40\]: this is"
    ):
        weight_rows(packed, wider)
    other = canonical_program(make_model("DistilBert"), make_tokenizer())
    with pytest.raises(PrequantError, match=r"bert.embeddings.word_.* is not in the original \(it has distilbert\."):
        weight_rows(packed, other)


def test_the_table_is_readable_at_80_columns_and_names_every_weight(original: Program, packed: Program) -> None:
    rows = weight_rows(packed, original)
    text = table_text(weight_table(rows, other_bytes(packed), 123_456), 80)
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    place = lines.index(["bert.encoder.layer.0"])
    query = next(row for row in rows if row.name == QUERY)
    figures = ["32x32", f"{query.bytes:,}", "4.00", f"{query.sqnr:.1f}"]
    assert lines[place + 1 : place + 3] == [["attention.self.query", "affine3:row", *figures], ["x", "affine8:row"]]
    assert ["classifier", "float32", "2x32", "256", "32.00"] in lines
    total, floats = (
        sum(r.bytes for r in rows) + other_bytes(packed),
        sum(r.float_bytes for r in rows) + other_bytes(packed),
    )
    assert ["total", f"{sum(r.outliers for r in rows):,}", f"{total:,}"] in lines
    assert f"{floats / total:.2f}x smaller than float32; 123,456 bytes on disk" in text


def test_what_is_only_simulated_says_so(original: Program) -> None:
    program = QuantizeWeights(exclude=("classifier",))(original)
    text = table_text(weight_table(weight_rows(program), 0))
    assert text.count("(simulated)") == len(weight_rows(program)) - 1


def test_the_summary_is_over_what_was_compressed(original: Program, packed: Program) -> None:
    rows = weight_rows(packed, original)
    known = sorted((row.sqnr, row.name) for row in rows if row.sqnr is not None)
    summary = error_summary(rows)
    assert len(known) == len(rows) - 1
    assert summary["least_sqnr"] == known[0][0] and summary["median_sqnr"] == pytest.approx(
        (known[len(known) // 2][0] + known[(len(known) - 1) // 2][0]) / 2
    )
    assert [item["weight"] for item in summary["worst"]] == [name for _, name in known[:3]]
    assert error_summary(weight_rows(original))["median_sqnr"] is None


def test_rows_are_json_even_where_nothing_changed(original: Program) -> None:
    exact = SplitOutliers(ratio=0.5, mode="replace")(original)
    rows = weight_rows(exact, original)
    assert all(row.sqnr == math.inf for row in rows)
    assert [item["sqnr"] for item in json.loads(json.dumps(rows_to_json(rows), allow_nan=False))] == [None] * len(rows)


# ---- the report beside a model ---------------------------------------------------------------------------------------


def write_weights(folder: Path, value: float) -> None:
    save_file({"w": torch.full((3,), value)}, folder / "model.safetensors")


def test_recorded_errors_are_those_of_the_weights_that_are_there(tmp_path: Path) -> None:
    write_weights(tmp_path, 1.0)
    assert recorded_errors(tmp_path) is None
    write_report(tmp_path, {"weights": [{"name": "a", "sqnr": 20.0}, {"name": "b", "sqnr": None}]})
    assert recorded_errors(tmp_path) == {"a": 20.0}
    write_weights(tmp_path, 2.0)  # something else is saved over them
    assert recorded_errors(tmp_path) is None
    write_weights(tmp_path, 1.0)
    assert recorded_errors(tmp_path) == {"a": 20.0}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weights": [{}]}', '{"weights": []}', '{"weights": null, "files": {}}']
)
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / REPORT_FILE).write_text(content)
    with pytest.raises(PrequantError, match=f"{REPORT_FILE} is damaged"):
        recorded_errors(tmp_path)


def test_reports_are_strict_json_and_appear_whole(tmp_path: Path) -> None:
    write_weights(tmp_path, 1.0)
    write_report(tmp_path, {"weights": [], "loss": math.nan, "path": Path("a/b"), "many": (1, math.inf)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads((tmp_path / REPORT_FILE).read_text(), parse_constant=refuse)
    assert (report["loss"], report["path"], report["many"]) == ("nan", "a/b", [1, "inf"])
    assert report["files"]["model.safetensors"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    with pytest.raises(TypeError, match="has no form in JSON"):
        write_report(tmp_path, {"weights": [object()]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", REPORT_FILE]
    assert json.loads((tmp_path / REPORT_FILE).read_text()) == report
