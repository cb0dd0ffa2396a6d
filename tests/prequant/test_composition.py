"""Recipes' passes mixed with each other, and jobs one after the other: fewer layers under everything else.

The truth is transformers' own shallower model, which is made of the deep one's weights without any pass.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from typer.testing import CliRunner

import prequant
from prequant import lower
from prequant.checkpoint import CheckpointError, save
from prequant.cli import app
from prequant.compress import compress
from prequant.finetune import finetune_baseline
from prequant.model import ModelProgram
from prequant.passes import (
    BinaryCode,
    DropLayers,
    Freeze,
    Lower,
    Pass,
    Pipeline,
    Program,
    QuantizeActivations,
    QuantizeWeights,
    SplitOutliers,
    Train,
    weights,
)
from prequant.recipes import XTC, PreQuant
from prequant.runtime import Granularity
from prequant.sources import SourceError, canonical_program, head_of, load_for, load_model_like
from prequant.tasks import Limits
from prequant.training import TrainingSettings, finetune

from .tiny import LENGTH, SST2, collator, encoded, make_model, make_program, make_tokenizer, save_folder, write_data

DEPTHS = {"Bert": "num_hidden_layers", "GPT2": "n_layer", "T5": "num_layers"}
DEPTH, KEEP = 4, (1, 3)
BUDGET = TrainingSettings(max_steps=3, batch_size=4, learning_rate=1e-2)
RECIPE = PreQuant(training=BUDGET)
CLASSIFIER = "ForSequenceClassification"


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def options(family: str, depth: int) -> dict[str, Any]:
    return {DEPTHS[family]: depth, "pad_token_id": 0}


def shallower(family: str, head: str = CLASSIFIER, keep: Sequence[int] = KEEP) -> PreTrainedModel:
    """The deep model without some of its layers, as one that was never deeper."""
    deep = make_model(family, head, **options(family, DEPTH)).state_dict()
    state = {}
    for name, value in deep.items():
        match = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if match is None or "relative_attention_bias" in name:  # T5's first block holds it for all
            state[name] = value
        elif int(match[2]) in keep:
            state[f"{match[1]}{keep.index(int(match[2]))}{match[3]}"] = value
    model = make_model(family, head, **options(family, len(keep)))
    model.load_state_dict(state)
    return model


def deep_program(family: str, head: str = CLASSIFIER) -> tuple[ModelProgram, tuple[str, ...]]:
    model = make_model(family, head, **options(family, DEPTH))
    return make_program(family, head, **options(family, DEPTH)), head_of(model, SST2)


def batch() -> dict[str, Tensor]:
    rows = encoded("validation", 6)
    return {name: value for name, value in collator()([rows[i] for i in range(6)]).items() if name != "labels"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model.eval()(**batch()).logits)


def tuned(program: Program, head: tuple[str, ...], settings: TrainingSettings = BUDGET) -> Program:
    finetune(program, encoded(), collator(), settings, head, progress=False)
    return program


def same_tensors(one: Program, other: Program) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def saved_by_transformers(folder: Path, model: PreTrainedModel) -> Path:
    """An ordinary folder with which prequant had nothing to do."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    assert not (folder / "prequant.json").exists()
    return folder


# ---- fewer layers, outliers and planes in one pipeline ---------------------------------------------------------------


def passes_of_three_papers(head: tuple[str, ...]) -> list[Pass]:
    kept = tuple(name for name in head if name.endswith("weight"))
    return [SplitOutliers(ratio=0.05, exclude=kept), BinaryCode(bits=2, exclude=kept)]


@pytest.mark.parametrize("family", DEPTHS)
def test_codes_and_outliers_are_those_of_the_shallower_model(family: str) -> None:
    program, head = deep_program(family)
    passes = passes_of_three_papers(head)
    composed = Pipeline([DropLayers(keep=KEEP), *passes])(program)
    truth = Pipeline(passes)(canonical_program(shallower(family), make_tokenizer()))
    same_tensors(composed, truth)
    same_tensors(Pipeline([*passes, DropLayers(keep=KEEP)])(program), truth)
    formats = {view.format for view in weights(composed)}
    assert formats == {"bcq2:row", "float32"} and any("outliers.values" in view.tensors for view in weights(composed))
    torch.testing.assert_close(logits(composed), logits(truth), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "alphas"), [("Bert", "first_alphas"), ("Bert", "alphas"), ("GPT2", "first_alphas"), ("T5", "alphas")]
)
def test_they_train_and_are_saved_as_one_model(tmp_path: Path, family: str, alphas: str) -> None:
    program, head = deep_program(family)
    simulated = Pipeline([DropLayers(keep=KEEP), *passes_of_three_papers(head)])(program)
    train: Any = Train(**{alphas: True}, outliers=True, head=head)  # type: ignore[arg-type]
    before = simulated.state_dict()
    packed = cast(ModelProgram, Freeze()(tuned(train(lower(simulated)), head)))
    after = packed.state_dict()

    # What was to train has moved, and nothing else.
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    kinds = (".alphas", ".outliers.values", *head)
    assert moved and all(name.endswith(kinds) for name in moved)
    assert {name for name in after if name.endswith(".alphas")} <= moved
    others = [torch.equal(after[name][1:], before[name][1:]) for name in moved if name.endswith(".alphas")]
    assert all(others) if alphas == "first_alphas" else not any(others)

    # The simulated graph learns the same, and what transformers computes with the values that are coded is the same.
    expected = logits(packed)
    torch.testing.assert_close(logits(Freeze()(tuned(train(simulated), head))), expected, rtol=1e-4, atol=1e-4)
    dense = shallower(family)
    state = {**dense.state_dict(), **{name: after[name] for name in head}}
    for view in weights(packed):
        value = view.value().detach()
        for name in state.keys() & set(packed.names_of(view.name)):
            state[name] = value.t() if view.name in packed.info.transposed else value
    dense.load_state_dict(state)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)

    packed.save_pretrained(tmp_path)
    again = cast(ModelProgram, prequant.load(tmp_path))
    assert torch.equal(logits(again), expected)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said[DEPTHS[family]] == again.config.num_hidden_layers == len(KEEP)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.num_hidden_layers == len(KEEP)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


# ---- PreQuant on fewer layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DEPTHS)
def test_prequant_takes_a_program_of_fewer_layers(family: str) -> None:
    program, head = deep_program(family)
    ours = RECIPE.prepare(program, head)(DropLayers(keep=KEEP)(program))
    shallow = canonical_program(shallower(family), make_tokenizer())
    theirs = RECIPE.prepare(shallow, head)(shallow)
    same_tensors(ours, theirs)
    before = ours.tensor(head[0]).detach().clone()
    finished = [RECIPE.finish()(tuned(each, head, RECIPE.training)) for each in (ours, theirs)]
    same_tensors(*finished)
    assert not torch.equal(finished[0].tensor(head[0]), before)
    assert torch.equal(logits(finished[0]), logits(finished[1]))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "teacher", "Bert", CLASSIFIER, num_hidden_layers=DEPTH)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data.tsv")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """A float student, as it was saved by prequant."""
    program, _ = deep_program("Bert")
    return save(Pipeline([DropLayers(keep=KEEP)])(program), tmp_path / "student", make_tokenizer())


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})


def succeed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.stdout)


def same_files(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def budget(data: Path) -> tuple[object, ...]:
    job = ("--task", "sst2", "--data", data, "--max-length", LENGTH, "--quiet")
    return (*job, "--max-steps", 2, "--batch-size", 4)


def test_a_student_of_xtc_is_compressed_and_tuned_as_any_model(teacher: Path, data: Path, tmp_path: Path) -> None:
    job, student = budget(data), tmp_path / "student"
    succeed("compress", teacher, "--recipe", "xtc", "--keep", "1,3", "--bits", 32, *job, "--out", student)
    assert (student / "prequant.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(student)
    assert model.config.num_hidden_layers == len(KEEP)
    plain = saved_by_transformers(tmp_path / "plain", model)
    for source in (student, plain):
        text = succeed("compress", source, "--recipe", "prequant", *job, "--out", f"{source}-small")
        assert "SQNR of the weights" in text
        succeed("finetune", source, *job, "--out", f"{source}-tuned")
    for out in ("small", "tuned"):
        same_files(tmp_path / f"student-{out}", tmp_path / f"plain-{out}")
    report = json.loads((tmp_path / "student-small" / "prequant-report.json").read_text())
    assert report["baseline"]["training"]["steps"] == 2, "the shallower float model"
    assert report["compressed"]["parameters"] == sum(p.numel() for p in model.parameters())
    packed: Any = prequant.load(tmp_path / "student-small")
    assert packed.config.num_hidden_layers == len(KEEP)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student-small")
    torch.testing.assert_close(logits(theirs), logits(packed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "head", "task"),
    [
        ("Bert", "Model", "sst2"),
        ("GPT2", "LMHeadModel", "sst2"),
        pytest.param("T5", "ForConditionalGeneration", "sst2-text", marks=pytest.mark.slow),
    ],
)
def test_what_opt_has_made_shallower_is_compressed_as_any_model(
    tmp_path: Path, data: Path, family: str, head: str, task: str
) -> None:
    source = save_folder(tmp_path / "deep", family, head, **options(family, DEPTH))
    succeed("opt", source, "--pipeline", "drop-layers{keep=[1,3]}", "--out", tmp_path / "ours")
    model = shallower(family, head)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").num_hidden_layers == len(KEEP)
    saved_by_transformers(tmp_path / "theirs", model)
    job = ("--recipe", "prequant", *budget(data), "--task", task, "--baseline", "none")
    for name in ("ours", "theirs"):
        succeed("compress", tmp_path / name, *job, "--out", tmp_path / f"{name}-small")
    same_files(tmp_path / "ours-small", tmp_path / "theirs-small")


def test_a_student_is_a_teacher_and_a_baseline(student: Path, data: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_length": LENGTH, "progress": False}
    smaller = XTC(bits=2, training=BUDGET)
    report = compress(student, smaller, SST2, data, tmp_path / "ternary", **common)
    assert report.baseline is not None and report.baseline.parameters == report.compressed.parameters
    report = compress(student, RECIPE, SST2, data, tmp_path / "small", baseline=str(student), **common)
    assert report.baseline is not None and report.baseline.training is None
    scores = SST2.evaluate(shallower("Bert"), SST2.load(data)["validation"], make_tokenizer(), Limits(LENGTH)).scores
    assert report.baseline.scores == scores


# ---- what a saved folder is taken for --------------------------------------------------------------------------------


def test_a_float_student_loads_as_the_ordinary_model_that_it_is(student: Path) -> None:
    model, fresh = load_for(student, SST2, 0)
    expected = shallower("Bert").state_dict()
    state = model.state_dict()
    assert fresh == () and state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    program = prequant.load(student)
    assert type(load_model_like(student, program)) is type(model), "errors are measured against it"


def test_a_float_student_without_a_head_gets_one(tmp_path: Path, data: Path) -> None:
    program = canonical_program(make_model(head="Model", num_hidden_layers=DEPTH), make_tokenizer())
    folder = save(DropLayers(keep=KEEP)(program), tmp_path / "bare", make_tokenizer())
    model, fresh = load_for(folder, SST2, 3)
    assert fresh == ("classifier.bias", "classifier.weight")
    ordinary = saved_by_transformers(tmp_path / "ordinary", shallower("Bert", "Model"))
    expected = load_for(ordinary, SST2, 3)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    with pytest.raises(SourceError, match=r"bare has no head for sst2: classifier.bias, classifier.weight are missing"):
        compress(folder, XTC(bits=1), SST2, data, tmp_path / "out", max_length=LENGTH, progress=False)
    result = run("eval", folder, "--task", "sst2", "--data", data, "--max-length", LENGTH)
    assert result.exit_code == 2 and "has no head for sst2" in result.stderr


COMPRESSED: dict[str, list[Pass]] = {
    "codes": [QuantizeWeights(bits=4)],
    "one weight": [QuantizeWeights(bits=4, include=("*.0.output.dense.weight",))],
    "planes": [BinaryCode(bits=2), Lower()],
    "outliers": [SplitOutliers(ratio=0.05)],
    "activations": [QuantizeActivations(), Lower()],
    "latent": [QuantizeWeights(bits=2, latent=True)],
}


def test_a_student_of_xtc_is_reconstructed_instead_of_trained(teacher: Path, data: Path, tmp_path: Path) -> None:
    """Fewer layers by XTC in float, then two bits by MREM: what the student gives is what its modules learn."""
    succeed(
        "compress", teacher, "--recipe", "xtc", "--keep", "1,3", "--bits", 32, *budget(data), "--out", tmp_path / "a"
    )
    words = ("--recipe", "mrem", "--modules", 2, "--bits", 2, "--batch-size", 4, "--max-steps", 30)
    texts = ("--task", "sst2", "--data", data, "--max-length", LENGTH, "--learning-rate", "1e-3", "--quiet")
    succeed("compress", tmp_path / "a", *words, *texts, "--out", tmp_path / "b")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    packed = prequant.load(tmp_path / "b")
    assert isinstance(packed, ModelProgram) and packed.config.num_hidden_layers == 2
    formats = {view.name: view.format for view in weights(packed)}
    layers = {format for name, format in formats.items() if ".layer." in name}
    assert layers == {"ternary:tensor"} and formats["bert.embeddings.word_embeddings.weight"] == "ternary:row"
    report = json.loads((tmp_path / "b" / "prequant-report.json").read_text())
    assert [module["blocks"] for module in report["modules"]] == [1, 1]
    assert all(module["last_loss"] < module["first_loss"] for module in report["modules"])
    # Nearer to the student than the same bits without the reconstruction.
    untrained = Pipeline(
        [QuantizeWeights(bits=2, ternary=True, granularity=Granularity.TENSOR, exclude=("classifier*",))]
    )(canonical_program(student, make_tokenizer()))
    wanted = logits(student)
    assert (logits(packed) - wanted).square().mean() < (logits(untrained) - wanted).square().mean()


@pytest.mark.parametrize("form", COMPRESSED)
def test_a_folder_with_anything_compressed_is_refused(form: str, tmp_path: Path, data: Path) -> None:
    program, _ = deep_program("Bert")
    folder = save(Pipeline([DropLayers(keep=KEEP), *COMPRESSED[form]])(program), tmp_path / "folder", make_tokenizer())
    jobs: list[Any] = [
        lambda: load_for(folder, SST2, 0),
        lambda: compress(folder, RECIPE, SST2, data, tmp_path / "out", max_length=LENGTH, progress=False),
        lambda: finetune_baseline(folder, SST2, data, tmp_path / "out", BUDGET, max_length=LENGTH, progress=False),
    ]
    for job in jobs:
        with pytest.raises(SourceError, match="is compressed already; give the float model, or use 'prequant opt'"):
            job()
    assert not (tmp_path / "out").exists()


def test_codes_under_a_plain_configuration_are_no_float_model(student: Path, tmp_path: Path) -> None:
    """Transformers would draw the weights that are not there."""
    program, _ = deep_program("Bert")
    coded = Pipeline([DropLayers(keep=KEEP), QuantizeWeights(bits=4)])(program)
    folder = save(coded, tmp_path / "coded", make_tokenizer())
    shutil.copy(student / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match=r"weights is not what prequant.json says; the files don't belong"):
        load_for(folder, SST2, 0)
    shutil.copy(folder / "model.safetensors", student / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        load_for(student, SST2, 0)


def test_there_is_nothing_to_adapt_in_a_float_student(student: Path, data: Path, tmp_path: Path) -> None:
    result = run("adapt", student, "--task", "sst2", "--data", data, "--out", tmp_path / "file")
    assert result.exit_code == 2 and "the base has no compressed weight: compress it first" in result.stderr


# ---- errors of weights whose layers have other numbers ---------------------------------------------------------------


def test_errors_are_measured_against_the_layer_that_a_weight_was_made_of(teacher: Path, tmp_path: Path) -> None:
    quantize = "canonicalize,quantize-weights{bits=4}"
    succeed("opt", teacher, "--pipeline", f"drop-layers{{keep=[1,3]}},{quantize}", "--out", tmp_path / "ours")
    shallow = saved_by_transformers(tmp_path / "shallow", shallower("Bert"))
    succeed("opt", shallow, "--pipeline", quantize, "--out", tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "prequant-report.json").read_text()) for name in ("ours", "theirs"))
    assert ours["weights"] == theirs["weights"]
    assert min(row["sqnr"] for row in ours["weights"]) > 10
    result = run("inspect", tmp_path / "ours", "--against", teacher)
    assert result.exit_code == 2 and "the model has 2 layers, the original 4" in result.stderr
    succeed("inspect", tmp_path / "ours", "--against", shallow)


def test_what_was_recorded_of_other_layers_is_not_taken_over(teacher: Path, tmp_path: Path) -> None:
    succeed("opt", teacher, "--pipeline", "canonicalize,quantize-weights{bits=4},lower", "--out", tmp_path / "deep")
    succeed("opt", tmp_path / "deep", "--pipeline", "drop-layers{keep=[1,3]}", "--out", tmp_path / "shallow")
    rows = json.loads((tmp_path / "shallow" / "prequant-report.json").read_text())["weights"]
    assert rows and all(row["sqnr"] is None for row in rows)
