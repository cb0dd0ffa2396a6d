"""Jobs whose process is killed, and that go on when the same command is given again."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prequant.adapt import adapt
from prequant.cli import app
from prequant.compress import compress
from prequant.recipes import PreQuant
from prequant.training import TrainingError, TrainingSettings

from .tiny import LENGTH, SST2, save_folder, write_data


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "teacher", "Bert", "ForSequenceClassification", num_hidden_layers=4)


def weights_in(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "prequant", *map(str, words), "--max-length", str(LENGTH), "--quiet"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_a_job_that_was_killed_goes_on_to_the_same_folder(teacher: Path, tmp_path: Path) -> None:
    """Killed in its second training, so that the first is not repeated, and its result is there again."""
    data = write_data(tmp_path / "data.tsv")
    job = ["compress", teacher, "--recipe", "xtc", "--keep", "1,3", "--task", "sst2", "--data", data]
    budget = ["--max-steps", 40, "--batch-size", 4, "--learning-rate", "1e-3", "--eval-steps", 10]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run(
        command(*job, *budget, "--out", whole), check=True, env=environment(), stderr=subprocess.PIPE, cwd=tmp_path
    )

    words = command(*job, *budget, "--save-steps", 1, "--out", out)
    running = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, cwd=tmp_path)
    second, started = tmp_path / "out.unfinished" / "stage-1.safetensors", time.monotonic()
    steps = set[int]()  # in the first its rate is 0
    while len(steps) < 6 and running.poll() is None and time.monotonic() - started < 240:
        with suppress(FileNotFoundError):
            steps.add(second.stat().st_mtime_ns)
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert running.returncode == -signal.SIGKILL and second.exists() and not out.exists()

    first = tmp_path / "out.unfinished" / "stage-0.safetensors"
    written = first.stat().st_mtime_ns
    again = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, cwd=tmp_path)
    seen = {written}
    while again.poll() is None:
        if first.exists():
            seen.add(first.stat().st_mtime_ns)
        time.sleep(0.01)
    assert again.returncode == 0, again.communicate()[1]
    assert seen == {written}, "the first training was not repeated"
    assert weights_in(out) == weights_in(whole)
    assert not (tmp_path / "out.unfinished").exists()
    reports = [json.loads((folder / "prequant-report.json").read_text()) for folder in (whole, out)]
    assert reports[0]["compressed"]["scores"] == reports[1]["compressed"]["scores"]
    assert reports[0]["compressed"]["training"]["steps"] == reports[1]["compressed"]["training"]["steps"] == 80
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


@pytest.mark.parametrize("kind", ["finetune", "compress", "adapt"])
def test_every_command_that_trains_keeps_its_state_while_it_runs(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prequant.training import course

    written: list[str] = []
    write = course.write_state

    def watched(path: Path, *rest: Any) -> None:
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(course, "write_state", watched)
    model = save_folder(tmp_path / "model", "Bert", "ForSequenceClassification")
    training = TrainingSettings(max_steps=2, batch_size=4)
    if kind == "adapt":
        compress(
            model, PreQuant(training=training), SST2, "sample", tmp_path / "base", baseline="none", max_length=LENGTH
        )
        model = tmp_path / "base"
    out = tmp_path / ("out.safetensors" if kind == "adapt" else "out")
    words = [kind, model, "--task", "sst2", "--data", "sample", "--out", out, "--max-steps", 4, "--save-steps", 2]
    result = CliRunner().invoke(
        app, [*map(str, words), "--batch-size", "4", "--eval-steps", "2", "--max-length", str(LENGTH), "--quiet"]
    )
    assert result.exit_code == 0, result.output
    names = {"finetune": ["training"], "compress": ["baseline", "stage-0"], "adapt": ["training"]}[kind]
    assert written == [f"{name}.safetensors" for name in names for _ in range(2)]
    assert out.exists() and not out.with_name(f"{out.name}.unfinished").exists()


def test_what_was_left_unfinished_is_not_passed_over(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "model", "Bert", "ForSequenceClassification")
    (tmp_path / "out.unfinished").mkdir()
    with pytest.raises(TrainingError, match=r"out.unfinished has the checkpoints of a job that did not finish: go on"):
        compress(model, PreQuant(), SST2, "sample", tmp_path / "out", baseline="none")
    with pytest.raises(TrainingError, match="save_steps=-1: expected 1 or more, or 0 to keep nothing"):
        adapt(model, SST2, "sample", tmp_path / "new", save_steps=-1)
