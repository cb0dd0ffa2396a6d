import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import prequant
from prequant import compress as job
from prequant.compress import CompressionReport, compress
from prequant.finetune import finetune_baseline
from prequant.inspection import weight_rows
from prequant.measure import PACKAGES, plain
from prequant.passes import weights
from prequant.recipes import PreQuant
from prequant.report_file import REPORT_FILE, recorded_errors
from prequant.runtime import PrequantError
from prequant.sources import SourceError, canonical_program, load_for
from prequant.tasks import Evaluation, Limits
from prequant.training import TrainingSettings

from .tiny import LENGTH, SST2, make_tokenizer, save_folder, write_data

BUDGET = TrainingSettings(epochs=2, batch_size=8, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "encoder", num_hidden_layers=1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(
        tmp_path_factory.mktemp("models") / "tuned", head="ForSequenceClassification", num_hidden_layers=1
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "rows.tsv")


Run = Callable[..., CompressionReport]


@pytest.fixture
def run(encoder: Path, data: Path, tmp_path: Path) -> Run:
    def call(
        recipe: PreQuant, source: Path = encoder, out: Path = tmp_path / "out", **options: Any
    ) -> CompressionReport:
        chosen = {"baseline": "none", "max_length": LENGTH, "progress": False, **options}
        return compress(source, recipe, SST2, data, out, **chosen)

    return call


def evaluate(model: Any, data: Path) -> Evaluation:
    return SST2.evaluate(model, SST2.load(data)["validation"], make_tokenizer(), Limits(LENGTH), progress=False)


@pytest.fixture(scope="module")
def finished(encoder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompressionReport, Path]:
    """A whole job, with a baseline that was trained the same way."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("jobs") / "job"
    recipe = PreQuant(training=dataclasses.replace(BUDGET, weight_decay=0.0))
    report = compress(encoder, recipe, SST2, data, out, max_length=LENGTH, progress=False)
    return report, out


# ---- the figures -----------------------------------------------------------------------------------------------------


def test_the_compressed_models_figures_are_those_of_the_folder(
    finished: tuple[CompressionReport, Path], encoder: Path, data: Path
) -> None:
    report, out = finished
    ours, program = report.compressed, prequant.load(out)
    scored = evaluate(program, data)
    assert (ours.metric, report.metric_name, report.examples) == (scored.metric, "accuracy", 12)
    assert ours.bytes_on_disk == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    model, _ = load_for(encoder, SST2, BUDGET.seed)
    assert ours.parameters == sum(p.numel() for p in model.parameters())
    packed = [view for view in weights(program) if "scale" in view.tensors]
    trained = [view.tensors["scale"] for view in packed]
    trained += [view.tensors["outliers.values"] for view in packed if view.kind == "linear"]
    others = [n for n, _ in program.named_parameters() if "LayerNorm" in n or n.endswith(".bias")]
    others = [*{*others, "classifier.weight"}]
    assert ours.trainable == sum(program.tensor(name).numel() for name in (*trained, *others))
    assert ours.latency > 0 and ours.training is not None and ours.training.steps == 6
    original = canonical_program(model, make_tokenizer())
    assert report.weights == weight_rows(program, original)
    assert not any(p.requires_grad for p in program.parameters())


def test_the_baseline_is_the_same_model_fine_tuned_alone(
    finished: tuple[CompressionReport, Path], encoder: Path, data: Path, tmp_path: Path
) -> None:
    base = finished[0].baseline
    assert base is not None and base.training is not None
    settings = TrainingSettings(epochs=2, batch_size=8)  # the learning rate that fine-tuning usually takes
    alone = finetune_baseline(encoder, SST2, data, tmp_path / "base", settings, max_length=LENGTH, progress=False)
    record = json.loads((tmp_path / "base" / REPORT_FILE).read_text())
    assert base.metric == alone.metric and base.training.steps == record["training"]["steps"] == 6
    assert base.training.loss == record["training"]["loss"]
    assert base.trainable == base.parameters == finished[0].compressed.parameters
    files = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert abs(base.bytes_on_disk - files) < 100
    assert finished[0].settings["baseline_training"] == dataclasses.asdict(settings)


def test_both_start_from_the_same_head_and_leave_the_given_model_alone(
    run: Run, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, finetune = [], job.finetune

    def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
        heads.append(dict(model.named_parameters())["classifier.weight"].detach().clone())
        return finetune(model, *args, **kwargs)

    monkeypatch.setattr(job, "finetune", spy)
    report = run(PreQuant(training=BUDGET), baseline="train")
    assert len(heads) == 2 and torch.equal(heads[0], heads[1])
    fresh, _ = load_for(encoder, SST2, BUDGET.seed)
    assert torch.equal(heads[0], fresh.state_dict()["classifier.weight"])
    # Errors are measured against the given model: had the baseline's training moved it, they would show.
    untouched = run(PreQuant(training=BUDGET))
    assert report.weights == untouched.weights and report.compressed.metric == untouched.compressed.metric


def test_a_job_gives_the_same_model_whatever_else_it_measures(run: Run, tmp_path: Path) -> None:
    run(PreQuant(training=BUDGET), out=tmp_path / "a")
    run(PreQuant(training=BUDGET), out=tmp_path / "b", baseline="train")
    run(PreQuant(training=dataclasses.replace(BUDGET, seed=1)), out=tmp_path / "c")
    alone, compared, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert alone == compared != other


def test_other_models_can_be_compared_with(run: Run, tuned: Path, data: Path) -> None:
    given = run(PreQuant(train=()), source=tuned, baseline="given")
    model, _ = load_for(tuned, SST2, 0)
    score = evaluate(model, data).metric
    assert given.baseline is not None and given.baseline.training is None and given.compressed.training is None
    assert (given.baseline.metric, given.baseline.trainable, given.compressed.trainable) == (score, 0, 0)
    assert given.settings["baseline_training"] is None
    folder = run(PreQuant(train=()), source=tuned, baseline=str(tuned))
    assert folder.baseline is not None and folder.baseline.metric == score
    assert run(PreQuant(train=()), source=tuned).comparison() == {}


# ---- recipes end to end ----------------------------------------------------------------------------------------------


def test_stage_1_alone_is_the_quantized_model(run: Run, tuned: Path, tmp_path: Path) -> None:
    recipe = PreQuant(train=(), outlier_dtype="float32")
    run(recipe, source=tuned)
    model, _ = load_for(tuned, SST2, 0)
    original = canonical_program(model, make_tokenizer())
    expected = recipe.prepare(original, ("classifier.weight", "classifier.bias"))(original)
    saved = prequant.load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_scored_are_the_outliers_as_they_are_stored(
    run: Run, data: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []

    def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
        scored.append(model)
        return evaluating(SST2, model, *args, **kwargs)

    evaluating = type(SST2).evaluate
    monkeypatch.setattr(type(SST2), "evaluate", lambda self, *args, **kwargs: spy(*args, **kwargs))
    run(PreQuant(outlier_dtype=dtype, training=BUDGET))  # type: ignore[arg-type]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        values = {name: file.get_tensor(name) for name in list(file.keys()) if name.endswith("outliers.values")}
    assert {value.dtype for value in values.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(scored[0].tensor(name), value) for name, value in values.items())


def test_eight_bit_activations_go_all_the_way(run: Run, data: Path, tmp_path: Path) -> None:
    report = run(PreQuant(activation_bits=8, training=BUDGET))
    program = prequant.load(tmp_path / "out")
    formats = {view.name: view.input_format for view in weights(program) if view.kind == "linear"}
    assert formats.pop("classifier.weight") == "" and set(formats.values()) == {"affine8:row"}
    again = prequant.load(tmp_path / "out")
    first, second = (evaluate(p, data) for p in (program, again))
    assert np.array_equal(first.predictions, second.predictions) and first.metric == report.compressed.metric


@pytest.mark.parametrize("family", ["DistilBert", "GPT2"])
def test_other_families_go_all_the_way(run: Run, tmp_path: Path, family: str) -> None:
    source = save_folder(tmp_path / "source", family)
    report = run(PreQuant(training=TrainingSettings(max_steps=2, batch_size=8)), source=source)
    assert report.compressed.training is not None and report.compressed.training.steps == 2
    formats = {row.name: row.format for row in report.weights}
    heads = {name for name, form in formats.items() if form == "float32"}
    assert heads and all(name.startswith(("classifier", "pre_classifier", "score")) for name in heads)
    loaded = prequant.load(tmp_path / "out")
    assert weight_rows(loaded) == [dataclasses.replace(row, sqnr=None) for row in report.weights]


# ---- the report ------------------------------------------------------------------------------------------------------

KEYS = {
    "metric_name",
    "examples",
    "baseline",
    "compressed",
    "comparison",
    "error",
    "weights",
    "passes",
    "settings",
    "files",
}
SETTINGS = {
    "model",
    "task",
    "data",
    "examples",
    "max_length",
    "recipe",
    "baseline",
    "baseline_training",
    "seed",
    "threads",
    "machine",
    "versions",
}


def test_the_file_is_the_report_with_settings_seed_and_versions(
    finished: tuple[CompressionReport, Path], run: Run, encoder: Path, data: Path, tmp_path: Path
) -> None:
    report, out = finished
    record = json.loads((out / REPORT_FILE).read_text())
    assert record.keys() == KEYS and record["settings"].keys() == SETTINGS
    assert {**record, "files": None} == {**plain(report.to_json()), "files": None}
    settings = record["settings"]
    assert (settings["model"], settings["task"], settings["data"]) == (str(encoder), "sst2", str(data))
    assert settings["examples"] == {"train": 24, "validation": 12} and settings["seed"] == 42
    assert settings["versions"].keys() == {"python", *PACKAGES} and settings["versions"]["torch"] == torch.__version__
    assert settings["recipe"]["training"]["learning_rate"] == 1e-2 and settings["recipe"]["bits"] == 4
    names = [item["source"].partition("{")[0] for item in record["passes"]]
    assert names == [
        "canonicalize",
        "canonicalize",
        "split-outliers",
        "quantize-weights",
        "lower",
        "train",
        "freeze",
        "compose-ops",
        "fuse-epilogue",
        "fuse-parallel-linears",
        "plan",
    ]
    assert recorded_errors(out) == {row.name: row.sqnr for row in report.weights if row.sqnr is not None}
    run(PreQuant(training=TrainingSettings(max_steps=1)))
    without = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert without.keys() == KEYS and without["settings"].keys() == SETTINGS
    assert without["baseline"] is None and without["comparison"] is None


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("broken", ["finetune", "write_report"])
def test_a_failure_anywhere_leaves_the_folder_as_it_was(
    run: Run, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"the one before")
    (out / "notes.txt").write_text("mine")
    before = snapshot(out)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(job, broken, fail)
    with pytest.raises(RuntimeError, match="the disk is full"):
        run(PreQuant(training=TrainingSettings(max_steps=1)))
    assert snapshot(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_leaves_no_folder_where_there_was_none(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "write_report", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(PreQuant(training=TrainingSettings(max_steps=1)))
    assert os.listdir(tmp_path) == []


def test_a_folder_is_replaced_but_for_what_is_not_a_models(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(PreQuant(training=TrainingSettings(max_steps=1)))
    first = snapshot(out)
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00002.safetensors").write_text("of an older model")
    run(PreQuant(bits=2, training=TrainingSettings(max_steps=1)))
    second = snapshot(out)
    assert second.keys() == {*first, "notes.txt"} and second["notes.txt"] == b"mine"
    assert second["model.safetensors"] != first["model.safetensors"]
    assert {row.format for row in weight_rows(prequant.load(out))} == {"affine2:row", "float32"}
    assert recorded_errors(out)
    assert os.listdir(tmp_path) == ["out"]


def test_what_can_not_be_done_is_said_before_anything_trains(
    run: Run, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained all the same")

    monkeypatch.setattr(job, "finetune", never)
    (tmp_path / "file").write_text("")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"out": tmp_path / "file"}, "file is a file"),
        ({"out": tmp_path / "file" / "below"}, "can't be written"),
        ({"max_length": LENGTH + 3}, "max_length=35: the model has 34 positions"),
        ({"out": encoder}, "encoder is the model that is read: it would be lost"),
        ({"baseline": "given"}, "has no head for sst2: classifier.bias, classifier.weight are missing; compare with"),
        ({"baseline": str(tmp_path / "none")}, "none' does not exist"),
        ({"baseline": str(encoder)}, "the baseline .* has no head for sst2"),
    ]
    for options, message in cases:
        with pytest.raises(PrequantError, match=message):
            run(PreQuant(training=BUDGET), **options)
    with pytest.raises(
        SourceError, match=r"has no head for sst2: .* are missing; fine-tune it first, as nothing is to"
    ):
        run(PreQuant(train=()))
    with pytest.raises(SourceError, match=r"has no head for sst2: classifier.* are missing, and would not train"):
        run(PreQuant(train=("outliers",)))
    assert not (tmp_path / "out").exists()


def test_fine_tuning_saves_an_ordinary_folder_whole_or_not_at_all(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "tuned"
    options: dict[str, Any] = {"max_length": LENGTH, "progress": False}
    score = finetune_baseline(encoder, SST2, data, out, BUDGET, **options)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    again = evaluate(model, data)
    assert np.array_equal(score.predictions, again.predictions)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["id2label"] == {"0": "negative", "1": "positive"}
    before = snapshot(out)
    monkeypatch.setattr("prequant.finetune.write_report", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune_baseline(encoder, SST2, data, out, dataclasses.replace(BUDGET, seed=1), **options)
    assert snapshot(out) == before and os.listdir(tmp_path) == ["tuned"]


def test_nothing_is_printed_unless_wanted(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run(
        PreQuant(training=TrainingSettings(max_steps=1)),
        baseline="train",
        baseline_training=TrainingSettings(max_steps=1),
    )
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
