"""The whole job of MREM, in one process and in several."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import prequant
from prequant.checkpoint import CheckpointError
from prequant.cli import app
from prequant.model import ModelProgram
from prequant.passes import weights
from prequant.passes.train import quantizes_activation
from prequant.recipes import MREM
from prequant.reconstruct import Job, read_source, reconstruct
from prequant.reconstruction import Learner, ReconstructionError
from prequant.runtime import PrequantError
from prequant.sources import SourceError
from prequant.training import TrainingError, TrainingSettings

from ..tiny import LENGTH, SST2, make_model, make_tokenizer, save_folder, write_data
from .chains import recipe as with_attention

recipe = partial(with_attention, attention=False)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "model", "Bert", "ForSequenceClassification", num_hidden_layers=4)


def loaded_equal(folder: Path) -> ModelProgram:
    """The saved model, which transformers reads to the same effect."""
    program = prequant.load(folder)
    assert isinstance(program, ModelProgram)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = make_tokenizer()(["a good film", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, program(**inputs).logits, rtol=1e-3, atol=1e-3)
    return program


@pytest.mark.parametrize("parallel", [False, True], ids=["in turn", "interleaved"])
def test_the_whole_job_on_a_task(model: Path, tmp_path: Path, parallel: bool) -> None:
    out = tmp_path / "out"
    data = write_data(tmp_path / "data.tsv")
    method = recipe(parallel=parallel, queue=4)
    report = reconstruct(model, method, out, task=SST2, data=data, max_length=LENGTH, progress=False)
    assert report is not None and report.baseline is not None
    assert report.metric_name == "accuracy" and report.examples == 12
    assert report.compressed.bytes_on_disk < report.baseline.bytes_on_disk
    assert [module.steps for module in report.modules] == [8, 8] and [m.blocks for m in report.modules] == [2, 2]
    program = loaded_equal(out)
    formats = {view.name: (view.format, view.input_format) for view in weights(program)}
    assert formats.pop("bert.embeddings.word_embeddings.weight")[0] == "affine4:row"
    assert formats.pop("classifier.weight") == ("float32", "")
    layers = [format for name, format in formats.items() if ".layer." in name]
    assert len(layers) == 24 and {weight for weight, _ in layers} == {"affine4:tensor"}
    assert {input for _, input in layers} <= {"affine8:tensor", "affine8:tensor:asym"}
    said = json.loads((out / "prequant-report.json").read_text())
    assert said["settings"]["recipe"]["recipe"] == "mrem" and said["settings"]["texts"] == 24
    assert said["settings"]["processes"] == 1 and len(said["modules"]) == 2
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize("parallel", [False, True], ids=["in turn", "interleaved"])
def test_a_job_that_goes_on_counts_the_seconds_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parallel: bool
) -> None:
    job = partial(
        reconstruct, model, recipe(parallel=parallel), tmp_path / "out", task=SST2, data="sample", max_length=LENGTH
    )
    step = Learner.step

    def killed(self: Learner, *values: Any) -> Any:
        if self.module.number == 1 and self.done == 6:
            raise KeyboardInterrupt
        return step(self, *values)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Learner, "step", killed)
        job(save_steps=2, progress=False)
    report = job(save_steps=2, progress=False)
    assert report is not None and report.compressed.training is not None
    before, whole = zip(*((module.seconds_before, module.seconds) for module in report.modules), strict=True)
    assert all(0 < part <= of for part, of in zip(before, whole, strict=True)) and before[1] < whole[1]
    assert report.compressed.training.seconds > sum(whole)


def test_texts_alone_are_enough(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a good film\na bad film\nneither good nor bad\n" * 4)
    report = reconstruct(
        model, recipe(), tmp_path / "out", calibration=tmp_path / "texts.txt", max_length=LENGTH, progress=False
    )
    assert report is not None and report.compressed.metric is None and report.comparison().keys() == {"size", "latency"}
    loaded_equal(tmp_path / "out")


def test_inside_attention_it_is_quantized_if_asked_for(model: Path, tmp_path: Path) -> None:
    method = with_attention()
    reconstruct(model, method, tmp_path / "out", task=SST2, data="sample", max_length=LENGTH, progress=False)
    program = prequant.load(tmp_path / "out")
    quantized = [node for node in program.graph.nodes if quantizes_activation(node)]
    assert len(quantized) == 4 * 4, "queries, keys, probabilities and values of each layer"
    with pytest.raises(CheckpointError, match="quantizes more than the weight or input of a linear"):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_a_model_of_16_bits_without_padding_of_its_own_is_read_in_float32_with_the_tokenizers(tmp_path: Path) -> None:
    half = make_model("GPT2", "ForSequenceClassification", n_layer=3).half()
    half.save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "texts.txt").write_text("a good film\na bad film\n")
    job = Job(tmp_path / "gpt2", recipe(), tmp_path / "texts.txt", None, None, LENGTH, False)
    read = read_source(job)
    assert {parameter.dtype for parameter in read.original.parameters()} == {torch.float32}
    assert read.model.config.pad_token_id == read.tokenizer.pad_token_id


def test_a_decoder_is_reconstructed_as_well(tmp_path: Path) -> None:
    """Its table of words is its head's, too, and trains in neither of their modules."""
    folder = save_folder(tmp_path / "gpt2", "GPT2", "LMHeadModel", n_layer=3)
    (tmp_path / "texts.txt").write_text("a good film\na bad film\nneither good nor bad\n" * 4)
    report = reconstruct(
        folder,
        recipe(modules=3),
        tmp_path / "out",
        calibration=tmp_path / "texts.txt",
        max_length=LENGTH,
        progress=False,
    )
    assert report is not None and [module.blocks for module in report.modules] == [1, 1, 1]
    assert 0 < report.compressed.trainable < report.compressed.parameters / 2, "words are more than half of them"
    program = prequant.load(tmp_path / "out")
    assert isinstance(program, ModelProgram)
    ids = make_tokenizer()("a good film", return_tensors="pt")["input_ids"]
    assert (
        program.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == ids.shape[1] + 3
    )


def test_the_command(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a good film\na bad film\nneither good nor bad\n" * 4)
    words = ["compress", model, "--recipe", "mrem", "--modules", 2, "--bits", 4, "--activation-bits", 8]
    texts = ["--calibration", tmp_path / "texts.txt", "--out", tmp_path / "out", "--max-length", LENGTH]
    budget = ["--max-steps", 3, "--batch-size", 4, "--quiet"]
    result = CliRunner().invoke(app, [*map(str, (*words, *texts, *budget))], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert re.search(r"│ 2 │\s+2 │\s+3 │", result.output), result.output
    said = json.loads((tmp_path / "out" / "prequant-report.json").read_text())["settings"]
    assert (said["recipe"]["modules"], said["recipe"]["training"]["max_steps"]) == (2, 3)


def test_its_budget_is_its_own_unless_it_is_told(model: Path, tmp_path: Path) -> None:
    from prequant.cli.settings import trained_with

    usual = MREM().training
    rates = (None, None, None)
    assert trained_with(usual, None, None, rates, None, -1, None, None, 42).max_steps == 2000
    assert trained_with(usual, 2.0, None, rates, None, -1, None, None, 42).max_steps == -1
    assert trained_with(usual, None, None, rates, None, 7, None, None, 42).max_steps == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "bits=9: expected 1 to 8"),
        ({"activation_bits": 1}, "activation_bits=1: expected 2 to 8, or 0"),
        ({"embedding_bits": 2}, "embedding_bits=2 goes with 1 or 2 bits of the other weights, not with 4"),
        ({"modules": 0}, "modules=0: expected 1 or more"),
        ({"granularity": "group"}, "granularity='group': expected 'tensor' or 'row'; mrem has no groups"),
        ({"forcing": 1.5}, "forcing=1.5: expected a share of the steps"),
        ({"training": TrainingSettings(eval_steps=3)}, "mrem looks at no labels"),
        ({"attention": True, "activation_bits": 0}, "activation_bits=0 leaves all in float"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrequantError, match=message):
        MREM(**options)


def test_what_can_not_be_reconstructed_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(ReconstructionError, match="data 'sample' is a task's: name the task"):
        reconstruct(model, recipe(), out, calibration=tmp_path / "texts.txt", data="sample")
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ReconstructionError, match="several processes were started, and mrem works in one"):
            reconstruct(model, recipe(), out, task=SST2, data="sample")
    with pytest.raises(ReconstructionError, match="there are no texts to calibrate with"):
        reconstruct(model, recipe(), out)
    encoder = save_folder(tmp_path / "encoder")
    with pytest.raises(SourceError, match="mrem takes a model that is fine-tuned for the task"):
        reconstruct(encoder, recipe(), out, task=SST2, data="sample")
    seq2seq = save_folder(tmp_path / "t5", "T5", "ForConditionalGeneration")
    (tmp_path / "texts.txt").write_text("a good film\n")
    with pytest.raises(ReconstructionError, match="has an encoder and a decoder"):
        reconstruct(seq2seq, recipe(), out, calibration=tmp_path / "texts.txt")
    with pytest.raises(TrainingError, match="save_steps=-1: expected 1 or more"):
        reconstruct(model, recipe(), out, task=SST2, save_steps=-1)
    for words, message in (
        (
            ["--recipe", "mrem", "--calibration", "x.txt", "--adapter", "y"],
            "mrem does not take --adapter: it compares with the model as it is given",
        ),
        (
            ["--recipe", "mrem", "--dropout", "--head-learning-rate", "0.1", "--baseline-learning-rate", "0.1"],
            "mrem does not take --baseline-learning-rate, --dropout, --head-learning-rate: it",
        ),
        (["--recipe", "mrem", "--keep", "1,2", "--calibration", "x.txt"], "recipe 'mrem' has no option 'keep'"),
        (["--recipe", "xtc", "--keep", "", "--task", "sst2"], "--keep '' names no layer: write numbers from 0"),
        (["--recipe", "prequant"], "--task is missing: prequant trains for a task"),
        (["--recipe", "prequant", "--task", "sst2", "--calibration", "x.txt"], "--calibration is for mrem"),
    ):
        result = CliRunner().invoke(app, ["compress", str(model), "--out", str(out), *words])
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.stderr
    assert not out.exists()


# ---- in several processes --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(count: int, folder: Path, *words: Any, port: int = 0) -> list[subprocess.Popen[str]]:
    """The command in so many processes, as a launcher starts them."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(count)}
    options = ["--parallel", "--max-length", LENGTH, "--batch-size", 4, "--quiet", "--set", "queue=4"]
    command = [sys.executable, "-m", "prequant", "compress", *map(str, (*words, *options))]
    return [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **common,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    found = [process.communicate(timeout=240) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def test_under_torchrun_each_process_trains_a_module(model: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.tsv")
    words = [model, "--recipe", "mrem", "--modules", 2, "--parallel", "--task", "sst2", "--data", data]
    options = ["--max-steps", 12, "--max-length", LENGTH, "--batch-size", 4, "--quiet", "--out", tmp_path / "out"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    command = [*launcher, "-m", "prequant", "compress", *map(str, (*words, *options))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1, "the first process alone says so"
    loaded_equal(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "prequant-report.json").read_text())
    assert said["settings"]["processes"] == 2 and [module["steps"] for module in said["modules"]] == [12, 12]
    assert all(module["last_loss"] > 0 for module in said["modules"])
    assert not (tmp_path / "out.unfinished").exists()


def test_a_process_that_is_killed_is_named_and_the_others_end(model: Path, tmp_path: Path) -> None:
    words = [model, "--recipe", "mrem", "--modules", 3, "--task", "sst2", "--data", "sample"]
    running = start(3, tmp_path, *words, "--max-steps", 10**6, "--save-steps", 5, "--out", tmp_path / "out")
    last, since = tmp_path / "out.unfinished" / "module-2.safetensors", time.monotonic()
    while not last.exists() and time.monotonic() - since < 200 and all(p.poll() is None for p in running):
        time.sleep(0.05)
    running[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    results = ended(running)
    assert time.monotonic() - killed < 60
    for rank in (0, 2):
        code, _, said = results[rank]
        assert code == 2 and "rank 1, which had module 2 of 3, is gone" in said, said
    assert not (tmp_path / "out").exists() and last.exists()

    # The same command goes on from there: what is trained already is not trained again.
    running = start(3, tmp_path, *words, "--max-steps", 10**6, "--save-steps", 5, "--out", tmp_path / "out")
    before, since = last.stat().st_mtime_ns, time.monotonic()
    while (
        last.stat().st_mtime_ns == before and time.monotonic() - since < 200 and all(p.poll() is None for p in running)
    ):
        time.sleep(0.05)
    for process in running:
        process.send_signal(signal.SIGKILL)
    ended(running)
    assert last.stat().st_mtime_ns > before


def test_there_are_as_many_processes_as_modules(model: Path, tmp_path: Path) -> None:
    words = [model, "--recipe", "mrem", "--modules", 2, "--task", "sst2", "--data", "sample", "--max-steps", 4]
    results = ended(start(3, tmp_path, *words, "--out", tmp_path / "out"))
    for code, _, said in results:
        assert code == 2 and "3 processes for 2 modules: each takes one" in said, said
    assert not (tmp_path / "out").exists()
