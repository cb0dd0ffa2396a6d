import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prequant
from prequant.blame import BlameError, blame
from prequant.blame_report import Advice, BlameReport
from prequant.passes import (
    DropLayers,
    ExampleBatches,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    lower,
    weight_sites,
)
from prequant.passes.reports import table_text
from prequant.runtime import PrequantError
from prequant.sources import canonical_program

from .test_cli import run, succeed
from .tiny import make_model, make_tokenizer, save_folder, write_data

WORDS = "bert.embeddings.word_embeddings.weight"
VALUE = "bert.encoder.layer.1.attention.self.value.weight"
TEXTS = ["a fine film", "dull and long", "the plot is a mess", "what a joy to watch"]


@pytest.fixture(scope="module")
def original() -> Program:
    return canonical_program(make_model(), make_tokenizer())


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    tokenizer = make_tokenizer()
    return [dict(tokenizer(TEXTS[i : i + 2], return_tensors="pt", padding=True)) for i in (0, 2)]


def measured(original: Program, program: Program, batches: list[dict[str, Tensor]]) -> float:
    """The SQNR of the logits, of the Programs as they are called."""
    signal = noise = 0.0
    with torch.no_grad():
        for batch in batches:
            exact, close = (p(**batch).logits.double() for p in (original, program))
            signal, noise = signal + float(exact.square().sum()), noise + float((exact - close).square().sum())
    return 10 * math.log10(signal / noise)


@pytest.mark.parametrize("lowered", [False, True])
def test_figures_are_those_of_models_quantized_by_scopes(
    lowered: bool, original: Program, batches: list[dict[str, Tensor]]
) -> None:
    quantized = QuantizeWeights(bits=3)(original)
    report = blame(lower(quantized) if lowered else quantized, original, batches, advise=2, progress=False)
    assert report.whole_sqnr == pytest.approx(measured(original, quantized, batches), abs=1e-2)
    assert report.rest_sqnr > 100 and report.batches == 2
    names = {site.name for site in weight_sites(original)}
    assert {node.name for node in report.nodes} == names and len(report.nodes) == len(names)
    recorded = {change.what: change.figures["sqnr"] for change in quantized.reports[-1].changes}
    for node in report.nodes:
        alone = QuantizeWeights(bits=3, include=(node.name,))(original)
        others = QuantizeWeights(bits=3, exclude=(node.name,))(original)
        assert node.only_sqnr == pytest.approx(measured(original, alone, batches), abs=1e-2)
        assert node.restored_sqnr == pytest.approx(measured(original, others, batches), abs=1e-2)
        assert node.gain == pytest.approx(node.restored_sqnr - report.whole_sqnr)
        assert node.weight_sqnr == pytest.approx(recorded[node.name], abs=1e-3)
    gains = [node.gain for node in report.nodes]
    assert gains == sorted(gains, reverse=True)
    assert 1 <= len(report.advice) <= 2
    for advice in report.advice:
        steps = [QuantizeWeights(bits=8, include=(advice.name,)), QuantizeWeights(bits=3)]
        better = Pipeline(steps)(original)
        assert advice.format == "affine8:row"
        assert advice.gain == pytest.approx(measured(original, better, batches) - report.whole_sqnr, abs=1e-2)
        sizes = [sum(b.nbytes for b in program.buffers()) for program in (better, quantized)]
        assert advice.extra_bytes == sizes[0] - sizes[1]


def test_the_output_of_a_node_is_measured_on_the_inputs_of_the_original(
    original: Program, batches: list[dict[str, Tensor]]
) -> None:
    quantized = QuantizeWeights(bits=2, include=("classifier", WORDS))(original)
    report = blame(quantized, original, batches, progress=False)
    found = {node.name: node for node in report.nodes}
    assert found.keys() == {"classifier.weight", WORDS}
    # The classifier's outputs are the model's.
    head = found["classifier.weight"]
    assert head.output_sqnr == pytest.approx(head.only_sqnr, abs=1e-3)
    exact, close = (
        {site.name: site.value() for site in weight_sites(program)}[WORDS] for program in (original, quantized)
    )
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    noise = (exact[ids] - close[ids]).square().sum() / exact[ids].square().sum()
    assert found[WORDS].output_sqnr == pytest.approx(float(-10 * noise.detach().log10()), abs=1e-3)


@pytest.mark.parametrize("lowered", [False, True])
def test_a_weight_made_fragile_comes_first(lowered: bool, batches: list[dict[str, Tensor]]) -> None:
    model = make_model()
    with torch.no_grad():
        # One large weight in each row, by which the scale of a row goes, on an input that is always 0.
        weight, norm = model.get_parameter("bert.pooler.dense.weight"), "bert.encoder.layer.1.output.LayerNorm"
        weight[:, 3] = 40.0
        model.get_parameter(f"{norm}.weight")[3] = 0.0
        model.get_parameter(f"{norm}.bias")[3] = 0.0
    original = canonical_program(model, make_tokenizer())
    quantized = QuantizeWeights(bits=6, strategy="minmax")(original)
    report = blame(lower(quantized) if lowered else quantized, original, batches, progress=False)
    first, second = report.nodes[:2]
    assert first.name == "bert.pooler.dense.weight" and first.gain > 10 > second.gain
    assert first.only_sqnr < min(node.only_sqnr for node in report.nodes[1:])
    # Its own SQNR, of which the large weights are nearly all, says the contrary.
    assert first.weight_sqnr > max(node.weight_sqnr for node in report.nodes[1:])
    # Not even 8 bits hold these weights beside each other.
    assert report.advice[0] == Advice(first.name, "float32", first.gain, 32 * 32 * 4 - first.bytes)


def test_everything_else_has_its_share(original: Program, batches: list[dict[str, Tensor]]) -> None:
    quantized = QuantizeWeights(bits=8)(original)
    trained = quantized.copy()
    bias = trained.tensor("classifier.bias").detach()
    trained.set_tensor("classifier.bias", bias + 0.1)
    report = blame(trained, original, batches, progress=False)
    shifted = original.copy()
    shifted.set_tensor("classifier.bias", bias + 0.1)
    assert report.rest_sqnr == pytest.approx(measured(original, shifted, batches), abs=1e-2)
    assert report.whole_sqnr == pytest.approx(report.rest_sqnr, abs=1)


def test_quantized_inputs_belong_to_their_linear(original: Program, batches: list[dict[str, Tensor]]) -> None:
    steps = [QuantizeWeights(bits=8), QuantizeActivations(bits=3, include=(VALUE,))]
    quantized = Pipeline(steps)(original)
    for program in (quantized, lower(quantized)):
        report = blame(program, original, batches, progress=False)
        assert report.nodes[0].name == VALUE and report.nodes[0].input_format == "affine3:row"
        others = Pipeline([QuantizeWeights(bits=8, exclude=(VALUE,))])(original)
        assert report.nodes[0].restored_sqnr == pytest.approx(measured(original, others, batches), abs=1e-2)
        # At 8 bits already, float is what is left; that its input is float, too, is what helps.
        assert report.advice[0].format == "float32" and report.advice[0].gain == pytest.approx(report.nodes[0].gain)


def test_the_table_and_the_figures_in_json(original: Program, batches: list[dict[str, Tensor]]) -> None:
    report = blame(QuantizeWeights(bits=2, include=(VALUE,))(original), original, batches, progress=False)
    text = table_text(report.table())
    short = VALUE.removesuffix(".weight")
    assert short in text and "affine2:row" in text and "equal" in text and "all" in text
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    (node,) = found["nodes"]
    assert node["restored_sqnr"] is None and node["only_sqnr"] == pytest.approx(report.whole_sqnr)
    assert node["bytes"] == 32 * 8 + 32 * 4
    assert str(Advice(VALUE, "affine8:row", 0.94, 200_000)) == f"keep {short} at 8 bits: +0.94 dB for 0.2 MB"
    assert str(Advice(VALUE, "float32", math.inf, 4096)) == f"keep {short} in float32: all dB for 0.0041 MB"


def test_programs_that_do_not_go_together(original: Program, batches: list[dict[str, Tensor]]) -> None:
    with pytest.raises(BlameError, match="no weight is compressed: there is nothing to blame"):
        blame(original, original, batches)
    shallow = Pipeline([DropLayers(count=1), QuantizeWeights()])(original)
    with pytest.raises(PrequantError, match=r"the model has 1 layers, the original 2"):
        blame(shallow, original, batches)
    other = canonical_program(make_model(intermediate_size=64), make_tokenizer())
    with pytest.raises(PrequantError, match="this is another model"):
        blame(QuantizeWeights()(original), other, batches)
    with pytest.raises(PrequantError, match=r"batch 0: unexpected input 'labels'"):
        blame(QuantizeWeights()(original), original, ExampleBatches([{**batches[0], "labels": torch.zeros(2)}]))


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "classifier"
    return save_folder(folder, head="ForSequenceClassification", num_hidden_layers=1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def test_a_folder_and_the_pipeline_that_made_it_get_the_same_blame(
    classifier: Path, texts: Path, tmp_path: Path
) -> None:
    steps = "canonicalize,quantize-weights{bits=3},lower"
    succeed("opt", classifier, "--pipeline", steps, "--out", tmp_path / "packed")
    common = ["--data", texts, "--advise", 1, "--quiet"]
    shown = succeed("blame", tmp_path / "packed", "--original", classifier, *common, "--out", tmp_path / "a.json")
    succeed("blame", classifier, "--pipeline", steps, *common, "--out", tmp_path / "b.json")
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert [node["name"] for node in one["nodes"]] == [node["name"] for node in other["nodes"]]
    for key in ("only_sqnr", "restored_sqnr", "output_sqnr", "weight_sqnr"):
        assert [node[key] for node in one["nodes"]] == pytest.approx([node[key] for node in other["nodes"]], abs=0.01)
    assert "all but" in shown and "at 8 bits: +" in shown and f"written to {tmp_path / 'a.json'}" in shown


def test_a_tasks_training_texts_are_read(classifier: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "rows.tsv")
    words = ["--pipeline", "canonicalize,allocate-bits{mean_bits=6}", "--task", "sst2", "--data", data, "--quiet"]
    succeed("blame", classifier, *words, "--max-length", 16, "--texts", 8, "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["batches"] == 1 and len(found["nodes"]) > 5
    assert {node["format"][:6] for node in found["nodes"]} == {"affine"}


def test_opt_measures_with_texts(classifier: Path, texts: Path, tmp_path: Path) -> None:
    steps = "canonicalize,allocate-bits{mean_bits=6.0,sensitivity=output},lower"
    words = ["--pipeline", steps, "--calibration", texts, "--out", tmp_path / "out"]
    shown = succeed("opt", classifier, *words)
    assert "measured_sqnr" in shown and "sensitivity output" in shown
    report = json.loads((tmp_path / "out" / "prequant-report.json").read_text())
    assert report["settings"]["pipeline"] == steps and report["settings"]["calibration"] == str(texts)
    program = prequant.load(tmp_path / "out")
    size = sum(value.nbytes for name, value in program.state_dict().items() if ".codes" in name or ".scale" in name)
    assert size == report["passes"][1]["totals"]["bytes"]


BAD: list[tuple[list[Any], str]] = [
    (["{model}", "--data", "{texts}"], "give either --original, the float model, or --pipeline"),
    (["{model}", "--data", "{texts}", "--pipeline", "lower", "--original", "{model}"], "give either --original"),
    (["{model}", "--pipeline", "quantize-weights"], "there are no texts: give a file of texts, or a task"),
    (["{model}", "--data", "none.txt", "--pipeline", "quantize-weights"], "data path 'none.txt' does not exist"),
    (["{model}", "--data", "{texts}", "--original", "{model}"], "has no prequant.json, so it holds no Program"),
    (["{model}", "--data", "{texts}", "--pipeline", "canonicalize"], "no weight is compressed"),
    (["{model}", "--data", "{texts}", "--pipeline", "lower", "--out", "{model}"], "is a folder; name a file to write"),
    (["{model}", "--data", "{texts}", "--pipeline", "lower", "--out", "{texts}/a"], "is no folder that can be written"),
    (["{model}", "--data", "{texts}", "--pipeline", "quantize-weights", "--max-length", "99"], "has 34 positions"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message[:25] for _, message in BAD])
def test_bad_input_is_one_line(words: list[Any], message: str, classifier: Path, texts: Path) -> None:
    result = run("blame", *(word.format(model=classifier, texts=texts) for word in words), "--quiet")
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("prequant blame: ") and message in line


def test_a_model_of_two_texts_says_what_to_do(texts: Path, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "t5", "T5", "ForConditionalGeneration", num_layers=1)
    result = run("blame", folder, "--data", texts, "--pipeline", "canonicalize,quantize-weights", "--quiet")
    assert result.exit_code == 2 and "give batches in Python" in result.stderr


def test_a_seq2seq_model_is_blamed_from_python(tmp_path: Path) -> None:
    original = canonical_program(make_model("T5", "ForConditionalGeneration"), make_tokenizer())
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    report: BlameReport = blame(lower(QuantizeWeights(bits=4)(original)), original, [batch], progress=False)
    kinds = {node.name: node.kind for node in report.nodes}
    assert "linear+embedding" in kinds.values() and 5 < report.whole_sqnr < 60
