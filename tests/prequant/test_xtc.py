"""XTC on a tiny encoder: its stages, what is quantized and trains, and the whole job."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from typer.testing import CliRunner

import prequant
from prequant.cli import app
from prequant.compress import GIVEN, TRAIN, compress, default_baseline_training
from prequant.finetune import finetune_baseline
from prequant.model import ModelProgram
from prequant.passes import Program, weights
from prequant.recipes import XTC, PreQuant
from prequant.runtime import Granularity, PrequantError
from prequant.sources import SourceError, canonical_program, head_of, load_for
from prequant.training import TrainingSettings

from .tiny import LENGTH, SST2, collator, encoded, make_tokenizer, save_folder, write_data

BUDGET = TrainingSettings(max_steps=4, batch_size=4, learning_rate=1e-3)
HEAD = ("classifier.weight", "classifier.bias")
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "teacher", "Bert", "ForSequenceClassification", num_hidden_layers=4)


def original_of(folder: Path) -> ModelProgram:
    model, _ = load_for(folder, SST2, 0, make_tokenizer())
    assert head_of(model, SST2) == HEAD
    return cast(ModelProgram, canonical_program(model, make_tokenizer()))


def staged(recipe: XTC, original: Program, number: int = 0, program: Program | None = None) -> ModelProgram:
    program = original if program is None else program
    return cast(ModelProgram, recipe.stage(number, program, original, HEAD).passes(program))


def test_first_fewer_layers_of_which_all_trains(teacher: Path) -> None:
    original = original_of(teacher)
    recipe = XTC(keep=(1, 3))
    stage = recipe.stage(0, original, original, HEAD)
    assert recipe.stages == 2 and stage.layers is not None and stage.layers.scores == (1, 3)
    student = staged(recipe, original)
    assert student.config.num_hidden_layers == 2
    assert all(p.requires_grad for p in student.parameters())
    assert {view.format for view in weights(student)} == {"float32"}
    own = {p.data_ptr() for p in student.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in original.parameters()), "training leaves the teacher alone"
    assert len(student.signature.exposed) == 2 + 3


@pytest.mark.parametrize(
    ("options", "linear", "words"),
    [
        ({"bits": 1}, "binary:tensor", "binary:row"),
        ({"bits": 2}, "ternary:tensor", "ternary:row"),
        ({"bits": 2, "granularity": Granularity.ROW}, "ternary:row", "ternary:row"),
        ({"bits": 4}, "affine4:tensor", "affine4:row"),
    ],
)
def test_then_fewer_bits_of_layers_and_words(teacher: Path, options: dict[str, Any], linear: str, words: str) -> None:
    original = original_of(teacher)
    student = staged(XTC(**options), original)
    formats = {view.name: view.format for view in weights(student)}
    assert formats.pop(WORDS) == words
    layers = {name for name in formats if ".layer." in name}
    assert len(layers) == 4 * 6 and {formats[name] for name in layers} == {linear}
    assert {formats[name] for name in set(formats) - layers} == {"float32"}, "pooler, head and positions"
    inputs = {view.name: view.input_format for view in weights(student) if view.input_format}
    assert inputs == dict.fromkeys(layers, "affine8:row")
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen and all(name.endswith((".scale", ".zero_point")) for name in frozen)


def test_scales_follow_their_weights_and_codes_are_what_trained(teacher: Path) -> None:
    """The packed model of the end gives what the student gave in training, and its scales are the mean magnitudes."""
    from prequant.distillation import Distiller
    from prequant.passes import ExposeOutputs
    from prequant.passes.latent_scales import following
    from prequant.training import finetune

    original = original_of(teacher)
    recipe = XTC(bits=1, activation_bits=0, training=BUDGET)
    stage = recipe.stage(0, original, original, HEAD)
    student = cast(ModelProgram, stage.passes(original))
    exposed = cast(ModelProgram, ExposeOutputs(hidden_states=True, attention_scores=True)(original))
    assert stage.layers is not None
    model = Distiller(student, exposed, stage.layers)
    before = student.tensor("bert.encoder.layer.0.output.dense.weight.scale").clone()
    finetune(model, encoded(), collator(), BUDGET, progress=False, after_step=following(student).renew)
    weight = "bert.encoder.layer.0.output.dense.weight"
    scale, latent = student.tensor(f"{weight}.scale"), student.tensor(f"{weight}.latent")
    assert not torch.equal(scale, before)
    torch.testing.assert_close(scale, latent.detach().abs().mean().reshape(1, 1))
    batch = {k: v for k, v in collator()([encoded()[i] for i in range(6)]).items() if k != "labels"}
    with torch.no_grad():
        expected = student(**batch).logits
    packed = recipe.finish()(student)
    assert {view.lowered for view in weights(packed) if ".layer." in view.name} == {True}
    assert not packed.signature.exposed
    with torch.no_grad():
        torch.testing.assert_close(packed(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"keep": (1, 3), "bits": 1}, {"count": 2, "bits": 32}, {"bits": 2}], ids=str)
def test_the_whole_job(teacher: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    data, out = write_data(tmp_path / "data.tsv"), tmp_path / "out"
    recipe = XTC(training=BUDGET, **options)
    report = compress(teacher, recipe, SST2, data, out, baseline=GIVEN, max_length=LENGTH, progress=False)
    assert report.compressed.training is not None
    assert report.compressed.training.steps == 4 * recipe.stages
    layers = 4 if options == {"bits": 2} else 2
    config = transformers.AutoConfig.from_pretrained(teacher, num_hidden_layers=layers)
    plain = transformers.AutoModelForSequenceClassification.from_config(config)
    assert report.compressed.parameters == sum(p.numel() for p in plain.parameters())
    assert report.compressed.nominal_bytes == -(-report.compressed.parameters * options["bits"] // 8)
    program = prequant.load(out)
    assert isinstance(program, ModelProgram) and program.config.num_hidden_layers == layers
    said = json.loads((out / "prequant-report.json").read_text())["settings"]["recipe"]
    assert said["recipe"] == "xtc" and said["bits"] == options["bits"]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    inputs = make_tokenizer()("a good film", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, program(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_the_best_state_on_the_way_is_saved(teacher: Path, tmp_path: Path) -> None:
    recipe = XTC(bits=1, training=replace(BUDGET, max_steps=6, eval_steps=2))
    data = write_data(tmp_path / "data.tsv")
    report = compress(teacher, recipe, SST2, data, tmp_path / "out", max_length=LENGTH, progress=False)
    assert report.compressed.training is not None and report.compressed.training.best_step in (2, 4, 6)
    assert report.baseline is not None and report.baseline.training is None, "the teacher, as it is"
    assert 0 <= report.compressed.scores[report.metric_name] <= 1


def test_it_learns_from_labels_if_told_to(teacher: Path, tmp_path: Path) -> None:
    recipe = XTC(keep=(0, 2), distil=False, training=BUDGET)
    data = write_data(tmp_path / "data.tsv")
    compress(teacher, recipe, SST2, data, tmp_path / "out", baseline=GIVEN, max_length=LENGTH, progress=False)
    original = original_of(teacher)
    assert recipe.stage(0, original, original, HEAD).layers is None
    assert not staged(recipe, original).signature.exposed


def test_a_model_without_a_head_is_made_a_teacher_if_told_to(tmp_path: Path) -> None:
    """Which gives what fine-tuning and then XTC give."""
    folder, out = save_folder(tmp_path / "encoder"), tmp_path / "out"
    recipe = XTC(bits=1, training=BUDGET)
    options: dict[str, Any] = {"max_length": LENGTH, "progress": False}
    with pytest.raises(SourceError, match="xtc learns from a model that is fine-tuned for the task"):
        compress(folder, recipe, SST2, "sample", out, **options)
    report = compress(folder, recipe, SST2, "sample", out, baseline=TRAIN, **options)
    budget = default_baseline_training(BUDGET)
    finetune_baseline(folder, SST2, "sample", tmp_path / "teacher", budget, **options)
    apart = compress(tmp_path / "teacher", recipe, SST2, "sample", tmp_path / "apart", **options)
    assert report.baseline is not None and report.baseline.training is not None and apart.baseline is not None
    assert report.baseline.scores == apart.baseline.scores
    ours, theirs = (prequant.load(path).state_dict() for path in (out, tmp_path / "apart"))
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits=0: expected 1 to 8, or 32"),
        ({"bits": 32}, "bits=32 and neither keep nor count"),
        ({"keep": (1,), "count": 1}, "give either keep or count"),
        ({"keep": (3, 1)}, "expected numbers from 0, in order"),
        ({"granularity": "group"}, "granularity='group': expected 'tensor' or 'row'; xtc has no groups"),
        ({"activation_bits": 1}, "activation_bits=1: expected 2 to 8, or 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        XTC(**options)


def test_the_command(teacher: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.tsv")
    words = ["compress", teacher, "--recipe", "xtc", "--keep", "1,3", "--bits", "2", "--task", "sst2", "--data", data]
    budget = ["--max-steps", 2, "--batch-size", 4, "--max-length", LENGTH, "--out", tmp_path / "out", "--quiet"]
    result = CliRunner().invoke(app, [str(word) for word in (*words, *budget)], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    said = json.loads((tmp_path / "out" / "prequant-report.json").read_text())["settings"]
    assert (said["recipe"]["keep"], said["recipe"]["bits"], said["baseline"]) == ([1, 3], 2, "given")
    assert said["recipe"]["training"]["eval_steps"] == 1000, "the best state is kept, as published"


def test_a_base_is_not_tuned_by_it(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", "Bert", "ForSequenceClassification")
    compress(base, PreQuant(training=BUDGET), SST2, "sample", tmp_path / "packed", max_length=LENGTH, progress=False)
    words = ["adapt", tmp_path / "packed", "--task", "sst2", "--recipe", "xtc", "--out", tmp_path / "file"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2 and "'xtc' trains whole models" in result.stderr
