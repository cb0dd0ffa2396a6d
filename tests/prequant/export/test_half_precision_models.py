"""Models whose files hold 16-bit floats: ``opt --dtype float32`` makes of them what ONNX takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import prequant
from prequant.cli import app

from ..tiny import make_model, save_folder

STEPS = ("--pipeline", "canonicalize,quantize-weights{bits=4},lower", "--no-reports")


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def half(tmp_path: Path) -> Path:
    folder = save_folder(tmp_path / "source", "GPT2", "LMHeadModel", n_layer=1)
    make_model("GPT2", "LMHeadModel", n_layer=1).half().save_pretrained(folder)
    return folder


def float_types(folder: Path) -> set[torch.dtype]:
    return {value.dtype for value in prequant.load(folder).state_dict().values() if value.is_floating_point()}


def test_a_model_in_its_own_type_is_refused_with_the_way_out(half: Path, tmp_path: Path) -> None:
    assert run("opt", half, *STEPS, "--out", tmp_path / "packed").exit_code == 0
    assert torch.float16 in float_types(tmp_path / "packed")
    refused = run("export", tmp_path / "packed", "--out", tmp_path / "model.onnx")
    assert refused.exit_code == 2 and not (tmp_path / "model.onnx").exists()
    (line,) = refused.stderr.splitlines()
    assert "is of float16: only Programs of float32" in line and "'prequant opt --dtype float32'" in line
    again = run("opt", tmp_path / "packed", *STEPS, "--dtype", "float32")
    assert again.exit_code == 2 and "its type is settled" in again.stderr


def test_in_float32_it_is_exported(half: Path, tmp_path: Path) -> None:
    done = run("opt", half, *STEPS, "--dtype", "float32", "--out", tmp_path / "packed")
    assert done.exit_code == 0, done.output
    assert float_types(tmp_path / "packed") == {torch.float32}
    assert json.loads((tmp_path / "packed" / "prequant-report.json").read_text())["settings"]["dtype"] == "float32"
    assert run("export", tmp_path / "packed", "--out", tmp_path / "model.onnx").exit_code == 0
    assert (tmp_path / "model.onnx").is_file()
