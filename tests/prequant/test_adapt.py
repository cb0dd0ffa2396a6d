"""Other tasks on a compressed base: the job, the commands, and what is left of the base."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

import prequant
from prequant.adapt import adapt, recipe_for
from prequant.adapters import AdapterError, adapter_of, fingerprint, read_adapter
from prequant.cli import app
from prequant.compress import compress
from prequant.recipes import AlphaTuning, PreQuant, TuningRecipe
from prequant.runtime import PrequantError
from prequant.sources import SourceError
from prequant.tasks import Limits, Task, task
from prequant.training import TrainingSettings

from .test_alphatuning import E2E
from .test_compress_tasks import CASES
from .tiny import LENGTH, SST2, make_tokenizer, save_folder, write_data

BUDGET = TrainingSettings(max_steps=3, batch_size=4, scale_learning_rate=0.05, weight_decay=0.0, dropout=False)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})


def succeed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.stdout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "rows.tsv")


@pytest.fixture(scope="module")
def meanings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = {"mr": [f"name[day {i % 4}], food[good]" for i in range(12)], "ref": ["a good film", "the day was bad"] * 6}
    folder = tmp_path_factory.mktemp("e2e")
    for split in ("train", "dev"):
        Dataset.from_dict(rows).to_csv(folder / f"{split}set.csv")
    return folder


@pytest.fixture(scope="module")
def writer(meanings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binary-coded decoder, tuned to write, and the adapter of that."""
    folder = tmp_path_factory.mktemp("writer")
    decoder = save_folder(folder / "decoder", "GPT2", "LMHeadModel", pad_token_id=0)
    recipe = AlphaTuning(training=BUDGET)
    arguments: dict[str, Any] = {"max_length": LENGTH, "progress": False, "baseline": "none"}
    compress(decoder, recipe, E2E, meanings, folder / "base", adapter=folder / "e2e.safetensors", **arguments)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_task_on_a_decoder(writer: Path, data: Path, meanings: Path, tmp_path: Path) -> None:
    base, before = writer / "base", bytes_of(writer / "base")
    recipe = AlphaTuning(training=dataclasses.replace(BUDGET, head_learning_rate=1e-2))
    report = adapt(base, SST2, data, tmp_path / "sst2.safetensors", recipe, max_length=LENGTH, progress=False)
    again = adapt(base, E2E, meanings, tmp_path / "more.safetensors", recipe, max_length=LENGTH, progress=False)
    assert bytes_of(base) == before
    program: Any = prequant.load(base)
    adapters = {name: read_adapter(tmp_path / f"{name}.safetensors") for name in ("sst2", "more")}
    names = {name for name in adapters["more"].tensors}
    assert len(names) == 8 and all(name.endswith(".first_alphas") for name in names)
    assert adapters["sst2"].tensors.keys() - names == {"score.weight"}
    assert report.parameters == 2 * 9 * 32 + 2 * 32 and again.parameters == 2 * 9 * 32
    assert report.bytes == (tmp_path / "sst2.safetensors").stat().st_size < 0.2 * report.base_bytes
    rows = {"sst2": (SST2, SST2.load(data)), "more": (E2E, E2E.load(meanings))}
    for name, scores in (("sst2", report.scores), ("more", again.scores)):
        program.load_adapter(name, tmp_path / f"{name}.safetensors")
        program.set_adapter(name)
        of, splits = rows[name]
        score = of.evaluate(program, splits["validation"], make_tokenizer(), Limits(LENGTH), progress=False)
        assert score.scores == scores == adapters[name].about["scores"]
    about = adapters["sst2"].about
    assert about["task"] == "sst2" and about["settings"]["recipe"] == "alphatuning"
    assert about["settings"]["max_steps"] == 3 and about["versions"]["torch"] == torch.__version__
    third = tmp_path / "again.safetensors"
    adapt(base, SST2, data, third, recipe, max_length=LENGTH, progress=False)
    for name, tensor in read_adapter(third).tensors.items():
        assert torch.equal(tensor, adapters["sst2"].tensors[name])  # the same seed, the same adapter


def test_the_adapter_of_the_task_that_a_base_was_made_with(writer: Path) -> None:
    adapter = read_adapter(writer / "e2e.safetensors")
    program: Any = prequant.load(writer / "base")
    assert adapter.base == fingerprint(program) and adapter.about["task"] == "e2e"
    for name, tensor in adapter.tensors.items():
        assert torch.equal(program.tensor(name.replace("first_alphas", "alphas"))[:1], tensor)
    assert len(adapter.tensors) == 8
    program.load_adapter("e2e", writer / "e2e.safetensors")
    assert not adapter_of(program, program._adapters.program("e2e")).tensors


@pytest.mark.parametrize("case", ["classes of pairs", "numbers", "answers", "entities", "classes as text"])
def test_tasks_of_every_kind_on_an_encoder(case: str, data: Path, tmp_path: Path) -> None:
    family, head, of, columns = CASES[case]
    folder = save_folder(tmp_path / "model", family, head)
    first: Task = task("sst2-text") if family == "T5" else SST2
    recipe: TuningRecipe = PreQuant(training=BUDGET)
    compress(folder, recipe, first, data, tmp_path / "base", baseline="none", max_length=LENGTH, progress=False)
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        Dataset.from_dict(columns).to_parquet(tmp_path / "data" / f"{split}.parquet")
    out = tmp_path / "task.safetensors"
    report = adapt(tmp_path / "base", of, tmp_path / "data", out, recipe, max_length=LENGTH, progress=False)
    program: Any = prequant.load(tmp_path / "base")
    program.load_adapter("x", out)
    program.set_adapter("x")
    assert program.task == of.kind and not of.misfit(program.config)
    if family != "T5":  # which writes its answers: the longest part of the job
        rows = of.load(tmp_path / "data")["validation"]
        score = of.evaluate(program, rows, make_tokenizer(), Limits(LENGTH), progress=False)
        assert score.scores == report.scores
    kinds = {name.rpartition(".")[2] for name in read_adapter(out).tensors}
    assert "values" in kinds and "scale" in kinds


def test_the_recipe_goes_with_the_weights(writer: Path, data: Path, tmp_path: Path) -> None:
    base: Any = prequant.load(writer / "base")
    assert isinstance(recipe_for(base), AlphaTuning)
    folder = save_folder(tmp_path / "model")
    recipe = PreQuant(outlier_ratio=0.0, train=("head", "scales"), training=BUDGET)
    compress(folder, recipe, SST2, data, tmp_path / "base", baseline="none", max_length=LENGTH, progress=False)
    found = recipe_for(prequant.load(tmp_path / "base"))  # type: ignore[arg-type]
    assert isinstance(found, PreQuant) and "outliers" not in found.train


def test_the_commands(writer: Path, data: Path, tmp_path: Path) -> None:
    base, out = writer / "base", tmp_path / "sst2.safetensors"
    job = ("--task", "sst2", "--data", data, "--max-length", LENGTH, "--max-steps", 2, "--batch-size", 4, "--quiet")
    shown = succeed("adapt", base, *job, "--out", out, "--learning-rate", 1e-3)
    assert "numbers of its own" in shown and "of the base" in shown and f"saved to {out}" in shown
    table = succeed("adapters", base, out, writer / "e2e.safetensors")
    assert "sst2" in table and "e2e" in table and table.count("this base") == 2 and "8 first alphas" in table
    scored = succeed("eval", base, "--adapter", out, *job[:4], "--max-length", LENGTH, "--quiet")
    assert scored.startswith("accuracy ")
    score = read_adapter(out).about["scores"]["accuracy"]
    assert scored.startswith(f"accuracy {score:.4f}")
    plain = succeed("generate", base, "--prompt", "a good film", "--max-new-tokens", 6)
    same = succeed(
        "generate", base, "--adapter", writer / "e2e.safetensors", "--prompt", "a good film", "--max-new-tokens", 6
    )
    assert plain == same


def test_what_can_not_be_adapted_is_said_first(writer: Path, data: Path, tmp_path: Path) -> None:
    decoder, out = writer / "decoder", tmp_path / "x.safetensors"
    with pytest.raises(SourceError, match="is no folder that prequant saved; compress a model first"):
        adapt(decoder, SST2, data, out)
    with pytest.raises(AdapterError, match="is a folder; an adapter is a file"):
        adapt(writer / "base", SST2, data, tmp_path)
    with pytest.raises(AdapterError, match="there is no gpt2 model for seq2seq-lm, which sst2-text takes"):
        adapt(writer / "base", task("sst2-text"), data, out)
    with pytest.raises(PrequantError, match="scales=True, but no weight has scales"):
        adapt(writer / "base", SST2, data, out, PreQuant(), max_length=LENGTH)
    result = run("generate", decoder, "--adapter", writer / "e2e.safetensors", "--prompt", "a")
    assert result.exit_code == 2 and "it takes no adapter" in result.stderr
    result = run("eval", writer / "base", "--adapter", data, "--task", "sst2", "--data", data)
    assert result.exit_code == 2 and "can't be read as an adapter" in result.stderr
    assert not out.exists()
